"""Findings about a pair before anything loads: does it sample and train, what memory it needs, settings to start from.

Configurations, tokenizers and sizes of files are read; no weights. `osd check` prints :meth:`Report.lines`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from osd.core import speculative_tokens
from osd.engine.config import PairConfig, largest_number
from osd.engine.multimodal import text_parameters
from osd.validate_models import (
    check_models,
    check_student_can_train,
    declared_ends,
    end_ids,
    experts_of,
    load_generation_config,
    load_tokenizer,
    model_without_weights,
)
from osd.weight_files import check_weights

if TYPE_CHECKING:
    from osd.engine.backend.layers import ModelFacts

SIDES = ("teacher", "student")
UTILIZATION = 0.9  # default share of the GPU's memory of every entry
DEFAULT_LENGTH = 4096
# In float32, in which TRL loads a student: weight 4, gradient 4, two AdamW states 8.
TRAINING_BYTES = 16
# Sampling defaults that a generation_config.json may declare, and the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The use that a pair is checked for.

    Attributes:
        max_model_len: longest prompt and completion together, in tokens; None: 4096, or the models' own limit if it is lower.
        max_num_seqs: requests at once.
        gpus: GPUs of one engine, under tensor parallelism.
        gpu_memory: of each GPU, in bytes.
        dtype: of the engine's weights, as vLLM names it.
        num_speculative_tokens: how many tokens the student drafts, or "auto"; see :class:`osd.PairConfig`.
        trust_remote_code: run code that comes with a model.

    Raises:
        ValueError: a number below 1; a number of drafts out of range.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    gpus: int = 1
    gpu_memory: float = 80 * 2**30
    dtype: str = "auto"
    num_speculative_tokens: int | str = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_speculative_tokens", speculative_tokens(self.num_speculative_tokens))
        for name in ("max_model_len", "max_num_seqs", "gpus"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if not 0 < self.gpu_memory < float("inf"):
            raise ValueError(f"gpu_memory={self.gpu_memory / 2**30:g} must be above 0, in GiB of one GPU")

    def engine_kwargs(self) -> dict[str, Any]:
        """Return the vLLM engine arguments that say the same, without the length."""
        kwargs: dict[str, Any] = {"max_num_seqs": self.max_num_seqs}
        if self.gpus > 1:
            kwargs["tensor_parallel_size"] = self.gpus
        return kwargs if self.dtype == "auto" else {"dtype": self.dtype, **kwargs}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model of the pair.

    Attributes:
        facts: what vLLM makes of its configuration.
        experts: in a layer; 0 if the model is dense.
        parameters: number of parameters, of a multimodal model those of its language model; None: transformers cannot build it.
        weights: bytes of all weights in the engine, over all GPUs; None: unknown.
        ends: token ids that end a completion by its files.
        template: its chat template, or None.
        defaults: sampling defaults of its generation_config.json that are not neutral.
        states: how many copies of each recurrent state a request has: one, and with a student that drafts one per draft.
    """

    facts: ModelFacts
    experts: int
    parameters: int | None
    weights: int | None
    ends: list[int]
    template: Any
    defaults: dict[str, Any]
    states: int = 1

    def request_bytes(self, length: int) -> int | None:
        """Return the bytes of cache of one request of ``length`` tokens, on one GPU."""
        if self.facts.layers is None:
            return None
        return sum(
            layer.request_bytes(length) * (self.states if layer.kind == "recurrent state" else 1) for layer in self.facts.layers
        )

    def growing(self) -> int:
        """Return the bytes of cache on one GPU that each token of a request adds: those of layers that keep all tokens."""
        return sum(layer.size for layer in self.facts.layers or () if layer.kind != "recurrent state" and not layer.tokens)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Findings about a pair.

    Attributes:
        teacher, student: as they were given.
        wanted: what the pair is to be used for.
        sides: "teacher" and "student"; without one whose configuration cannot be read.
        ends: every token id that ends a completion.
        sampling, training: why the pair cannot be sampled, and why the student cannot be trained; empty if it can.
    """

    teacher: str
    student: str
    wanted: Wanted
    sides: dict[str, Side]
    ends: list[int]
    sampling: str
    training: str

    @property
    def status(self) -> int:
        """The exit status: 0 if the pair samples and trains, 1 if it does not sample, 3 if only training is refused."""
        return 1 if self.sampling else 3 if self.training else 0

    @property
    def length(self) -> int:
        """The longest sequence that the memory is computed for, in tokens."""
        return self.wanted.max_model_len or min(DEFAULT_LENGTH, *(side.facts.context for side in self.sides.values()))

    def needed(self) -> tuple[float, int] | None:
        """Return the bytes of both sides' weights, and of one request's caches, on one GPU; None if one is unknown."""
        weights = request = 0
        for side in self.sides.values():
            caches = side.request_bytes(self.length)
            if side.weights is None or caches is None:
                return None
            weights, request = weights + side.weights, request + caches
        return weights / self.wanted.gpus, request

    def lines(self) -> Iterator[str]:
        """Yield one finding per line, then a YAML file to start from if the pair can be sampled."""
        training = self.training or (self.sampling and "the pair cannot be sampled")
        yield f"sampling: {f'no: {self.sampling}' if self.sampling else 'yes'}"
        yield f"training: {f'no: {training}' if training else 'yes'}"
        no_drafts = _no_drafts(self.sides) or (self.sampling and "the pair cannot be sampled")
        yield f"drafts: {f'no: {no_drafts}' if no_drafts else 'yes'}"
        for name, side in self.sides.items():
            yield f"{name}: {_model(getattr(self, name), side)}"
            if side.facts.refused_here:
                yield f"{name}: not on this machine: {side.facts.refused_here}"
        if len(self.sides) == len(SIDES):
            yield from self._memory()
            yield from self._settings()
        if not self.sampling:
            yield from ("", *self.snippet().splitlines())

    def _memory(self) -> Iterator[str]:
        length, needed = self.length, self.needed()
        yield "memory: computed from the configurations, not measured; activations and CUDA graphs come on top"
        for name, side in self.sides.items():
            yield f"memory, {name}: {_weights(side)}; {_cache(side, length)}"
        if needed is not None:
            yield from self._both(*needed)
        if count := self.sides["student"].parameters:
            yield (
                f"memory, training: {size(TRAINING_BYTES * count)} for the student's weights, gradients and AdamW states in "
                f"float32 ({TRAINING_BYTES} bytes per parameter), in every process; FSDP2 and ZeRO-3 share it between them"
            )

    def _both(self, weights: float, request: int) -> Iterator[str]:
        wanted, caches = self.wanted, self.wanted.max_num_seqs * request
        usable = UTILIZATION * wanted.gpu_memory
        yield (
            f"memory, both, on each of {wanted.gpus} GPU{'s' * (wanted.gpus > 1)}: weights {size(weights)} + "
            f"{wanted.max_num_seqs} requests of {self.length} tokens {size(caches)} = {size(weights + caches)}, of "
            f"{size(usable)} ({UTILIZATION:g} of {size(wanted.gpu_memory)})"
        )
        left = usable - weights - caches
        if weights >= usable:
            yield "memory, both: the weights alone do not fit; use more GPUs, a quantized teacher or smaller models"
        elif left < 0:
            yield f"memory, both: {size(-left)} short; {int((usable - weights) // request)} such requests fit, the others wait"
        else:
            yield f"memory, both: {size(left)} left on each GPU"

    def _settings(self) -> Iterator[str]:
        teacher, student = self.sides["teacher"], self.sides["student"]
        yield f"context: {teacher.facts.context} tokens of the teacher, {student.facts.context} of the student"
        ends = f"; any of {self.ends} ends it" if self.ends else ""
        yield f"end of a completion: ids {teacher.ends} by the teacher's files, {student.ends} by the student's{ends}"
        yield f"chat templates: {_templates(teacher.template, student.template)}"
        for name, side in self.sides.items():
            found = ", ".join(f"{key}={value}" for key, value in side.defaults.items())
            yield f"sampling defaults of the {name}'s generation_config.json: " + (
                f"{found}; OSD ignores them (of that file it uses eos_token_id alone): set what you want"
                if found
                else "none that would change sampling"
            )

    def snippet(self) -> str:
        """Return a YAML file of settings for `osd generate`, `osd compare` and `osd train`."""
        settings: dict[str, Any] = {"model_name_or_path": self.student, "teacher_model_name_or_path": self.teacher}
        if all(side.template for side in self.sides.values()):
            settings["enable_chat_template"] = True
        if self.wanted.trust_remote_code:
            settings["trust_remote_code"] = True
        if self.wanted.num_speculative_tokens:
            settings["num_speculative_tokens"] = self.wanted.num_speculative_tokens
        settings |= {"vllm_max_model_length": self.length, "engine_kwargs": self.wanted.engine_kwargs()}
        lines = [
            f"# {key}: {value}  # the {name}'s own default, which OSD ignores"
            for name, side in self.sides.items()
            for key, value in side.defaults.items()
        ]
        text = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
        return "\n".join(["# settings to start from; every osd command reads them with --config FILE", text.rstrip(), *lines])


def check(teacher: str, student: str, wanted: Wanted) -> Report:
    """Collect the findings about a pair of models, each a path or an id; loads no weights.

    What is refused is in the report.
    """
    kwargs = {**wanted.engine_kwargs(), "trust_remote_code": wanted.trust_remote_code}
    config = PairConfig(teacher=teacher, student=student, engine_kwargs=kwargs)
    (_, sampling), (layout, training) = _tried(check_models, config), _tried(check_student_can_train, config)
    sampling = sampling or _tried(check_weights, config)[1]
    built = {"student": layout.model} if layout else {}
    sides: dict[str, Side] = {}
    for name in SIDES:
        try:
            sides[name] = _side(config, name, wanted, built.get(name))
        except (ValueError, OSError) as error:
            why = f"{name}={getattr(config, name)!r}: vLLM does not take it on this machine ({str(error).splitlines()[0]})"
            sampling = sampling or why
    return Report(
        teacher=teacher,
        student=student,
        wanted=wanted,
        sides=sides,
        ends=[] if sampling else end_ids(config),
        sampling=sampling or _too_large(sides, wanted) or (_no_drafts(sides) if wanted.num_speculative_tokens else ""),
        training=training,
    )


def size(count: float) -> str:
    """Return a number of bytes as text, with a binary unit."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.{0 if units[0] == 'bytes' else 1}f} {units[0]}"


