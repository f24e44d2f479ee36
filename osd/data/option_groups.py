"""The options of `osd generate` and `osd compare`, in groups: every field is a flag and a YAML key, and has a help text.

A field that training has too keeps training's name and meaning, so that one YAML file serves all three commands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from osd.core import SPECULATION_HELP, MixingConfig, mixing_option
from osd.sampling_args import DATA_COMMANDS, as_vllm_arguments, checked_sampling


def _of(default: Any, help: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Models:
    _argument_group_name = "models"

    model_name_or_path: str | None = _of(None, "The student: model id or local path.")
    teacher_model_name_or_path: str | None = _of(None, "The teacher: model id or local path, with the student's tokenizer.")
    model_revision: str | None = _of(None, "The student's branch, tag or commit.")
    teacher_model_revision: str | None = _of(None, "The teacher's branch, tag or commit.")
    trust_remote_code: bool = _of(False, "Run code that comes with a model.")


@dataclass(frozen=True, kw_only=True)
class Data:
    _argument_group_name = "data in and out"

    input: str | None = _of(
        None,
        "What to read: a .jsonl, .json, .csv or .parquet file, a folder saved by `datasets`, or a dataset of the Hub. "
        "Default: dataset_name.",
    )
    output: str | None = _of(None, "Folder to write to.")
    dataset_name: str | None = _of(None, "Training's dataset; read when there is no input.")
    dataset_config: str | None = _of(None, "Configuration of a dataset of the Hub.")
    dataset_train_split: str = _of("train", "Split of a dataset that has several.")
    prompt_column: str = _of("prompt", "The column that the student is prompted with; templates call it {prompt}.")
    columns: dict[str, str] | str | None = _of(
        None, 'Further names for columns, as a mapping (JSON as a flag): {"problem": "question"} makes {problem} a field.'
    )
    id_column: str | None = _of(None, "A column with a name for each row. Default: a hash of the row.")
    answer_column: str | None = _of(
        None, "A column with the reference answer. It is kept with every completion; `osd compare` scores by it."
    )
    answer_match: str = _of(
        "final",
        "When a completion is right: final (its final answer is the reference, as a number, choice, text or formula), exact, "
        "contains, math (math-verify on the final answer), regex (the reference is a pattern), or your module:function, which "
        "gets the completion and the reference.",
    )
    limit: int | None = _of(None, "Read only that many rows; `osd compare` reads 100 unless told.")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    _argument_group_name = "what each side reads"

    student_template: str | None = _of(
        None, "The student's prompt, with columns in braces: 'Solve: {problem}'. Default: the prompt column itself."
    )
    teacher_templates: list[str] | None = _of(
        None,
        "The teacher's prompts, with columns in braces, {prompt} for the student's: '{prompt} The answer is {answer}.' "
        "Several take turns over the samples.",
    )
    privileged_template: str | None = _of(None, "Training's name for a single teacher template.")
    student_system_prompt: str | None = _of(None, "System prompt that only the student reads; replaces the one in the data.")
    teacher_system_prompt: str | None = _of(None, "System prompt that only the teacher reads; replaces the one in the data.")
    enable_chat_template: bool = _of(
        False, "Make plain-text prompts a conversation of one user message. Conversations are always rendered."
    )
    student_chat_template: str | None = _of(
        None, "Chat template for the student: a Jinja file, or its text. Default: its own tokenizer's."
    )
    teacher_chat_template: str | None = _of(
        None, "Chat template for the teacher: a Jinja file, or its text. Default: its own tokenizer's."
    )
    chat_template_kwargs: dict[str, Any] | str | None = _of(None, "Arguments of both chat templates (JSON as a flag).")

    def teacher_template_list(self) -> list[str] | None:
        """Return the teacher's templates, or None when the rows have the teacher's prompts themselves."""
        return self.teacher_templates or ([self.privileged_template] if self.privileged_template is not None else None)


@dataclass(frozen=True, kw_only=True)
class Mixing:
    _argument_group_name = "how q* is made"

    alpha_method: str = mixing_option("alpha_method")
    fixed_alpha: float = mixing_option("fixed_alpha")
    alpha_min: float = mixing_option("alpha_min")
    alpha_max: float = mixing_option("alpha_max")
    mixture: str = mixing_option("mixture")

    def mixing(self) -> MixingConfig:
        """Return the mixing of the two policies.

        Raises:
            ValueError: an unknown method or mixture, or bounds that are crossed or outside [0, 1].
        """
        return MixingConfig.of(self)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    _argument_group_name = "sampling"

    num_samples: int = _of(1, "Completions per prompt.")
    max_completion_length: int = _of(512, "The longest completion, in tokens.")
    temperature: float = _of(1.0, "Divides both policies' logits before they are mixed; 0 takes the most likely token of q*.")
    top_p: float = _of(1.0, "Nucleus of q*; 1 keeps the whole vocabulary.")
    top_k: int = _of(0, "Keep the k most likely tokens of q*; 0 keeps all.")
    min_p: float | None = _of(None, "Drop tokens less likely than this share of the most likely one.")
    repetition_penalty: float = _of(1.0, "Penalty on tokens that stand in the student's prompt or the completion.")
    generation_kwargs: dict[str, Any] | str | None = _of(
        None, "Further vllm.SamplingParams arguments (JSON as a flag); they win over the others."
    )
    seed: int = _of(42, "Together with a row's id and a sample's number it seeds that sample.")

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `vllm.SamplingParams`, without the seed."""
        extra = checked_sampling(as_mapping(self.generation_kwargs), where="generation_kwargs", refused=DATA_COMMANDS)
        return as_vllm_arguments(self, extra)


