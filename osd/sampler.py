"""OptimalSamplingV1: the offline API. Prompts in, completions drawn from q* and their per-token records out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from osd.core import MixingConfig, speculative_tokens
from osd.output import OptimalSample, OptimalSamplingOutput, alpha_stats, save_alpha_history
from osd.prompt_checks import check_template_kwargs, compare_templates, forget_warnings, is_conversation, is_token_ids
from osd.prompts import Prompt, encode, for_side
from osd.sampling_args import TAKEN, checked_sampling, derived_seeds
from osd.terminal import Loading, models

if TYPE_CHECKING:
    from osd.engine.engine import PairCompletion, PairEngine, PairPrompt

__all__ = ["OptimalSample", "OptimalSamplingOutput", "OptimalSamplingV1", "alpha_stats", "save_alpha_history"]


class OptimalSamplingV1:
    """Sample from the optimal mixture q* ∝ π_θ^(1-α)·π_t^α of a student and a teacher, both decoded in one vLLM engine.

    Usable as a context manager; ``close()`` frees the memory.

    Args:
        model_teacher, model_theta: path or model id of teacher and student; they must share a vocabulary. Each side is
            rendered with its own tokenizer and chat template.
        alpha_method: method that chooses α per token: "kl_symmetry", "ess_balance", "entropy", "reverse_kl_symmetry", "fixed".
        fixed_alpha: the teacher's weight with ``alpha_method="fixed"``, in [0, 1].
        alpha_min, alpha_max: bounds of α, in [0, 1].
        teacher_system_prompt, theta_system_prompt: a system prompt for one side only.
        enable_chat_template: render text prompts as a user message with the chat template of each side. Conversations
            (lists of messages) are always rendered; token ids never.
        track_alpha_stats: keep α and the rest of the per-token record.
        gpu_memory_utilization: the fraction of the device's memory for both models together.
        chat_template_kwargs: arguments of both chat templates, as in ``{"enable_thinking": False}``.
        teacher_chat_template_kwargs, theta_chat_template_kwargs: further ones for one side, which win.
        use_tqdm: show progress bars while models load and completions are sampled.
        num_speculative_tokens: how many tokens the student drafts for the teacher to verify in one pass, or "auto"; see
            :class:`osd.PairConfig`. Completions follow the same distribution for every value.
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
        alpha_method: str = MixingConfig.alpha_method,
        fixed_alpha: float = MixingConfig.fixed_alpha,
        alpha_min: float = MixingConfig.alpha_min,
        alpha_max: float = MixingConfig.alpha_max,
        teacher_system_prompt: str | None = None,
        theta_system_prompt: str | None = None,
        enable_chat_template: bool = False,
        track_alpha_stats: bool = False,
        gpu_memory_utilization: float = 0.5,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_chat_template_kwargs: Mapping[str, Any] | None = None,
        theta_chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
        num_speculative_tokens: int | str = 0,
        **kwargs: Any,
    ) -> None:
        mixing = MixingConfig(
            alpha_method=alpha_method,
            fixed_alpha=fixed_alpha,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            mixture=kwargs.pop("mixture", MixingConfig.mixture),
        )
        num_speculative_tokens = speculative_tokens(num_speculative_tokens)
        _refuse_misplaced(kwargs)
        self.teacher_system_prompt = teacher_system_prompt
        self.theta_system_prompt = theta_system_prompt
        self.enable_chat_template = enable_chat_template
        self.track_alpha_stats = track_alpha_stats
        self.use_tqdm = use_tqdm
        self.teacher_chat_template_kwargs = {**(chat_template_kwargs or {}), **(teacher_chat_template_kwargs or {})}
        self.theta_chat_template_kwargs = {**(chat_template_kwargs or {}), **(theta_chat_template_kwargs or {})}
        for given in (self.teacher_chat_template_kwargs, self.theta_chat_template_kwargs):
            check_template_kwargs(given)
        from osd.engine.engine import PairConfig, PairEngine  # vLLM is imported here, after the cheap checks

        config = PairConfig(
            teacher=str(model_teacher),
            student=str(model_theta),
            mixing=mixing,
            num_speculative_tokens=num_speculative_tokens,
            teacher_kwargs=kwargs.pop("teacher_kwargs", None) or {},
            student_kwargs=kwargs.pop("theta_kwargs", None) or {},
            engine_kwargs={"gpu_memory_utilization": gpu_memory_utilization, "use_tqdm_on_load": use_tqdm, **kwargs},
        )
        _hint_at_eager(config.engine_kwargs)
        forget_warnings()
        with Loading(models(teacher=config.teacher, student=config.student), quiet=not use_tqdm):
            self.engine: PairEngine = PairEngine(config)
        # Plain tokenizers: vLLM's may be a pool of copies, on which setting a chat_template has no effect.
        self.teacher_tokenizer: Any = self.engine.tokenizer
        self.theta_tokenizer: Any = self.engine.student_tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        theta_prompts: Sequence[Prompt] | None = None,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        use_optimal_sampling: bool = True,
        n: int = 1,
        use_tqdm: bool | None = None,
        **sampling: Any,
    ) -> OptimalSamplingOutput:
        """Sample ``n`` completions per prompt.

        Args:
            prompts: the teacher's prompts (and the student's, without ``theta_prompts``): texts, conversations, or lists of
                token ids, which are read as they are.
            theta_prompts: the student's prompts, one per prompt.
            max_tokens: the longest completion, in tokens.
            temperature: divides the logits of both models before they are mixed; 0 takes the most likely token of q*.
            top_p, top_k: truncate q* (1.0 and -1: off).
            use_optimal_sampling: False samples from the teacher alone.
            n: completions per prompt. They differ with a ``seed``, too: each repetition of a prompt has a seed derived from it.
            use_tqdm: show a progress bar; None: as the constructor was told.
            **sampling: further ``vllm.SamplingParams`` arguments, which act on q*: ``seed``, ``stop``, ``min_p``, ...
                `osd.sampling_args` lists all that are taken, and the reason for each that is refused.

        Raises:
            ValueError: a sampling argument that is unknown, refused or out of range; ``theta_prompts`` of another length; an
                empty prompt, or a prompt that with ``max_tokens`` is longer than the context of either model. Nothing has
                been sampled then.
        """
        given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "n": n, **sampling}
        arguments = checked_sampling(given)
        theta_prompts = prompts if theta_prompts is None else theta_prompts
        pairs = self._pairs(prompts, theta_prompts)
        count, seed = arguments.pop("n", 1), arguments.pop("seed", None)
        if count > 1 and use_optimal_sampling:
            self.engine.check(pairs, sampling=arguments)  # whose errors number the prompts as they were given
        repeated = [pair for pair in pairs for _ in range(count)]
        seeds = derived_seeds(seed, [(tuple(p.teacher_token_ids), tuple(p.student_token_ids)) for p in repeated])
        completions = self.engine.generate(
            repeated,
            sampling=[{**arguments, "seed": seed} for seed in seeds],
            teacher_only=not use_optimal_sampling,
            record=self.track_alpha_stats,
            progress=self.use_tqdm if use_tqdm is None else use_tqdm,
        )
        settings = {"use_optimal_sampling": use_optimal_sampling, "sampling": {**arguments, "n": count, "seed": seed}}
        return self._output(completions, list(prompts), list(theta_prompts), count, {**self._settings(), **settings})

    def _pairs(self, prompts: Sequence[Prompt], theta_prompts: Sequence[Prompt]) -> list[PairPrompt]:
        for name, given in (("prompts", prompts), ("theta_prompts", theta_prompts)):
            if isinstance(given, str) or is_token_ids(given) or (len(given) and is_conversation(given)):
                what = "text" if isinstance(given, str) else "prompt"
                raise ValueError(f"{name} is one {what}; give a list of prompts")
        if len(prompts) != len(theta_prompts):
            raise ValueError(
                f"theta_prompts has {len(theta_prompts)} entries for {len(prompts)} prompts; give the student one each, or None"
            )
        from osd.engine.engine import PairPrompt

        if any(map(self._is_rendered, [*prompts, *theta_prompts])):
            compare_templates(
                self.teacher_tokenizer,
                self.theta_tokenizer,
                self.teacher_chat_template_kwargs,
                self.theta_chat_template_kwargs,
            )
        teacher = [self._teacher_ids(i, prompt) for i, prompt in enumerate(prompts)]
        theta = [self._theta_ids(i, prompt) for i, prompt in enumerate(theta_prompts)]
        return [PairPrompt(teacher_token_ids=t, student_token_ids=s) for t, s in zip(teacher, theta, strict=True)]

    def _is_rendered(self, prompt: Prompt) -> bool:
        return is_conversation(prompt) or (self.enable_chat_template and isinstance(prompt, str))

    def _teacher_ids(self, index: int, prompt: Prompt) -> list[int]:
        system, kwargs = self.teacher_system_prompt, self.teacher_chat_template_kwargs
        return self._encode(f"prompts[{index}]", prompt, self.teacher_tokenizer, system, kwargs)

    def _theta_ids(self, index: int, prompt: Prompt) -> list[int]:
        system, kwargs = self.theta_system_prompt, self.theta_chat_template_kwargs
        return self._encode(f"theta_prompts[{index}]", prompt, self.theta_tokenizer, system, kwargs)

    def _encode(
        self, label: str, prompt: Prompt, tokenizer: Any, system_prompt: str | None, kwargs: Mapping[str, Any]
    ) -> list[int]:
        try:
            if is_token_ids(prompt):
                if system_prompt:
                    raise ValueError("token ids cannot be given a system prompt; give text or a list of messages")
                return encode(tokenizer, prompt)
            return encode(tokenizer, for_side(prompt, system_prompt=system_prompt, chat=self.enable_chat_template), **kwargs)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error

    def _settings(self) -> dict[str, Any]:
        config = self.engine.config
        return {
            "model_teacher": config.teacher,
            "model_theta": config.student,
            "mixing": self.engine.mixing.to_dict(),
            "teacher_system_prompt": self.teacher_system_prompt,
            "theta_system_prompt": self.theta_system_prompt,
            "enable_chat_template": self.enable_chat_template,
            "teacher_chat_template_kwargs": self.teacher_chat_template_kwargs,
            "theta_chat_template_kwargs": self.theta_chat_template_kwargs,
        }

    def _output(
        self,
        completions: list[PairCompletion],
        prompts: list[Prompt],
        theta_prompts: list[Prompt],
        n: int,
        settings: dict[str, Any],
    ) -> OptimalSamplingOutput:
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
            prompts=prompts,
            theta_prompts=theta_prompts,
            n=n,
            settings=settings,
        )

    def close(self) -> None:
        """Shut both engines down and free their memory. Idempotent."""
        self.engine.close()

    def __enter__(self) -> OptimalSamplingV1:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _refuse_misplaced(kwargs: Mapping[str, Any]) -> None:
    """Refuse ``engine_kwargs``, and sampling arguments among engine arguments (``seed`` is both)."""
    if "engine_kwargs" in kwargs:
        raise ValueError(
            f"engine_kwargs={kwargs['engine_kwargs']!r}: engine arguments are given directly, as "
            "OptimalSamplingV1(..., max_num_seqs=8)"
        )
    for name in kwargs:
        if name in TAKEN and name != "seed":
            raise ValueError(f"{name}={kwargs[name]!r} is a sampling argument; give it to generate()")


def _hint_at_eager(engine_kwargs: Mapping[str, Any]) -> None:
    import torch

    compiles = not any(engine_kwargs.get(name) is not None for name in ("compilation_config", "optimization_level"))
    if compiles and not engine_kwargs.get("enforce_eager") and not torch.accelerator.is_available():
        warnings.warn(
            "no GPU: vLLM compiles both models before it samples, which takes minutes on a CPU. enforce_eager=True starts "
            "without compiling",
            stacklevel=3,
        )
