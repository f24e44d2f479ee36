"""Validate a run before a model loads: OSDConfig's fields, dataset columns and the two models."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import regex
import torch

from osd.engine.served import WEIGHT_UPDATES, ServedPair, without_engine
from osd.prompt_checks import check_template_kwargs
from osd.prompts import privileged_template_for, template_fields
from osd.sampling_args import FIELDS, TRAINING, checked_fields
from osd.train.alpha_schedule import SHAPES
from osd.train.divergence import DIVERGENCES
from osd.train.fields import changed, check_fields, warn_beside_engine
from osd.train.importance import CORRECTIONS

if TYPE_CHECKING:
    from osd.engine.engine import PairConfig, PairEngine
    from osd.train.config import OSDConfig

TEACHER_SIGNALS = ("recorded", "topk", "recompute")
MODES = ("colocate", "server")
_SERVER_TYPES = {"vllm_server_timeout": "float", "vllm_server_port": "int", "vllm_group_port": "int"}  # TRL's fields
_KINDS = {"bool": ((bool,), "true or false"), "int": ((Integral,), "a whole number"), "float": ((Real,), "a number")}


def check(args: OSDConfig) -> None:
    """Check every field that OSD adds, reads or cannot honour.

    Raises:
        ValueError: naming the field, the value and the fix.
    """
    _types(args)
    _choices(args)
    _ranges(args)
    args.schedule()
    args.pair_kwargs()
    _sampling(args)
    _importance(args)
    check_fields(args)
    _combinations(args)
    _no_effect(args)


def _types(args: OSDConfig) -> None:
    """Check values that come from Python; the command line has converted its own."""
    from osd.train.config import OSDConfig

    for name, annotation in {**OSDConfig.__annotations__, **_SERVER_TYPES}.items():
        kind, _, none = str(annotation).partition(" | ")
        value = getattr(args, name)
        if kind not in _KINDS or (value is None and none):
            continue
        types, words = _KINDS[kind]
        if not isinstance(value, types) or isinstance(value, bool) != (kind == "bool"):
            raise ValueError(f"{name}={value!r} is not {words}{' or null' if none else ''}; correct its type")


def _choices(args: OSDConfig) -> None:
    for name, known in (
        ("teacher_signal", TEACHER_SIGNALS),
        ("divergence", DIVERGENCES),
        ("importance_correction", CORRECTIONS),
        ("vllm_mode", MODES),
        ("alpha_schedule", SHAPES),
        ("async_weight_updates", WEIGHT_UPDATES),
    ):
        if getattr(args, name) not in known:
            raise ValueError(f"{name}={getattr(args, name)!r} is unknown; use one of {', '.join(known)}")


def _ranges(args: OSDConfig) -> None:
    for name, good, fix in (
        ("skew", 0 < args.skew < 1, "use a number between 0 and 1; for the plain KL, divergence='jsd' with beta 0 or 1"),
        ("kl_clip", args.kl_clip is None or args.kl_clip > 0, "use a positive number of nats, or null for no limit"),
        ("importance_clip", args.importance_clip is None or args.importance_clip > 0, "use a positive weight, or null"),
        ("num_iterations", args.num_iterations >= 1, "use at least 1"),
        ("teacher_topk", args.teacher_topk >= 1, "use a whole number, from 1 to the size of the vocabulary"),
        ("vllm_server_timeout", 0 < args.vllm_server_timeout < math.inf, "use a positive number of seconds"),
        ("vllm_server_port", 1 <= args.vllm_server_port <= 65535, "use a port, 1 to 65535"),
        ("vllm_group_port", 1 <= args.vllm_group_port <= 65535, "use a port, 1 to 65535"),
        ("max_staleness", args.max_staleness >= 1, "use at least 1; for samples of the present weights async_generation=False"),
        ("privilege_gap_steps", args.privilege_gap_steps >= 0, "use a number of steps, or 0 for never"),
        ("privilege_gap_tokens", args.privilege_gap_tokens >= 1, "use at least 1; privilege_gap_steps=0 turns it off"),
        ("mix_tokens", args.mix_tokens is None or args.mix_tokens >= 0, "use a number of tokens, or null for all"),
        ("mix_fraction", 0 <= args.mix_fraction <= 1, "use a probability"),
        (
            "alpha_schedule_steps",
            args.alpha_schedule_steps is None or args.alpha_schedule_steps >= 1,
            "use a number of steps, or null for all",
        ),
    ):
        if not good:
            raise ValueError(f"{name}={getattr(args, name)!r} is out of range; {fix}")


def _importance(args: OSDConfig) -> None:
    sampling = {"temperature": args.temperature, **args.sampling_kwargs()}
    if args.importance_correction == "none":
        for name, older in (("num_iterations", args.num_iterations > 1), ("async_generation", args.async_generation)):
            if older:
                warnings.warn(
                    f"{name}={getattr(args, name)} without importance_correction trains on samples of older weights "
                    "as if they were new; set importance_correction to 'prefix'",
                    stacklevel=5,
                )
        return
    if sampling["temperature"] == 0:
        raise ValueError(
            f"importance_correction={args.importance_correction!r} with generation_kwargs temperature 0: greedy samples "
            "have no importance weights; sample with a temperature, or use 'none'"
        )
    cuts = {"top_p": (args.top_p, 1.0), "top_k": (args.top_k, 0), "min_p": (args.min_p or 0.0, 0.0)}
    for name, (value, off) in cuts.items():
        value = sampling.get(name, value)
        if value != off and not (name == "top_k" and value == -1):
            warnings.warn(
                f"importance_correction={args.importance_correction!r} with {name}={value!r}: tokens that {name} excludes "
                f"get no weight, so the estimate stays biased; use {name}={off!r}",
                stacklevel=5,
            )


def _no_effect(args: OSDConfig) -> None:
    skewed, corrected = args.divergence != "jsd", args.importance_correction != "none"
    for name, used, unless in (
        ("beta", not skewed, "divergence='jsd'"),
        ("skew", skewed, "divergence='skew_kl' or 'skew_reverse_kl'"),
        ("importance_clip", corrected, "importance_correction"),
        ("alpha_min_end", args.alpha_schedule != "constant", "alpha_schedule"),
        ("alpha_max_end", args.alpha_schedule != "constant", "alpha_schedule"),
        ("fixed_alpha_end", args.alpha_schedule != "constant", "alpha_schedule"),
        ("alpha_schedule_steps", args.alpha_schedule != "constant", "alpha_schedule"),
        ("privilege_gap_tokens", args.privilege_gap_steps > 0, "privilege_gap_steps"),
        ("teacher_topk", args.teacher_signal == "topk", "teacher_signal='topk'"),
        ("max_staleness", args.async_generation, "async_generation"),
        ("async_weight_updates", args.async_generation, "async_generation"),
    ):
        if not used and changed(args, name):
            warnings.warn(f"{name}={getattr(args, name)!r} has no effect without {unless}", stacklevel=5)
    bound = args.num_iterations * args.steps_ahead()
    if args.async_generation and args.max_staleness > bound:
        warnings.warn(
            f"max_staleness={args.max_staleness} with async_weight_updates={args.async_weight_updates!r} and num_iterations="
            f"{args.num_iterations} acts as {bound}; see docs/scaling.md",
            stacklevel=5,
        )
    between = args.save_steps >= 1 and args.save_steps % args.num_iterations != 0  # below 1 it is a share of the run
    if args.save_strategy == "steps" and between:
        warnings.warn(
            f"save_steps={args.save_steps} is not a multiple of num_iterations={args.num_iterations}: a run resumed between "
            "two samplings samples again, and then differs from an unbroken run; use a multiple",
            stacklevel=5,
        )


def _sampling(args: OSDConfig) -> None:
    if args.temperature <= 0:
        raise ValueError(
            f"temperature={args.temperature} divides the logits in the loss, so it must be positive; for greedy "
            'sampling set generation_kwargs: {"temperature": 0}'
        )
    if args.max_completion_length is None or args.max_completion_length < 1:
        raise ValueError(f"max_completion_length={args.max_completion_length} must be at least 1 token")
    pattern = args.vllm_structured_outputs_regex
    if pattern is not None:
        if "structured_outputs" in (args.generation_kwargs or {}):
            raise ValueError(
                f"vllm_structured_outputs_regex={pattern!r} and generation_kwargs['structured_outputs'] are set; remove one"
            )
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"vllm_structured_outputs_regex={pattern!r} is not a regular expression: {error}") from None
    checked_fields({name: getattr(args, name) for name in FIELDS}, args.sampling_kwargs(), refused=TRAINING)
    check_template_kwargs(args._mapping("chat_template_kwargs"))


def _combinations(args: OSDConfig) -> None:
    if args.vllm_enable_sleep_mode and args.vllm_mode == "server":
        raise ValueError("vllm_enable_sleep_mode=True with vllm_mode='server': a server does not sleep; leave it false")
    if args.vllm_enable_sleep_mode and not torch.cuda.is_available():
        raise ValueError("vllm_enable_sleep_mode=True needs an NVIDIA GPU, and there is none; leave it false")
    if args.async_generation and args.vllm_mode != "server":
        raise ValueError(
            f"async_generation=True with vllm_mode={args.vllm_mode!r}: an engine in the trainer's process cannot sample while "
            "it trains. Start `osd serve` on another GPU, or on the same one with a part of its memory "
            "(--gpu-memory-utilization, and weights by \"http\"), and set vllm_mode='server'"
        )
    if args.async_generation and args.max_staleness < args.num_iterations:
        raise ValueError(
            f"max_staleness={args.max_staleness} with async_generation and num_iterations={args.num_iterations}: the next "
            f"batch is drawn {args.num_iterations} optimizer updates before it is trained on. Set max_staleness to at least "
            f"{args.num_iterations}, or lower num_iterations"
        )
    if args.teacher_signal != "recompute" and args.teacher_init_kwargs():
        raise ValueError(
            f"teacher_model_init_kwargs={args.teacher_model_init_kwargs!r} cannot be used: no transformers teacher is "
            "loaded; use teacher_engine_kwargs, or teacher_signal='recompute'"
        )
    sampled = args.sampling_kwargs().get("temperature", args.temperature) or 1.0  # a greedy record is that of temperature 1
    if args.teacher_signal == "topk" and sampled != args.temperature:
        raise ValueError(
            f"teacher_signal='topk' with temperature={args.temperature} and generation_kwargs temperature="
            f"{args.sampling_kwargs()['temperature']}: log-probabilities of temperature {sampled:g} are recorded, and the loss "
            f"is of another; set temperature={sampled:g}, or teacher_signal='recorded'"
        )
    if args.privileged_template is not None:
        template_fields(args.privileged_template)


def refuse_unsupported(model: Any, args: OSDConfig, *, tools: Any, quantization_config: Any) -> None:
    """Refuse features of TRL's trainer that OSDTrainer does not have.

    Raises:
        ValueError: tools; a quantized student.
    """
    if tools:
        names = [getattr(tool, "__name__", tool) for tool in tools]
        raise ValueError(
            f"tools={names!r} are not supported: a tool's answer would re-enter generation without the teacher's prompt. "
            "Train without tools, or use TRL's DistillationTrainer"
        )
    given = {
        "quantization_config": quantization_config,
        **{f"model_init_kwargs[{name!r}]": value for name, value in args.student_init_kwargs().items() if name in _QUANTIZED},
        "model": None if isinstance(model, str) else getattr(model, "hf_quantizer", None),
    }
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name}: a quantized student is not supported, because its weights are copied into its engine at every step. "
                "Load it unquantized, with peft_config (LoRA) to save memory"
            )


_QUANTIZED = ("quantization_config", "load_in_4bit", "load_in_8bit")


def check_adapter(model: Any, peft_config: Any) -> None:
    """Refuse kinds of adapters that this trainer cannot train.

    Raises:
        ValueError: AdaLoRA, whose schedule nothing drives; prompt tuning and the like, which change no weights.
    """
    given = [peft_config] if peft_config is not None else list(getattr(model, "peft_config", {}).values())
    for config in given:
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind == "ADALORA":
            raise ValueError(
                "peft_config is AdaLoRA: no trainer of TRL calls its update_and_allocate(), so its ranks would stay as they "
                "begin; use LoraConfig (rank_pattern sets ranks by layer)"
            )
        if config.is_prompt_learning:
            raise ValueError(
                f"peft_config is {kind}: its virtual tokens are no part of the student's weights, and the engine would sample "
                "without them; use LoraConfig"
            )


def check_datasets(train_dataset: Any, eval_dataset: Any, template: str | None) -> None:
    """Check the columns of every dataset against the privileged template.

    Raises:
        ValueError: as :func:`osd.prompts.privileged_template_for`.
    """
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    for dataset in (train_dataset, *evaluated):
        columns = _columns(dataset)
        if columns is None:
            continue
        privileged_template_for(columns, template)


def _columns(dataset: Any) -> list[str] | None:
    """Return the column names of a dataset, or None if they are not known before rows are read."""
    if dataset is None or not hasattr(dataset, "column_names"):
        return None
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset)))  # a stream that does not declare its columns


def planned_pair(
    model: Any, teacher_model: Any, args: OSDConfig, engine: PairEngine | None
) -> PairConfig | PairEngine | ServedPair:
    """Return the pair to train with: the running `engine`, the server, or the checked configuration of an engine to start.

    Raises:
        ValueError: no teacher, or one that is not a path or id; a model that cannot be found, or whose files of weights are
            not whole; tokenizers that differ; engine arguments that vLLM does not have; a running engine of another teacher,
            or beside a server.
    """
    teacher = _teacher_path(teacher_model, args, engine)
    if engine is not None and args.vllm_mode == "server":
        raise ValueError("engine= with vllm_mode='server': the server samples; leave one of them out")
    if engine is not None:
        if engine.config.teacher != teacher:
            raise ValueError(
                f"the running engine's teacher is {engine.config.teacher!r}, and the trainer was given {teacher!r}"
            )
        warn_beside_engine(args)
        return engine
    from osd.engine.engine import PairConfig
    from osd.validate_models import check_models, check_student_can_train
    from osd.weight_files import check_weights

    kwargs: dict[str, Any] = args.pair_kwargs()
    if args.vllm_mode == "server":
        kwargs = without_engine(kwargs)
    pair = PairConfig(teacher=teacher, student=_student_path(model), mixing=args.mixing(), **kwargs)
    check_models(pair)
    check_student_can_train(pair)
    if args.vllm_mode != "server":
        check_weights(pair)
        return pair
    warn_beside_engine(args)
    return ServedPair(config=pair, url=args.server_url(), timeout=args.vllm_server_timeout, group_port=args.vllm_group_port)


def _student_path(model: Any) -> str:
    path = model if isinstance(model, str) else model.name_or_path
    if not path:
        raise ValueError(
            f"model is a {type(model).__name__} without a path: its engine loads configuration and tokenizer from one. Save it "
            "with save_pretrained, with its tokenizer, and load it from there"
        )
    return path


def _teacher_path(teacher_model: Any, args: OSDConfig, engine: PairEngine | None) -> str:
    given = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if given is None and engine is not None:
        return engine.config.teacher
    if given is None:
        raise ValueError("no teacher: set teacher_model_name_or_path, or pass teacher_model, to a path or model id")
    if not isinstance(given, str):
        raise ValueError(
            f"teacher_model is a {type(given).__name__}: the teacher runs in vLLM, which loads it itself; pass its path or "
            "model id (a model changed in memory must be saved with save_pretrained first)"
        )
    return given
