"""Parsing of YAML files and flags into settings. One file serves generation, comparison and training:

- Every command reads the keys at the top level that it knows and skips the others; a key that no command knows is refused.
- `osd generate` reads the section `generate:`; `osd compare` reads the keys of it that it knows, and the section `compare:`.
  Keys of a section win over the top level. Training reads no section.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from argparse import SUPPRESS, ArgumentParser, HelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

import yaml

from osd.core import suggest
from osd.data.configs import find, shipped
from osd.data.hints import hints, takes_mapping
from osd.data.settings import CompareConfig, GenerateConfig

SECTIONS: dict[str, type] = {"generate": GenerateConfig, "compare": CompareConfig}
# Flags of the short help.
SHORT = {"help", "help_all", "config", "model_name_or_path", "teacher_model_name_or_path", "input", "output", "limit"}
SHORT |= {"prompt_column", "answer_column", "teacher_templates", "enable_chat_template", "num_samples", "linear_weights"}
SHORT |= {"max_completion_length", "temperature", "filter_answer", "resume", "quiet", "dry_run"}
Settings = TypeVar("Settings", GenerateConfig, CompareConfig)


def parse(
    settings_class: type[Settings],
    argv: Sequence[str],
    *,
    training_keys: Callable[[], Iterable[str]],
    prog: str = "osd",
    description: str = "",
) -> Settings:
    """Parse `--config FILE` and flags into the settings of a command; flags win.

    Args:
        training_keys: returns the keys of training; called only for keys that the data commands do not know.

    Raises:
        ValueError: an unknown key or flag, or what `settings_class` refuses.
        SystemExit: `--help`, `--help-all`, or a flag without its value.
    """
    first = strict(ArgumentParser)(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config, flags = first.parse_known_args(argv)
    values = {} if config.config is None else read_yaml(config.config, settings_class, training_keys)
    parser = _parser(settings_class, prog, description, whole="--help-all" in flags)
    parser.set_defaults(**values)
    namespace, unknown = parser.parse_known_args(flags)
    if unknown:
        known = [f"--{field.name}" for field in fields(settings_class)]
        raise ValueError(f"unknown argument {unknown[0]!r}{suggest(unknown[0], known)}; `{prog} --help-all` lists them all")
    given = {field.name: getattr(namespace, field.name) for field in fields(settings_class)}
    return settings_class(**{name: _mapping(name, value, settings_class) for name, value in given.items()})


def read_yaml(path: str, settings_class: type, training_keys: Callable[[], Iterable[str]]) -> dict[str, Any]:
    """Read the keys of a YAML file that one command knows; see the module's docstring.

    Raises:
        ValueError: no such file, not a mapping, or a key that no command knows.
    """
    try:
        written = yaml.safe_load(find(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={path!r} is not YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise ValueError(f"config={path!r} is not a mapping of keys to values")
    _set_environment(written.pop("env", None) or {})
    top, sections = split_sections(written)
    _check_top(path, top, training_keys)
    own = {field.name for field in fields(settings_class)}
    read = [top, sections["generate"], *([sections["compare"]] if settings_class is CompareConfig else [])]
    return {key: value for part in read for key, value in part.items() if key in own}


def _set_environment(variables: Any) -> None:
    """Set the environment variables of the key `env`, as TRL's parser does."""
    if not isinstance(variables, dict):
        raise ValueError(f"env: {variables!r} is not a mapping of names to values")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def split_sections(written: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split a YAML file into its top level and its data sections (empty where absent).

    Raises:
        ValueError: a section that is not a mapping, or has an unknown key.
    """
    sections = {name: written.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{name}: {section!r} is not a mapping of keys to values")
        known = [field.name for field in fields(SECTIONS[name])]
        for key in section:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in the section {name!r}{suggest(key, known)}")
    return {key: value for key, value in written.items() if key not in SECTIONS}, sections


def data_keys() -> set[str]:
    """Return every key of the data commands."""
    return {field.name for settings_class in SECTIONS.values() for field in fields(settings_class)}


def _check_top(path: str, top: Mapping[str, Any], training_keys: Callable[[], Iterable[str]]) -> None:
    unknown = [key for key in top if key not in data_keys()]
    if not unknown:
        return
    try:
        known = set(training_keys()) | data_keys()
    except ImportError as error:
        raise ValueError(
            f"{path} has keys that the data commands do not know: {', '.join(map(repr, unknown))}. Whether training knows "
            "them cannot be checked without TRL; install the extra `train`, or remove them"
        ) from error
    for key in unknown:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {path}{suggest(key, known)}; no command knows it")


def _mapping(name: str, value: Any, settings_class: type) -> Any:
    """Parse a mapping that was given as a flag, in JSON."""
    if not (isinstance(value, str) and takes_mapping(hints(settings_class)[name])):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f'{name}={value!r} is not a JSON object; write it as {{"key": value}}') from error


def _parser(settings_class: Any, prog: str, description: str, *, whole: bool) -> ArgumentParser:
    """Make the parser of a command. Its help lists every setting if `whole`, else those of `SHORT`."""
    from transformers.hf_argparser import HfArgumentParser

    usage = f"{prog} --config FILE --input FILE --output FOLDER [--FLAG VALUE ...]"
    parser = strict(HfArgumentParser)(
        settings_class.groups,
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    start = parser.add_argument_group("start here")
    start.add_argument("-h", "--help", action="help", help="Show the flags that most runs set.")
    start.add_argument("--help-all", action="help", help="Show every flag.")
    start.add_argument(
        "--config",
        metavar="FILE",
        default=SUPPRESS,
        help=f"YAML file of settings, or a shipped one: {', '.join(shipped())}. Every flag is also a key in it.",
    )
    parser._action_groups.insert(0, parser._action_groups.pop())
    for action in parser._actions:
        if not whole and action.dest not in SHORT:
            action.help = SUPPRESS
    return parser


def strict(base: Any) -> Any:
    """Derive a parser that reports an error in one line."""

    class Parser(base):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            print(f"{self.prog}: error: {message} (`{self.prog} --help` says more)", file=sys.stderr)
            raise SystemExit(2)

    return Parser


class _Help(HelpFormatter):
    """Help with one spelling per flag, a short placeholder, and the default where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: Any) -> str:
        flags = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")] or list(action.option_strings)
        if action.nargs == 0:
            return ", ".join(flags)
        many = " ..." if action.nargs == "+" else ""
        value = action.metavar or {int: "N", float: "X"}.get(action.type) or ("[BOOL]" if action.nargs == "?" else "TEXT")
        return f"{flags[0]} {value}{many}"

    def _get_help_string(self, action: Any) -> str:
        text, default = action.help or "", action.default
        if default is not None and default is not False and default != SUPPRESS:
            text += f" [{' '.join(map(str, default)) if isinstance(default, list) else default}]"
        return text.replace("%", "%%")
