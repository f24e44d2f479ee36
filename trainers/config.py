"""OSDConfig: TRL's DistillationConfig, with how α is chosen, what only the teacher reads, and the paired engine."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import DistillationConfig

from osd.core import MixingConfig
from osd.prompts import template_fields

# Fields of DistillationConfig that an OSD run cannot honour: (name, what to do instead).
_REFUSED = (
    ("vllm_server_base_url", "the student and the teacher are sampled in one engine inside the trainer's process"),
    ("teacher_model_init_kwargs", "no transformers teacher is loaded; use teacher_engine_kwargs"),
    ("vllm_structured_outputs_regex", "structured outputs are not supported by the paired engine"),
    ("vllm_enable_sleep_mode", "sleep mode is not supported yet"),
    ("cache_implementation", "completions come from vLLM, not from transformers"),
    ("max_tool_calling_iterations", "tools are not supported"),
)


@dataclass
class OSDConfig(DistillationConfig):
    """Every field of [`trl.DistillationConfig`] (and of `transformers.TrainingArguments`), and these.

    TRL's `beta`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, `max_completion_length` and
    `generation_kwargs` keep their meaning; those of sampling shape draws from q*, and `temperature` also divides the
    logits in the loss. `vllm_gpu_memory_utilization` and `vllm_max_model_length` are those of the pair.

    Raises:
        ValueError: on construction, before any model loads, naming the field, what was given and what to do.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (transformers' own form)
        *DistillationConfig._VALID_DICT_FIELDS,
        "engine_kwargs",
        "teacher_engine_kwargs",
        "student_engine_kwargs",
    ]

    use_vllm: bool = field(
        default=True,
        metadata={"help": "Always true: completions come from the paired vLLM engine."},
    )

    # How q* is made
    alpha_method: str = field(
        default="kl_symmetry",
        metadata={
            "help": "How the teacher's weight α is chosen for every token: 'kl_symmetry' (both KL divergences from q* "
            "are equal), 'ess_balance', 'entropy', 'reverse_kl_symmetry', or 'fixed'."
        },
    )
    fixed_alpha: float = field(
        default=0.5,
        metadata={
            "help": "The teacher's weight under alpha_method='fixed', in [0, 1]: 0 samples from the student alone, "
            "1 from the teacher alone."
        },
    )
    alpha_min: float = field(default=0.0, metadata={"help": "Lower bound of α, in [0, alpha_max]."})
    alpha_max: float = field(default=1.0, metadata={"help": "Upper bound of α, in [alpha_min, 1]."})
    mixture: str = field(
        default="geometric",
        metadata={"help": "'geometric': q* ∝ π_θ^(1-α) π_t^α. 'linear': q* = (1-α) π_θ + α π_t, the baseline of other papers."},
    )

    # What each side reads
    teacher_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System prompt that only the teacher reads; replaces the one in the data."},
    )
    student_system_prompt: str | None = field(
        default=None,
        metadata={"help": "System prompt that only the student reads; replaces the one in the data."},
    )
    enable_chat_template: bool = field(
        default=False,
        metadata={
            "help": "Turn plain-text prompts into a conversation of one user message. Prompts that are conversations "
            "always go through the chat template."
        },
    )
    privileged_template: str | None = field(
        default=None,
        metadata={
            "help": "What the teacher reads in place of the student's prompt (of its last user message), with dataset "
            "columns in braces: '{prompt}\\n\\nThe answer is {answer}.' A literal brace is written twice. Default: the "
            "dataset's `teacher_prompt` column, or `privileged_context` appended to the prompt, or the prompt itself."
        },
    )

    # The paired engine
    engine_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "vLLM engine arguments of both sides (dtype, max_model_len, ...); they win over vllm_* fields."},
    )
    teacher_engine_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "vLLM engine arguments of the teacher only (quantization, ...)."}
    )
    student_engine_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "vLLM engine arguments of the student only."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixing()
        self.pair_kwargs()
        self._check_sampling()
        self._check_colocated()
        for name, why in _REFUSED:
            if getattr(self, name) != _default(name):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be used: {why}")
        if self.privileged_template is not None:
            template_fields(self.privileged_template)

    def _check_sampling(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} divides the logits in the loss, so it must be positive; for greedy "
                'sampling set generation_kwargs: {"temperature": 0}'
            )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} must be at least 1 token")
        if self.sampling_kwargs().get("n", 1) != 1:
            raise ValueError("generation_kwargs['n'] must be 1: TRL trains on one completion per prompt")

    def _check_colocated(self) -> None:
        if not self.use_vllm:
            raise ValueError("use_vllm=False: OSD samples from q* inside vLLM; leave it true")
        if self.vllm_mode != "colocate":
            raise ValueError(f"vllm_mode={self.vllm_mode!r}: only 'colocate' is supported, with the pair in the trainer")
        if self.vllm_tensor_parallel_size != 1:
            raise ValueError(
                f"vllm_tensor_parallel_size={self.vllm_tensor_parallel_size}: every process owns a whole pair on its own "
                "device; use 1, and more processes instead"
            )
        if not self.ds3_gather_for_generation:
            raise ValueError("ds3_gather_for_generation=False is not compatible with vLLM generation; leave it true")

    def mixing(self) -> MixingConfig:
        """How α is chosen and the policies are mixed.

        Raises:
            ValueError: an unknown method or mixture, or bounds that are crossed or outside [0, 1].
        """
        return MixingConfig(
            alpha_method=self.alpha_method,
            fixed_alpha=self.fixed_alpha,
            alpha_min=self.alpha_min,
            alpha_max=self.alpha_max,
            mixture=self.mixture,
        )

    def pair_kwargs(self) -> dict[str, dict[str, Any]]:
        """`engine_kwargs`, `teacher_kwargs` and `student_kwargs` of the paired engine."""
        engine = {
            "gpu_memory_utilization": self.vllm_gpu_memory_utilization,
            "max_num_seqs": self._largest_batch(),
            "model_impl": self.vllm_model_impl,
            "trust_remote_code": self.trust_remote_code,
            "seed": self.seed,
        }
        if self.vllm_max_model_length is not None:
            engine["max_model_len"] = self.vllm_max_model_length
        teacher = {} if self.teacher_model_revision is None else {"revision": self.teacher_model_revision}
        return {
            "engine_kwargs": engine | self._mapping("engine_kwargs"),
            "teacher_kwargs": teacher | self._mapping("teacher_engine_kwargs"),
            "student_kwargs": self._mapping("student_engine_kwargs"),
        }

    def sampling_kwargs(self) -> dict[str, Any]:
        """TRL's `generation_kwargs`: further `vllm.SamplingParams` arguments."""
        return self._mapping("generation_kwargs")

    def model_kwargs(self) -> dict[str, Any]:
        """TRL's `model_init_kwargs`: arguments of the student's `from_pretrained`."""
        return self._mapping("model_init_kwargs")

    def _mapping(self, name: str) -> dict[str, Any]:
        value = getattr(self, name)
        if isinstance(value, str):  # the command line's JSON is parsed by now, if it was an object
            raise ValueError(f'{name}={value!r} is not a JSON object; write it as {{"key": value}}')
        return dict(value or {})

    def _largest_batch(self) -> int:
        train = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return max(train, self.per_device_eval_batch_size)


def _default(name: str) -> Any:
    value = next(f for f in fields(OSDConfig) if f.name == name).default
    assert value is not MISSING
    return value
