"""OptimalSamplingV1: the offline API. Text in, semi-on-policy completions out."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osd.core import MixingConfig, TokenRecord
from osd.prompts import Prompt, encode, for_side

if TYPE_CHECKING:
    from osd.engine.engine import PairCompletion, PairEngine, PairPrompt


@dataclass(frozen=True, kw_only=True)
class OptimalSamplingOutput:
    """What one ``generate`` call sampled; every list is in the order of the prompts.

    Attributes:
        generated_texts: the completions without special tokens.
        generated_ids: their token ids, including the one that ended them.
        num_tokens: their lengths in tokens.
        finish_reasons: "stop", "length" or "error".
        errors: why a completion ended in an error, or None.
        records: the per-token record of each (α, log q*, log π_θ, log π_t, both KLs, ...), or None if not tracked.
        alpha_stats: mean, std, min, max and count of α over each completion, or None if not tracked.
        alpha_history: α of every token of each completion, or None if not tracked.
    """

    generated_texts: list[str]
    generated_ids: list[list[int]]
    num_tokens: list[int]
    finish_reasons: list[str | None]
    errors: list[str | None]
    records: list[TokenRecord] | None
    alpha_stats: list[dict[str, float]] | None
    alpha_history: list[list[float]] | None


class OptimalSamplingV1:
    """Sample from the optimal mixture q* ∝ π_θ^(1-α)·π_t^α of a student and a teacher, both decoded in one vLLM engine.

    Usable as a context manager; ``close()`` gives the memory back.

    Args:
        model_teacher, model_theta: path or model id of teacher and student; they must share a tokenizer.
        alpha_method: how α is chosen per token: "kl_symmetry", "ess_balance", "entropy", "reverse_kl_symmetry", "fixed".
        fixed_alpha: the teacher's weight with ``alpha_method="fixed"``, in [0, 1].
        alpha_min, alpha_max: bounds of α, in [0, 1].
        teacher_system_prompt, theta_system_prompt: a system prompt for one side only.
        enable_chat_template: render text prompts as a user's message with the model's chat template. Conversations
            (lists of messages) are always rendered.
        track_alpha_stats: keep α and the rest of the per-token record.
        gpu_memory_utilization: the fraction of the device's memory for both models together.
        **kwargs: ``mixture`` ("geometric" or "linear"); ``teacher_kwargs`` and ``theta_kwargs``, vLLM engine arguments for
            one side; and any other vLLM engine argument, for both sides.

    Raises:
        ValueError: an unknown method or argument, bounds outside [0, 1] or crossed, a model that does not exist, tokenizers
            that differ; before any weights load.
        ImportError: a vLLM outside the supported range.
    """

    def __init__(
        self,
        model_teacher: str,
        model_theta: str,
        alpha_method: str = "kl_symmetry",
        fixed_alpha: float = 0.5,
        alpha_min: float = 0.0,
        alpha_max: float = 1.0,
        teacher_system_prompt: str | None = None,
        theta_system_prompt: str | None = None,
        enable_chat_template: bool = False,
        track_alpha_stats: bool = False,
        gpu_memory_utilization: float = 0.5,
        **kwargs: Any,
    ) -> None:
        mixing = MixingConfig(
            alpha_method=alpha_method,
            fixed_alpha=fixed_alpha,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            mixture=kwargs.pop("mixture", "geometric"),
        )
        from osd.engine.engine import PairConfig, PairEngine  # vLLM is imported here, after the cheap checks

        config = PairConfig(
            teacher=str(model_teacher),
            student=str(model_theta),
            mixing=mixing,
            teacher_kwargs=kwargs.pop("teacher_kwargs", None) or {},
            student_kwargs=kwargs.pop("theta_kwargs", None) or {},
            engine_kwargs={"gpu_memory_utilization": gpu_memory_utilization, **kwargs},
        )
        self.teacher_system_prompt = teacher_system_prompt
        self.theta_system_prompt = theta_system_prompt
        self.enable_chat_template = enable_chat_template
        self.track_alpha_stats = track_alpha_stats
        self.engine: PairEngine = PairEngine(config)

    def generate(
        self,
        prompts: Sequence[Prompt],
        theta_prompts: Sequence[Prompt] | None = None,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        use_optimal_sampling: bool = True,
        **sampling: Any,
    ) -> OptimalSamplingOutput:
        """Sample one completion per prompt.

        Args:
            prompts: what the teacher reads (and the student too, without ``theta_prompts``): texts, or conversations.
            theta_prompts: what the student reads, one per prompt.
            max_tokens: the longest completion, in tokens.
            temperature: divides both models' logits before they are mixed; 0 takes the most likely token of q*.
            top_p, top_k: truncate q* (1.0 and -1: not at all).
            use_optimal_sampling: False samples from the teacher alone.
            **sampling: further ``vllm.SamplingParams`` arguments: ``seed``, ``stop``, ``min_p``, ``logit_bias``, ... They
                act on q*; a ``repetition_penalty`` also counts the teacher's prompt (not the student's). For several
                completions of a prompt, repeat it.

        Raises:
            ValueError: ``theta_prompts`` of another length, an empty prompt, or a prompt that with ``max_tokens`` is longer
                than either model's context; nothing has been sampled then.
        """
        pairs = self._pairs(prompts, prompts if theta_prompts is None else theta_prompts)
        completions = self.engine.generate(
            pairs,
            sampling={"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, **sampling},
            teacher_only=not use_optimal_sampling,
            record=self.track_alpha_stats,
            progress=True,
        )
        return self._output(completions)

    def _pairs(self, prompts: Sequence[Prompt], theta_prompts: Sequence[Prompt]) -> list[PairPrompt]:
        for name, given in (("prompts", prompts), ("theta_prompts", theta_prompts)):
            if isinstance(given, str):
                raise ValueError(f"{name} is one text; give a list of prompts")
        if len(prompts) != len(theta_prompts):
            raise ValueError(
                f"theta_prompts has {len(theta_prompts)} entries for {len(prompts)} prompts; give the student one each, or None"
            )
        from osd.engine.engine import PairPrompt

        teacher = [self._encode(i, "prompts", prompt, self.teacher_system_prompt) for i, prompt in enumerate(prompts)]
        theta = [self._encode(i, "theta_prompts", prompt, self.theta_system_prompt) for i, prompt in enumerate(theta_prompts)]
        return [PairPrompt(teacher_token_ids=t, student_token_ids=s) for t, s in zip(teacher, theta, strict=True)]

    def _encode(self, index: int, name: str, prompt: Prompt, system_prompt: str | None) -> list[int]:
        try:
            rendered = for_side(prompt, system_prompt=system_prompt, chat=self.enable_chat_template)
            return encode(self.engine.tokenizer, rendered)
        except ValueError as error:
            raise ValueError(f"{name}[{index}]: {error}") from error

    def _output(self, completions: list[PairCompletion]) -> OptimalSamplingOutput:
        errors = [completion.error for completion in completions]
        if any(errors):
            warnings.warn(f"{len(errors) - errors.count(None)} completions ended in an error; see output.errors", stacklevel=3)
        tracked = [c.record for c in completions if c.record is not None]  # of every completion, or of none
        records = tracked if self.track_alpha_stats else None
        history = None if records is None else [record.alpha.tolist() for record in records]
        return OptimalSamplingOutput(
            generated_texts=[completion.text for completion in completions],
            generated_ids=[completion.token_ids for completion in completions],
            num_tokens=[len(completion.token_ids) for completion in completions],
            finish_reasons=[completion.finish_reason for completion in completions],
            errors=errors,
            records=records,
            alpha_stats=None if history is None else [alpha_stats(alphas) for alphas in history],
            alpha_history=history,
        )

    def close(self) -> None:
        """Shut both engines down and give their memory back. Idempotent."""
        self.engine.close()

    def __enter__(self) -> OptimalSamplingV1:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def alpha_stats(alphas: Sequence[float]) -> dict[str, float]:
    """Mean, population standard deviation, minimum, maximum and count of one completion's α."""
    if not alphas:
        nan = float("nan")
        return {"mean": nan, "std": nan, "min": nan, "max": nan, "count": 0}
    return {
        "mean": statistics.fmean(alphas),
        "std": statistics.pstdev(alphas),
        "min": min(alphas),
        "max": max(alphas),
        "count": len(alphas),
    }


def save_alpha_history(output: OptimalSamplingOutput, path: str | os.PathLike[str]) -> None:
    """Write the α of every token, and its statistics per completion, as JSON; the file is whole or absent.

    Raises:
        ValueError: an output that was sampled without ``track_alpha_stats=True``.
    """
    if output.alpha_history is None or output.alpha_stats is None:
        raise ValueError("this output has no α: construct OptimalSamplingV1 with track_alpha_stats=True")
    rows = [
        {"text": text, "token_ids": ids, "alpha": alphas, "alpha_stats": stats}
        for text, ids, alphas, stats in zip(
            output.generated_texts, output.generated_ids, output.alpha_history, output.alpha_stats, strict=True
        )
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder; name a file")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_text(json.dumps({"completions": rows}, ensure_ascii=False), encoding="utf-8")
        os.replace(whole, path)
