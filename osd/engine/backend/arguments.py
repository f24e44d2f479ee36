"""The arguments of `osd serve`: those of `vllm serve` and the pair's own, checked before a model loads."""

from __future__ import annotations

import functools
import json
import re
from argparse import SUPPRESS, Action, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from osd.core import MIXING_OPTIONS, SPECULATION_HELP, MixingConfig, mixing_option, suggest
from osd.engine.backend.configuration import check_engine_args, refusal, refusals
from osd.engine.backend.language_model import as_text
from osd.engine.backend.layers import without_cached_states
from osd.engine.config import PairConfig, transfer_backend
from osd.validate_models import check_models
from osd.weight_files import check_weights

# The neutral values of what vLLM would take from the teacher's generation_config.json where a request names none.
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# Engine arguments that describe the teacher's files; the student has its own in --student-engine-kwargs.
_OF_TEACHER = {"revision", "code_revision", "tokenizer", "tokenizer_revision", "hf_config_path", "served_model_name"}
_OF_TEACHER |= {"quantization", "quantization_config", "hf_overrides", "override_generation_config", "reasoning_parser"}
_FILES = ("ssl_keyfile", "ssl_certfile")


def server_arguments(argv: list[str]) -> Namespace:
    """Return the arguments of vLLM's server with the pair plugged in.

    Raises:
        ValueError: arguments or models that the pair or vLLM cannot take, in one line.
        SystemExit: `--help`.
    """
    args = parser().parse_args(argv)
    args.subparser = "serve"  # vLLM's checks ask for it
    with _named_as_flags():
        config = pair_config(args, given(argv))
    _check_front_end(args)
    if (transfer := config.engine_kwargs.get("weight_transfer_config")) is not None:
        _check_takes_weights(args, transfer_backend(transfer))
    args.student_chat_template = _template(args.student_chat_template)
    with _named_as_flags():
        check_models(config)
        check_weights(config)
        config = without_cached_states(config)
    for name, value in as_text(config.teacher_engine_args()).items():
        setattr(args, name, value)
    with refusals():
        configure_logging_from_args(args)
        ServeSubcommand().validate(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
    check_engine_args(AsyncEngineArgs.from_cli_args(args), headless=args.headless)
    return args


@contextmanager
def _named_as_flags() -> Iterator[None]:
    """Name the engine arguments in an error as `osd serve` takes them: as flags, not as fields of `PairConfig`."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bstudent_kwargs\b", "--student-engine-kwargs", str(error))
        text = re.sub(r"\b(?:engine|teacher)_kwargs\['(\w+)'\](=True\b|=False\b)?", _flag, text)
        text = text.replace("set num_speculative_tokens", "set --num-speculative-tokens")
        raise ValueError(text.replace("set it in engine_kwargs", "set it as a flag of its own, for both sides")) from error


def _flag(found: re.Match[str]) -> str:
    name, value = found[1].replace("_", "-"), found[2]
    return f"--no-{name}" if value == "=False" else f"--{name}"


def _check_front_end(args: Namespace) -> None:
    """Refuse what vLLM finds out after the models have loaded, or never."""
    if args.grpc or envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError("--grpc and vLLM's Rust front end take no middleware, which the pair needs; leave them out")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port={args.port} is not a port; use 1024 to 65535")
    if not args.headless and args.api_server_count is not None and args.api_server_count < 1:
        raise ValueError(f"--api-server-count={args.api_server_count} serves nothing; use 1 or more")
    for name in _FILES:
        if (file := getattr(args, name)) and not Path(file).is_file():
            raise ValueError(f"--{name.replace('_', '-')}={file!r} is not a file; correct the path")
    for name in args.middleware:
        module, _, attribute = name.rpartition(".")
        try:
            getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--middleware={name!r} cannot be imported ({error}); write it as module.name") from error


def _check_takes_weights(args: Namespace, backend: str) -> None:
    """Refuse a server that anyone could send weights to, or nobody, or whose front ends would not all know of them."""
    if current_platform.is_cpu() and backend == "nccl":
        raise ValueError(
            f"--weight-transfer-config has the backend {backend!r}, vLLM's default: NCCL needs GPUs, and vLLM runs on a CPU "
            """here; use '{"backend": "http"}'"""
        )
    if not (args.api_key or envs.VLLM_API_KEY or envs.VLLM_SERVER_DEV_MODE):
        raise ValueError(
            "--weight-transfer-config without --api-key: whoever reaches the port could replace the student's weights; set "
            "--api-key or VLLM_API_KEY (or VLLM_SERVER_DEV_MODE=1 where nobody else does)"
        )
    if (args.api_server_count or 1) > 1:
        raise ValueError(f"--api-server-count={args.api_server_count} with --weight-transfer-config; use 1")
    args.api_server_count = 1  # vLLM would start one per data parallel replica


def _template(given: str | None) -> str | None:
    """Return the text of a chat template that was given as text or as a file."""
    if given is None or "{" in given:
        return given
    if not Path(given).is_file():
        raise ValueError(f"--student-chat-template={given!r} is neither a file nor the text of a chat template")
    return Path(given).read_text(encoding="utf-8")


def pair_config(args: Namespace, given: Mapping[str, Any]) -> PairConfig:
    """Return the pair of parsed arguments; ``given`` holds those that were written.

    Raises:
        ValueError: no teacher or student, a model given as to `vllm serve`, or what `PairConfig` and `MixingConfig` refuse.
    """
    for side in ("teacher", "student"):
        if not getattr(args, side):
            raise ValueError(f"--{side} is not set; give its path or model id")
    if args.model_tag is not None or "model" in given:
        raise ValueError(f"{args.model_tag or given['model']!r}: a pair has two models; give --teacher and --student")
    engine = {name: value for name, value in given.items() if name in EngineArgs.__dataclass_fields__}
    teacher = {name: engine.pop(name) for name in _OF_TEACHER & engine.keys()}
    return PairConfig(
        teacher=args.teacher,
        student=args.student,
        mixing=MixingConfig(**{name: getattr(args, name) for name in MIXING_OPTIONS}),
        engine_kwargs=engine,
        teacher_kwargs={"override_generation_config": NEUTRAL, **teacher},
        student_kwargs=args.student_engine_kwargs,
        num_speculative_tokens=args.num_speculative_tokens,
    )


# -- parsing ------------------------------------------------------------------------------------------------------------


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `ValueError`; suggest a flag for one that does not exist."""
        wrong = message.removeprefix("unrecognized arguments: ")
        near = "" if wrong == message else suggest(wrong.split()[0], self._option_string_actions)
        raise ValueError(f"{' '.join(message.split())}{near}; `osd serve --help=all` lists what is taken")

    def load_config_file(self, file_path: str) -> list[str]:
        try:
            content = yaml.safe_load(Path(file_path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--config={file_path!r} cannot be read ({' '.join(str(error).split())}); correct it") from error
        if not isinstance(content, dict):
            raise ValueError(f"--config={file_path!r} has no flags; write each as a line `name: value`")
        return super().load_config_file(file_path)


def parser() -> FlexibleArgumentParser:
    """Make the parser of `vllm serve` with the pair's arguments."""
    commands = _Parser(prog="osd").add_subparsers()
    made = ServeSubcommand().subparser_init(commands)
    made.usage = "osd serve --teacher MODEL --student MODEL [any option of vllm serve]"
    made.description = (
        "Serve the OpenAI API from a pair: every token is drawn from q*. vLLM's own arguments act on both models; see "
        "docs/serving.md."
    )
    group = made.add_argument_group("Pair", "The two models and their mixture.")
    group.add_argument("--teacher", help="The teacher: model id or local path.")
    group.add_argument("--student", help="The student: model id or local path, with the teacher's tokenizer.")
    for name in MIXING_OPTIONS:
        option = mixing_option(name)
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=type(option.default), default=option.default, help=option.metadata["help"])
    group.add_argument("--num-speculative-tokens", default="0", help=SPECULATION_HELP)
    group.add_argument(
        "--student-engine-kwargs", type=_mapping, default={}, help="vLLM engine arguments of the student only, as JSON."
    )
    group.add_argument(
        "--student-chat-template",
        default=None,
        help="Chat template of the student: a Jinja file, or its text. Default: its own tokenizer's.",
    )
    made.set_defaults(host="127.0.0.1")
    for action in made._actions:
        if callable(action.type):
            action.type = _explained(action, action.type)
    return made


def given(argv: list[str]) -> dict[str, Any]:
    """Return the arguments that were written, with configurations as plain mappings."""
    made = parser()
    made._defaults.clear()
    for action in made._actions:
        action.default = SUPPRESS
        if getattr(action.type, "__name__", "") == "parse_dataclass":  # would fill in vLLM's defaults
            action.type = _mapping
    return vars(made.parse_args(argv))


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ArgumentTypeError("it is not a JSON object")
    return value


def _explained(action: Action, kind: Any) -> Any:
    """Wrap the parser of one value: its errors name the value, what is wrong with it and how to write it."""

    @functools.wraps(kind)
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except (ArgumentTypeError, TypeError, ValueError) as error:
            raise ArgumentTypeError(f"{text!r:.200} {_fault(action.option_strings[0], error)}") from error

    return parse


def _fault(flag: str, error: BaseException) -> str:
    cause = error.__cause__ or error
    text = str(cause)
    if isinstance(cause, json.JSONDecodeError) or (isinstance(cause, ValidationError) and "json_invalid" in text):
        return f"""is not JSON; write {flag} '{{"key": "value"}}', or a key alone as {flag}.key value"""
    if text.startswith("invalid literal for int"):
        return "is not a whole number"
    if text.startswith("could not convert string to float"):
        return "is not a number"
    return f"is refused: {refusal(cause)}"
