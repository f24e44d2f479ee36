"""OSDConfig: TRL's DistillationConfig with options for α, the prompts of each side and the paired engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from trl import DistillationConfig

from osd.core import SPECULATION_HELP, MixingConfig, mixing_option, speculative_tokens
from osd.train.alpha_schedule import AlphaSchedule
from osd.train.divergence import Divergence
from osd.train.validation import check


@dataclass
class OSDConfig(DistillationConfig):
    """Fields of [`trl.DistillationConfig`] and `transformers.TrainingArguments`, plus OSD's own.

    TRL's fields keep their meaning. The sampling fields shape draws from q*; `temperature` also divides the logits in the loss.
    `vllm_gpu_memory_utilization` and `vllm_max_model_length` apply to the pair. `trainers/fields.py` lists the fields that are
    refused and those that have no effect.

    Raises:
        ValueError: on construction, before any model loads, naming the field, the value and the fix.
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

    vllm_model_impl: str = field(
        default="auto",
        metadata={
            "help": "Model implementation of both engines: 'auto' (vLLM's own, or else the model's transformers code), 'vllm' "
            "or 'transformers'."
        },
    )

    # Mixing
    alpha_method: str = mixing_option("alpha_method")
    fixed_alpha: float = mixing_option("fixed_alpha")
    alpha_min: float = mixing_option("alpha_min")
    alpha_max: float = mixing_option("alpha_max")
    mixture: str = mixing_option("mixture")

    alpha_schedule: str = field(
        default="constant",
        metadata={
            "help": "Path of alpha_min, alpha_max and fixed_alpha to their *_end values over training: 'constant' (no change), "
            "'linear' or 'cosine'. alpha_max_end=0 ends with the student alone."
        },
    )
    alpha_min_end: float | None = field(default=None, metadata={"help": "alpha_min at the end; default: no change."})
    alpha_max_end: float | None = field(default=None, metadata={"help": "alpha_max at the end; default: no change."})
    fixed_alpha_end: float | None = field(default=None, metadata={"help": "fixed_alpha at the end; default: no change."})
    alpha_schedule_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps until the end of the alpha schedule; default: all of the run's."},
    )
    mix_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Draw this many tokens of every completion from q*, and the rest from the student alone. Default: all "
            "tokens from q*."
        },
    )
    mix_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Probability, in [0, 1], that a completion is drawn from q*; the others are drawn from the student alone."
        },
    )

    # Prompts
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
            "help": "The teacher's prompt (of a conversation: its last user message), with dataset columns in braces: "
            "'{prompt}\\n\\nThe answer is {answer}.' A literal brace is written twice. Default: the dataset's "
            "`teacher_prompt` column, or `privileged_context` appended to the prompt, or the prompt itself."
        },
    )

    drop_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "Drop rows that cannot be rendered, or that are too long for either model, with a warning. Default: refuse "
            "the dataset and name the first of them. Every row is checked before a model loads; rows of a stream when they are "
            "read."
        },
    )

    # The loss
    teacher_signal: str = field(
        default="recorded",
        metadata={
            "help": "Source of the teacher in the loss: 'recorded' (hidden states of the engine's teacher; no second "
            "teacher), 'topk' (the `teacher_topk` largest log-probabilities of the engine's teacher and the mass of the rest: "
            "fewer bytes, a lower bound of the divergence) or 'recompute' (a transformers teacher in the trainer, loaded with "
            "teacher_model_init_kwargs)."
        },
    )
    teacher_topk: int = field(
        default=64,
        metadata={"help": "Log-probabilities kept of each token with teacher_signal='topk', from 1 to the whole vocabulary."},
    )
    divergence: str = field(
        default="jsd",
        metadata={
            "help": "'jsd': TRL's generalised JSD, with `beta` (0 forward KL, 1 reverse KL). 'skew_kl': "
            "KL(teacher ‖ s·teacher + (1-s)·student). 'skew_reverse_kl': KL(student ‖ s·student + (1-s)·teacher)."
        },
    )
    skew: float = field(default=0.1, metadata={"help": "s of the skewed divergences, in (0, 1)."})
    kl_clip: float | None = field(
        default=None,
        metadata={
            "help": "The largest divergence of one token, in nats: above it a token counts as this much and has no gradient. "
            "Limits tokens that only a privileged teacher can know. Default: no limit."
        },
    )
    importance_correction: str = field(
        default="none",
        metadata={
            "help": "Importance weights from the sampled distribution towards the student's own: 'none'; 'token' (the "
            "ratio of the token before: biased, low variance); 'prefix' (the product of the ratios of all tokens before: "
            "unbiased); 'sequence' (the product over the completion: unbiased, more variance). See trainers/importance.py."
        },
    )
    importance_clip: float | None = field(
        default=2.0,
        metadata={"help": "The largest importance weight; a smaller clip has less variance and more bias. None: no limit."},
    )
    num_iterations: int = field(
        default=1,
        metadata={"help": "Optimizer steps on each batch of completions before new ones are sampled."},
    )
    privilege_gap_steps: int = field(
        default=0,
        metadata={
            "help": "Interval in optimizer steps (those that sample) to log how much the teacher's own prompt changes its "
            "log-probabilities of the sampled tokens (`osd/privilege/gap`, nats per token). 0: never."
        },
    )
    privilege_gap_tokens: int = field(
        default=64, metadata={"help": "Tokens per process to measure the gap on; each is one request of one token."}
    )

    # Sampling while training
    async_generation: bool = field(
        default=False,
        metadata={
            "help": "With vllm_mode='server': the server samples the next batch while this one is trained on, from weights "
            "that are num_iterations optimizer updates older than those it will train first. The first batch of an epoch, and "
            "of a resumed run, is waited for."
        },
    )
    max_staleness: int = field(
        default=1,
        metadata={
            "help": "With async_generation: the most optimizer updates between the weights that draw a token and those that "
            "first train on it; at least num_iterations. An older sample ends the run."
        },
    )
    async_weight_updates: str = field(
        default="between",
        metadata={
            "help": "With async_generation: 'between' waits for the batch in the background before the weights are updated; "
            "'running' updates them under running requests, which go on with the new weights. Then max_staleness // "
            "num_iterations batches are in the background, so a server that is slower than training never idles."
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
    num_speculative_tokens: str = field(default="0", metadata={"help": SPECULATION_HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        # transformers would wrap the student in torch's DataParallel on several GPUs; the engine uses one.
        self._n_gpu = min(self.n_gpu, 1)
        check(self)

    def mixing(self) -> MixingConfig:
        """Return the mixing of the first step.

        Raises:
            ValueError: an unknown method or mixture, or bounds that are crossed or outside [0, 1].
        """
        return MixingConfig.of(self)

    def schedule(self) -> AlphaSchedule:
        """Return the mixing of every optimizer step.

        Raises:
            ValueError: as `mixing`, at either end; a schedule without an end value.
        """
        start, end = self.mixing(), self.mixing()
        if self.alpha_schedule != "constant":
            names = ("alpha_min", "alpha_max", "fixed_alpha")
            ends = {name: value for name in names if (value := getattr(self, f"{name}_end")) is not None}
            wanted = ("fixed_alpha",) if self.alpha_method == "fixed" else ("alpha_min", "alpha_max")
            if not set(wanted) & set(ends):
                fix = " or ".join(f"{name}_end" for name in wanted)
                raise ValueError(
                    f"alpha_schedule={self.alpha_schedule!r} has nothing to move with alpha_method={self.alpha_method!r}; set "
                    f"{fix}, or alpha_schedule='constant'"
                )
            try:
                end = replace(start, **ends)
            except ValueError as error:
                raise ValueError(f"at the end of the alpha schedule, {error}") from None
        return AlphaSchedule(start=start, end=end, shape=self.alpha_schedule, steps=self.alpha_schedule_steps)

    def loss_divergence(self) -> Divergence:
        """Return the divergence that the loss minimises at each token."""
        return Divergence(kind=self.divergence, beta=self.beta, skew=self.skew, temperature=self.temperature, clip=self.kl_clip)

    def pair_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `PairConfig` other than the models and the mixing.

        Raises:
            ValueError: a ``num_speculative_tokens`` that is no number of drafts.
        """
        engine = {
            "gpu_memory_utilization": self.vllm_gpu_memory_utilization,
            "tensor_parallel_size": self.vllm_tensor_parallel_size,
            "max_num_seqs": self._largest_batch() * self.vllm_tensor_parallel_size,
            "model_impl": self.vllm_model_impl,
            "trust_remote_code": self.trust_remote_code,
            "seed": self.seed,
        }
        if self.vllm_max_model_length is not None:
            engine["max_model_len"] = self.vllm_max_model_length
        revisions = {"teacher": self.teacher_model_revision, "student": self.student_init_kwargs().get("revision")}
        teacher, student = ({} if value is None else {"revision": value} for value in revisions.values())
        return {
            "engine_kwargs": engine | self._mapping("engine_kwargs"),
            "teacher_kwargs": teacher | self._mapping("teacher_engine_kwargs"),
            "student_kwargs": student | self._mapping("student_engine_kwargs"),
            "num_speculative_tokens": speculative_tokens(self.num_speculative_tokens),
        }

    def server_url(self) -> str:
        """Return the address of the server that samples with `vllm_mode="server"`."""
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    def steps_ahead(self) -> int:
        """Return how many sampling steps `async_generation` keeps in the background at most."""
        return self.max_staleness // self.num_iterations if self.async_weight_updates == "running" else 1

    def sampling_kwargs(self) -> dict[str, Any]:
        """Return further `vllm.SamplingParams` arguments: `generation_kwargs` and the regular expression."""
        kwargs = self._mapping("generation_kwargs")
        if self.vllm_structured_outputs_regex is not None:
            kwargs["structured_outputs"] = {"regex": self.vllm_structured_outputs_regex}
        return kwargs

    def student_init_kwargs(self) -> dict[str, Any]:
        """Return TRL's `model_init_kwargs`: arguments of `from_pretrained` for the student."""
        return self._mapping("model_init_kwargs")

    def teacher_init_kwargs(self) -> dict[str, Any]:
        """Return TRL's `teacher_model_init_kwargs`: arguments of `from_pretrained` for the teacher of "recompute"."""
        return self._mapping("teacher_model_init_kwargs")

    def _mapping(self, name: str) -> dict[str, Any]:
        value = getattr(self, name) or {}
        if not isinstance(value, dict):  # a JSON object on the command line is parsed by now
            raise ValueError(f'{name}={value!r} is not a JSON object; write it as {{"key": value}}')
        return dict(value)

    def _largest_batch(self) -> int:
        train = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return max(train, self.per_device_eval_batch_size)
