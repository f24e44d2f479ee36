"""Settings of `osd generate` and `osd compare`, checked.

Nothing here imports torch, vLLM or TRL: `osd generate --help` is quick, and a wrong setting is refused before a model loads.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

from osd.core import speculative_tokens
from osd.data import grading
from osd.data.hints import check_types
from osd.data.option_groups import (
    Comparison,
    Data,
    Engine,
    Filters,
    Mixing,
    Models,
    Output,
    Prompts,
    Sampling,
    Servers,
    Terminal,
    as_mapping,
)
from osd.prompt_checks import check_template_kwargs
from osd.prompts import template_fields
from osd.sampling_args import DATA_COMMANDS, FIELDS, checked_fields

FORMATS = ("parquet", "jsonl")
ANSWER_FILTERS = ("contains", "match")
FINISH_REASONS = ("stop", "length")

# Settings that may change between the runs that make one data set: they change places, speed and output on the terminal only.
FREE = frozenset(
    {"input", "dataset_name", "dataset_config", "dataset_train_split", "output", "resume", "shard", "batch_size"}
    | {"vllm_gpu_memory_utilization", "quiet", "dry_run", "push_to_hub", "hub_dataset_id"}
    | {"server", "api_key", "server_concurrency", "server_timeout", "server_wait"}
)


@dataclass(frozen=True, kw_only=True)
class _Run(Models, Data, Prompts, Mixing, Sampling, Engine, Terminal):
    """Settings of both commands.

    Raises:
        ValueError: on construction, before a model loads; names the field, the value and the fix.
    """

    def __post_init__(self) -> None:
        check_types(self)
        for name, what in (
            ("model_name_or_path", "the student's path or model id"),
            ("teacher_model_name_or_path", "the teacher's path or model id"),
            ("output", "the folder to write to"),
        ):
            if not getattr(self, name) and not (self.dry_run and name == "output"):
                raise ValueError(f"{name} is not set; give {what}")
        if not (self.input or self.dataset_name):
            raise ValueError("input is not set; give a file, a folder or a dataset to read the prompts from")
        self._check_numbers()
        self._check_prompts()
        self.mixing()
        grading.matcher(self.answer_match)
        own = {name: getattr(self, name) for name in FIELDS}
        checked_fields(own, as_mapping(self.generation_kwargs), refused=DATA_COMMANDS)

    def _check_numbers(self) -> None:
        for name in ("num_samples", "max_completion_length", "batch_size", "limit", "vllm_max_model_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization={self.vllm_gpu_memory_utilization!r} must be a share in (0, 1], such as 0.9"
            )
        if not 0 <= self.seed < 2**32:  # what NumPy takes, which vLLM seeds too
            raise ValueError(f"seed={self.seed!r} is not a whole number from 0 to {2**32 - 1}")
        self._check_room()

    def _check_room(self) -> None:
        longest, most = self.pair_kwargs()["engine_kwargs"].get("max_model_len"), self.sampling()["max_tokens"]
        if isinstance(longest, int) and isinstance(most, int) and most >= longest > 0:
            raise ValueError(
                f"max_completion_length={most} leaves no room for a prompt in vllm_max_model_length={longest}; "
                "lower the first or raise the second"
            )

    def _check_prompts(self) -> None:
        if self.teacher_templates is not None and self.privileged_template is not None:
            raise ValueError(
                "teacher_templates and privileged_template are both set; remove one (teacher_templates takes several templates)"
            )
        for name in ("teacher_templates", "privileged_template", "student_template"):
            given = getattr(self, name)
            if given == []:
                raise ValueError(f"{name}=[] has no template; write one or remove the key")
            for template in given if isinstance(given, list) else [] if given is None else [given]:
                if not template.strip():
                    raise ValueError(f"{name}: {template!r} is empty; write {{prompt}} for the prompt itself")
                template_fields(template)
        check_template_kwargs(as_mapping(self.chat_template_kwargs))
        for name in as_mapping(self.columns):
            if not name.isidentifier():
                raise ValueError(f"columns: {name!r} cannot be a template field; use letters, digits and underscores")

    def pair_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `PairConfig` other than the models and the mixing."""
        engine: dict[str, Any] = {"gpu_memory_utilization": self.vllm_gpu_memory_utilization}
        engine |= {"trust_remote_code": self.trust_remote_code, "seed": self.seed}
        if self.vllm_max_model_length is not None:
            engine["max_model_len"] = self.vllm_max_model_length
        return {
            "engine_kwargs": engine | as_mapping(self.engine_kwargs),
            "teacher_kwargs": _revision(self.teacher_model_revision) | as_mapping(self.teacher_engine_kwargs),
            "student_kwargs": _revision(self.model_revision) | as_mapping(self.student_engine_kwargs),
            "num_speculative_tokens": speculative_tokens(self.num_speculative_tokens),
        }

    def tensor_parallel_size(self) -> int:
        """Return the number of GPUs of one pair."""
        return int(self.pair_kwargs()["engine_kwargs"].get("tensor_parallel_size", 1))

    def source(self) -> str:
        """Return what to read: the input, or training's dataset."""
        return self.input or self.dataset_name or ""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(_Run, Output, Filters, Servers):
    """Settings of `osd generate`."""

    groups = (Models, Data, Prompts, Mixing, Sampling, Filters, Output, Engine, Servers, Terminal)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("format", self.format, FORMATS)
        self._check_filters()
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size!r} must be at least 1")
        if self.shard is not None:
            parse_shard(self.shard)
        self._check_upload()
        self._check_servers()

    def _check_upload(self) -> None:
        if not self.push_to_hub:
            return
        if not self.hub_dataset_id:
            raise ValueError(
                "push_to_hub=True needs hub_dataset_id: set it to user/name, or set push_to_hub: false under `generate:`"
            )
        from huggingface_hub import get_token

        if not get_token():
            raise ValueError("push_to_hub=True needs a token: set HF_TOKEN, or run `hf auth login`")

    def _check_servers(self) -> None:
        for name in ("server_concurrency", "server_timeout", "server_wait"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be more than 0")
        if not self.server_urls():
            return
        for name in ("vllm_max_model_length", "engine_kwargs", "teacher_engine_kwargs", "student_engine_kwargs"):
            if getattr(self, name):
                warnings.warn(f"{name} has no effect with server, whose engine is running already", stacklevel=5)

    def _check_room(self) -> None:
        if not self.server_urls():  # a server has its own context
            super()._check_room()

    def _check_filters(self) -> None:
        """Refuse filters that no completion can pass."""
        _check_choice("filter_answer", self.filter_answer, (None, *ANSWER_FILTERS))
        if self.filter_answer and not self.answer_column:
            raise ValueError(f"filter_answer={self.filter_answer!r} needs the reference answer; set answer_column")
        if self.filter_finish_reasons == []:
            raise ValueError("filter_finish_reasons=[] would remove everything; name stop or length, or remove the key")
        for reason in self.filter_finish_reasons or ():
            _check_choice("filter_finish_reasons", reason, FINISH_REASONS)
        if self.filter_max_kl is not None and not self.filter_max_kl >= 0:
            raise ValueError(f"filter_max_kl={self.filter_max_kl!r} would remove everything; a divergence is 0 or more")
        least, most = self.filter_min_tokens, self.sampling()["max_tokens"]
        if least is not None and isinstance(most, int) and not 0 <= least <= most:
            raise ValueError(f"filter_min_tokens={least!r} is not from 0 to max_completion_length={most}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(_Run, Comparison):
    """Settings of `osd compare`."""

    groups = (Models, Data, Prompts, Mixing, Sampling, Comparison, Engine, Terminal)

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in self.linear_weights:
            if not 0 < weight < 1:
                raise ValueError(f"linear_weights: {weight!r} is not between 0 (the student) and 1 (the teacher)")
        if self.mixture != "geometric":
            raise ValueError("mixture='linear' would compare the linear mixture with itself; leave it geometric")


def parse_shard(given: str) -> tuple[int, int]:
    """Parse "i/n", the place of a process with i from 0.

    Raises:
        ValueError: any other form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"shard={given!r} is not i/n with i from 0 to n-1; the first of four processes is 0/4")
    return int(found[1]), int(found[2])


def _revision(revision: str | None) -> dict[str, Any]:
    return {} if revision is None else {"revision": revision}


def _check_choice(name: str, given: Any, known: tuple[Any, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name}={given!r} is unknown; use {' or '.join(str(k) for k in known if k is not None)}")
