"""Checks on the two models that need no weights: files, tokenizers, architectures that cannot be sampled or synced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion  # not public

from osd.engine.multimodal import is_multimodal, text_name

if TYPE_CHECKING:
    from osd.engine.config import PairConfig

# The number of experts in a configuration of transformers; 0, 1 or absent in a dense model.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
# Ends of the names of classes that have no distribution over tokens.
_NOT_GENERATIVE = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "RewardModel")


@dataclass(frozen=True, kw_only=True)
class StudentLayout:
    """The parameters of the engine's student.

    Attributes:
        shapes: of every parameter, by its name in transformers (a shared one under its first name).
        on_disk: the names in a checkpoint, which vLLM reads, by the name in transformers: several for a parameter that joins
            them (all experts of a layer); without the encoders' weights of a multimodal model, which its engine does not have.
        model: the student without weights.
    """

    shapes: dict[str, torch.Size]
    on_disk: dict[str, tuple[str, ...]]
    model: Any

    def as_on_disk(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a parameter as it is in a checkpoint, by name; empty if the engine does not have it."""
        names = self.on_disk.get(name, ())
        if len(names) < 2:
            return dict.fromkeys(names, tensor)
        return revert_weight_conversion(self.model, {name: tensor})


def check_models(config: PairConfig) -> None:
    """Raise before any weights load if the pair cannot sample.

    Raises:
        ValueError: a model that cannot be found, that vLLM does not have, or that ``tensor_parallel_size`` ranks cannot share;
            a student with experts beside a dense teacher; or tokenizers that differ (naming the first id that does).
            Vocabularies padded to different sizes are fine: ids beyond the shared ones are never drawn.
    """
    teacher, student = (_config(config, side) for side in ("teacher", "student"))
    for side, found in (("teacher", teacher), ("student", student)):
        _check_implemented(side, getattr(config, side), found, config.side_kwargs(side))
        _check_heads(side, getattr(config, side), found, config.engine_kwargs.get("tensor_parallel_size", 1))
    if experts(student) and not experts(teacher):
        raise ValueError(
            f"student={config.student!r} is a mixture of experts ({experts(student)} of them) and teacher={config.teacher!r} "
            "is dense: vLLM prepares for experts by the teacher's configuration alone. Use a dense student, or, to sample "
            "without training, a teacher with experts"
        )
    if any(config.side_kwargs(side).get("skip_tokenizer_init") for side in ("teacher", "student")):
        return  # the caller works in token ids, and vouches that they mean the same to both
    check_same_ids(*(load_tokenizer(config, side).get_vocab() for side in ("teacher", "student")))


def load_tokenizer(config: PairConfig, side: str) -> Any:
    """Return the tokenizer of "teacher" or "student" as transformers loads it, with that side's own chat template.

    vLLM's own is a wrapper, on which setting `chat_template` has no effect.

    Raises:
        ValueError: a tokenizer that cannot be found.
    """
    return _load(AutoTokenizer, config, side)