def stored_bytes(model: str, revision: str | None = None) -> int | None:
    """Return the bytes of a checkpoint's safetensors files, a folder's or the Hub's; None if there are none to see."""
    folder = Path(model)
    if folder.is_dir():
        # Mistral's consolidated.safetensors are the same weights a second time.
        files = [path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")]
        return sum(path.stat().st_size for path in files) or None
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(model, revision=revision).files_metadata.values()
    except Exception:  # of the Hub or of the network: the size stays unknown
        return None
    return sum(max(tensor.data_offsets[1] for tensor in file.tensors.values()) for file in found)


def _side(config: PairConfig, name: str, wanted: Wanted, model: Any | None) -> Side:
    from osd.engine.backend.layers import model_facts

    if model is None:
        model = model_without_weights(config, name)  # first: it says best that there is no such model
    facts = model_facts(config, name, wanted.gpus)
    parameters = None if model is None else sum(parameter.numel() for parameter in text_parameters(model))
    if facts.quantization or parameters is None:
        weights = stored_bytes(getattr(config, name), config.side_kwargs(name).get("revision"))
    else:
        weights = parameters * facts.itemsize
    return Side(
        facts=facts,
        experts=experts_of(config, name),
        parameters=parameters,
        weights=weights,
        ends=declared_ends(config, name),
        template=load_tokenizer(config, name).chat_template,
        defaults=_defaults(load_generation_config(config, name)),
        states=1 + (largest_number(wanted.num_speculative_tokens) if name == "student" else 0),
    )


def _defaults(generation: Any) -> dict[str, Any]:
    declared = {name: getattr(generation, name, None) for name in NEUTRAL}
    return {name: value for name, value in declared.items() if value is not None and value not in NEUTRAL[name]}


def _tried(check: Callable[[PairConfig], Any], config: PairConfig) -> tuple[Any, str]:
    try:
        return check(config), ""
    except ValueError as error:
        return None, str(error)


def _too_large(sides: dict[str, Side], wanted: Wanted) -> str:
    for name, side in sides.items():
        if wanted.max_model_len is not None and wanted.max_model_len > side.facts.context:
            return f"max_model_len={wanted.max_model_len} is over the {name}'s context of {side.facts.context} tokens; lower it"
    return ""


def _no_drafts(sides: dict[str, Side]) -> str:
    """Return why the student cannot draft for the teacher; empty if it can."""
    return next((side.facts.no_drafts for side in sides.values() if side.facts.no_drafts), "")


def _model(path: str, side: Side) -> str:
    facts = side.facts
    if facts.layers is None:
        caches = f"caches unknown ({facts.unknown})"
    else:
        counted = Counter((layer.kind, layer.tokens) for layer in facts.layers)
        caches = "caches: " + ", ".join(
            f"{count} x {kind}" + (f" of {tokens} tokens" if tokens else "") for (kind, tokens), count in counted.items()
        )
    experts = f"{side.experts} experts" if side.experts else "dense"
    return f"{path}: {caches}; {experts}; {facts.quantization or 'not'} quantized; computes in {facts.dtype}"


def _weights(side: Side) -> str:
    if side.weights is None:
        return "weights unknown (no safetensors files to see)"
    how = f"{side.parameters:,} parameters in {side.facts.dtype}"
    return f"weights {size(side.weights)} ({'as stored' if side.facts.quantization or side.parameters is None else how})"


def _cache(side: Side, length: int) -> str:
    request = side.request_bytes(length)
    if request is None:
        return "cache unknown"
    fixed = request - side.growing() * length
    more = f" + {size(fixed)} per request for windows and states" if fixed else ""
    return f"cache {size(side.growing())} per token{more} on each GPU: {size(request)} for {length} tokens"


def _templates(teacher: Any, student: Any) -> str:
    if not teacher and not student:
        return "missing on both sides; give student_chat_template and teacher_chat_template, or plain prompts"
    if not teacher or not student:
        missing = "student" if teacher else "teacher"
        return f"the {missing} has none; give {missing}_chat_template, or plain prompts"
    if teacher == student:
        return "the same on both sides"
    return (
        "they differ, and each side's prompts are rendered with its own; for the same text on both sides give one file as "
        "student_chat_template and teacher_chat_template"
    )