@dataclass(frozen=True, kw_only=True)
class Engine:
    _argument_group_name = "engine"

    vllm_gpu_memory_utilization: float = _of(0.9, "Share of the GPU's memory for both models and their caches.")
    vllm_max_model_length: int | None = _of(None, "Longest prompt and completion together, in tokens, of either side.")
    engine_kwargs: dict[str, Any] | str | None = _of(None, "Any vLLM engine arguments, for both sides (JSON as a flag).")
    teacher_engine_kwargs: dict[str, Any] | str | None = _of(None, "vLLM engine arguments of the teacher only.")
    student_engine_kwargs: dict[str, Any] | str | None = _of(None, "vLLM engine arguments of the student only.")
    num_speculative_tokens: str = _of("0", SPECULATION_HELP)
    batch_size: int = _of(1024, "Completions handed to the engine at once; changes the speed, not the data.")


@dataclass(frozen=True, kw_only=True)
class Servers:
    _argument_group_name = "servers"

    server: str | None = _of(
        None,
        "URLs of `osd serve` processes to sample through, with commas between them: http://a:8000,http://b:8000. They share "
        "the work. Default: an engine in this process.",
    )
    api_key: str | None = _of(None, "The servers' API key. Default: the environment variable VLLM_API_KEY.")
    server_concurrency: int = _of(256, "Requests in flight per server.")
    server_timeout: float = _of(600.0, "Longest wait for one completion, in seconds.")
    server_wait: float = _of(600.0, "How long to wait while no server answers before the run ends, in seconds.")

    def server_urls(self) -> list[str]:
        """Return the servers' URLs, without a path; none without `server`.

        Raises:
            ValueError: a URL that is not http:// or https://, or is given twice.
        """
        urls = [] if self.server is None else [url.strip().rstrip("/").removesuffix("/v1") for url in self.server.split(",")]
        for url in urls:
            if not re.fullmatch(r"https?://[^/\s]+", url):
                raise ValueError(f"server: {url!r} is not a URL such as http://localhost:8000")
            if urls.count(url) > 1:
                raise ValueError(f"server: {url} is given twice")
        return urls


@dataclass(frozen=True, kw_only=True)
class Terminal:
    _argument_group_name = "terminal"

    quiet: bool = _of(False, "Print errors only.")
    dry_run: bool = _of(False, "Print the prompts of both sides for the first rows and stop; loads no weights.")


@dataclass(frozen=True, kw_only=True)
class Output:
    _argument_group_name = "files and processes"

    format: str = _of("parquet", "parquet or jsonl.")
    shard_size: int = _of(1024, "Samples per file; a killed run loses at most these.")
    resume: bool = _of(False, "Go on with a run that was interrupted, in the same output folder and with the same settings.")
    shard: str | None = _of(
        None, "i/n: do part i (from 0) of n of the work. Default: the process's place under `accelerate launch`, or all of it."
    )
    push_to_hub: bool = _of(False, "Upload the data to the Hub when every process has finished; needs hub_dataset_id.")
    hub_dataset_id: str | None = _of(None, "Dataset of the Hub to upload to, user/name; made private if it is new.")


@dataclass(frozen=True, kw_only=True)
class Filters:
    _argument_group_name = "filters (what they remove is counted)"

    filter_min_tokens: int | None = _of(None, "Remove completions of fewer tokens.")
    filter_finish_reasons: list[str] | None = _of(None, "Keep only these finish reasons: stop, length.")
    filter_answer: str | None = _of(
        None,
        "match: keep completions that answer_match calls right; contains: keep those in which the reference answer occurs.",
    )
    filter_max_kl: float | None = _of(None, "Remove completions whose mean KL(q*‖π_θ) per token is above this, in nats.")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    _argument_group_name = "comparison"

    linear_weights: list[float] = _of([0.25, 0.5, 0.75], "Teacher's weights of the linear mixtures to compare with.")


def as_mapping(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return the value of a mapping field; JSON was parsed with the flags."""
    assert not isinstance(value, str), "check_types refuses it"
    return dict(value or {})
