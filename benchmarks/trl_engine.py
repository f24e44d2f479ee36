"""Engine arguments for TRL's generator `VLLMGeneration` that TRL has no option for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from trl.generation import vllm_generation

from osd.engine.weights import keep_weights_live


@contextmanager
def engine_arguments(**kwargs: Any) -> Iterator[None]:
    """Pass these arguments to the `LLM` that TRL creates in this block. Arguments that TRL sets take precedence.

    Also keeps vLLM from packing weights on a CPU, because TRL's weight sync fails on packed weights.
    """
    with mock.patch.object(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, **kwargs)), keep_weights_live():
        yield
