"""TRL's own generator, `VLLMGeneration`, with engine arguments that TRL has no option for."""

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
    """In this block TRL's `LLM` gets these arguments as well; those that TRL gives it win.

    On a CPU, where vLLM packs its weights and TRL's sync would fail on what is left of them, they stay as they are.
    """
    with mock.patch.object(vllm_generation, "LLM", functools.partial(vllm_generation.LLM, **kwargs)), keep_weights_live():
        yield
