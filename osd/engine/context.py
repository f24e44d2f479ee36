"""Context lengths of both models of a pair, from their configurations alone."""

from __future__ import annotations

from vllm import envs
from vllm.engine.arg_utils import EngineArgs

from osd.engine.backend.versions import setting
from osd.engine.config import PairConfig


def context_lengths(config: PairConfig) -> dict[str, int]:
    """Return the longest sequence of "teacher" and "student" in tokens, prompt and completion; loads no weights.

    Raises:
        ValueError: a model that vLLM has no implementation of, or a max_model_len over the model's own.
    """
    sides = {"teacher": (config.teacher, config.teacher_kwargs), "student": (config.student, config.student_kwargs)}
    with setting(envs, VLLM_ENABLE_V1_MULTIPROCESSING=True):  # no engine starts here: no warning about its seed
        return {
            side: EngineArgs(**{**config.engine_kwargs, **kwargs, "model": model}).create_model_config().max_model_len
            for side, (model, kwargs) in sides.items()
        }