def _check_heads(side: str, model: str, found: Any, ranks: Any) -> None:
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(
            f"tensor_parallel_size={ranks!r} (in training vllm_tensor_parallel_size) is not a number of ranks; use 1 or more"
        )
    heads = getattr(found.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % ranks:
        raise ValueError(
            f"tensor_parallel_size={ranks} does not divide the {heads} attention heads of {side}={model!r}; use a divisor of "
            "both models' numbers of heads"
        )


def check_student_can_train(config: PairConfig) -> StudentLayout | None:
    """Raise before any weights load if a trained student could not be synced into this pair; return its parameters.

    Returns:
        None if they cannot be known: the engine arguments change the architecture, or transformers cannot build it.

    Raises:
        ValueError: a gpt-oss, a student with latent attention, a quantized one, or one whose weights transformers rearranges
            when it loads them, other than joining several into one (experts, convolutions).
    """
    student, kwargs = _config(config, "student"), config.side_kwargs("student")
    if student.model_type == "gpt_oss":
        raise ValueError(
            f"student={config.student!r} is a gpt-oss: vLLM loads its experts only once, so a sync would leave them as they "
            "were. Train another student (the teacher may be a gpt-oss)"
        )
    if getattr(student.get_text_config(), "kv_lora_rank", None):
        raise ValueError(
            f"student={config.student!r} has latent attention (MLA): vLLM derives matrices from its weights when it loads "
            "them, and a sync would leave those as they were. Train another student (the teacher may have latent attention)"
        )
    quantization = kwargs.get("quantization") or getattr(student, "quantization_config", None)
    if quantization or kwargs.get("load_format") in ("bitsandbytes", "gguf"):
        raise ValueError(
            f"student={config.student!r} is quantized ({quantization or kwargs['load_format']}): every sync replaces its "
            "weights by the trained ones, which are not. Start from the unquantized checkpoint and quantize the trained student"
        )
    layout = student_layout(config)
    if layout is None and experts(student):
        raise ValueError(
            f"student={config.student!r} is a mixture of experts, whose names in a checkpoint are not known with hf_overrides "
            "or without a class in transformers; save the changed model and train that"
        )
    return layout


def student_layout(config: PairConfig) -> StudentLayout | None:
    """Build the student without weights, for its parameters; see :func:`check_student_can_train`."""
    model = model_without_weights(config, "student")
    if model is None:
        return None
    return StudentLayout(
        shapes={name: parameter.shape for name, parameter in model.named_parameters()},
        on_disk=_names_on_disk(model, config.student),
        model=model,
    )


def model_without_weights(config: PairConfig, side: str) -> Any | None:
    """Build the model of "teacher" or "student" on torch's meta device.

    Returns:
        None if the engine arguments change the architecture, or transformers has no causal language model of it.
    """
    from transformers.modeling_utils import set_zero3_state  # not public

    kwargs = config.side_kwargs(side)
    if kwargs.get("hf_overrides"):
        return None
    trust, found = kwargs.get("trust_remote_code", False), _config(config, side)
    try:
        with torch.device("meta"), set_zero3_state():  # ZeRO-3 would shard and initialize it
            if is_multimodal(found) and (whole := getattr(transformers, (found.architectures or [""])[0], None)):
                return whole(found)  # TRL trains this class; AutoModelForCausalLM may be the language model alone
            return AutoModelForCausalLM.from_config(found, trust_remote_code=trust)
    except ValueError:  # no causal language model of this configuration; vLLM may know one
        return None


def _names_on_disk(model: Any, student: str) -> dict[str, tuple[str, ...]]:
    parameters = dict(model.named_parameters())
    saved = revert_weight_conversion(model, parameters)
    names = {id(tensor): name for name, tensor in saved.items()}
    on_disk: dict[str, tuple[str, ...]] = {name: (names[id(p)],) for name, p in parameters.items() if id(p) in names}
    rearranged = parameters.keys() - on_disk.keys()
    for name in rearranged:
        alone = revert_weight_conversion(model, {name: parameters[name]})
        if len(alone) > 1 and all(part in saved and saved[part].shape == tensor.shape for part, tensor in alone.items()):
            on_disk[name] = tuple(alone)
    if unknown := sorted(rearranged - on_disk.keys()):
        raise ValueError(
            f"student={student!r} ({type(model).__name__}): transformers rearranges {len(unknown)} of its weights when it "
            f"loads them ({unknown[0]}, ...), and vLLM reads them as they are in the checkpoint. OSD cannot sync this "
            "architecture; train another student"
        )
    if not is_multimodal(model.config):
        return on_disk
    return {name: stored for name, stored in on_disk.items() if text_name(stored[0]) is not None}


def shared_vocabulary(config: PairConfig) -> int:
    """Return the number of token ids that both models have logits for."""
    return min(_config(config, side).get_text_config().vocab_size for side in ("teacher", "student"))


def end_ids(config: PairConfig) -> list[int]:
    """Return every token id that ends a completion: those that the student's files declare, then those of the teacher's."""
    ends = [*declared_ends(config, "student"), *declared_ends(config, "teacher")]
    if not config.side_kwargs("teacher").get("skip_tokenizer_init"):  # vLLM stops at this one too, whatever the model declares
        ends.append(load_tokenizer(config, "teacher").eos_token_id)
    return [i for i in dict.fromkeys(ends) if i is not None]


def declared_ends(config: PairConfig, side: str) -> list[int]:
    """Return the token ids that end a completion by the files of "teacher" or "student"."""
    declared = getattr(load_generation_config(config, side), "eos_token_id", None)
    if declared is None:
        declared = getattr(_config(config, side).get_text_config(), "eos_token_id", None)
    return [declared] if isinstance(declared, int) else list(declared or [])


def load_generation_config(config: PairConfig, side: str) -> GenerationConfig | None:
    """Return the generation_config.json of "teacher" or "student", or None where there is none."""
    options = {key: value for key, value in config.side_kwargs(side).items() if key in ("revision", "trust_remote_code")}
    try:
        return GenerationConfig.from_pretrained(getattr(config, side), **options)
    except OSError:
        return None


def experts_of(config: PairConfig, side: str) -> int:
    """Return the number of experts of "teacher" or "student"; 0 if it is dense."""
    return experts(_config(config, side))


def experts(config: Any) -> int:
    """Return the number of experts of a model with this (transformers) configuration; 0 for a dense one."""
    text = config.get_text_config()
    if text.model_type == "nemotron_h" and "moe" not in text.layers_block_type:
        return 0  # its configuration declares experts whether a layer has them or not
    counts = [getattr(text, name, None) or 0 for name in _EXPERTS]
    most = max(max(count) if isinstance(count, (list, tuple)) else count for count in counts)
    return most if most > 1 else 0


def _check_implemented(side: str, model: str, config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse an architecture that vLLM does not have and cannot run from its transformers code."""
    from osd.engine.backend.configuration import supported_architectures

    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list):
        raise ValueError(f"{side}={model!r}: architectures={names!r} in config.json is no list; write [{names!r}]")
    if unfit := [name for name in names if name.endswith(_NOT_GENERATIVE)]:
        raise ValueError(
            f"{side}={model!r} is a {unfit[0]}, which has no distribution over tokens; use a causal language model"
        )
    if not names or set(names) & supported_architectures():
        return
    if (code := getattr(config, "auto_map", None)) and "AutoModel" not in code:
        raise ValueError(
            f"{side}={model!r}: vLLM has no {names[0]} of its own, and loads remote code as an AutoModel, which auto_map in "
            "config.json does not name; add the class of the model without its output layer there"
        )
    if not code and not hasattr(transformers, names[0]):
        raise ValueError(
            f"{side}={model!r}: neither vLLM nor transformers {transformers.__version__} has the class {names[0]} that "
            "config.json names as its architecture; correct the name, or use a model that one of them has"
        )
    if kwargs.get("model_impl") == "vllm":
        raise ValueError(
            f"{side}={model!r}: vLLM has no {names[0]} of its own, and model_impl='vllm' allows nothing else; set "
            "vllm_model_impl='auto' (in engine_kwargs: model_impl='auto') to run the model's transformers code in vLLM"
        )


def _config(config: PairConfig, side: str) -> Any:
    return _load(AutoConfig, config, side)


def _load(auto_class: Any, config: PairConfig, side: str) -> Any:
    kwargs, model = config.side_kwargs(side), getattr(config, side)
    name = (kwargs.get("tokenizer") if auto_class is AutoTokenizer else None) or model
    if not str(name).strip():
        raise ValueError(
            f"{side}={name!r}: the path is empty. Give a folder or the id of a model; a model made in memory has none, so call "
            "save_pretrained(folder) for it and its tokenizer, and pass the folder (or set model.name_or_path to it)"
        )
    if str(name).startswith(("/", "./", "../", "~")) and not Path(name).exists():
        raise ValueError(
            f"{side}={name!r}: the folder does not exist. Give a folder with config.json, weights and tokenizer, or the id of "
            "a model that can be downloaded"
        )
    options = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        what = "tokenizer" if auto_class is AutoTokenizer else "config.json"
        raise ValueError(
            f"{side} model {name!r}: no {what} could be loaded ({str(error).splitlines()[0]}). Give a folder with "
            "config.json, weights and tokenizer, or the id of a model that can be downloaded."
        ) from error


def check_same_ids(teacher: dict[str, int], student: dict[str, int]) -> None:
    """Refuse two vocabularies (token -> id) that give an id different meanings.

    Raises:
        ValueError: naming the first id that differs and what it is on each side.
    """
    if teacher == student:
        return
    by_id = [{token_id: token for token, token_id in vocabulary.items()} for vocabulary in (teacher, student)]
    first = min(i for i in by_id[0].keys() | by_id[1].keys() if by_id[0].get(i) != by_id[1].get(i))
    raise ValueError(
        f"teacher and student have different tokenizers: id {first} is {by_id[0].get(first)!r} to the teacher and "
        f"{by_id[1].get(first)!r} to the student. q* mixes the two distributions id by id, so both need the same tokenizer."
    )
