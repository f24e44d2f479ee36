"""A logits processor of a user's, which vLLM loads by its name."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor


class Only(LogitsProcessor):
    """Leaves ids 20 and 21."""

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        logits[:, :20] = logits[:, 22:] = float("-inf")
        return logits
