"""Write docs/api.md from the docstrings and field documentation of the public API: `python docs/make_api.py`.

tests/test_docs.py fails when the page is not what this would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "api.md"
HEAD = """\
# API

Written by `python docs/make_api.py` from the docstrings; edit those. Names that begin with an underscore are not listed.
"""


def page() -> str:
    """The whole page."""
    from osd.core import MixingConfig, TokenRecord
    from osd.data.settings import CompareConfig, GenerateConfig
    from osd.engine.engine import PairCompletion, PairConfig, PairEngine, PairPrompt
    from osd.engine.request import PairOptions
    from osd.engine.served import ServedPair
    from osd.generation import GeneratedBatch, OSDGeneration
    from osd.output import OptimalSample, OptimalSamplingOutput, save_alpha_history
    from osd.sampler import OptimalSamplingV1
    from osd.train import OSDConfig, OSDTrainer
    from osd.train.data import DataArguments

    parts = [HEAD]
    parts += [
        _class("osd", cls) for cls in (OptimalSamplingV1, OptimalSamplingOutput, OptimalSample, MixingConfig, TokenRecord)
    ]
    parts += [_function("osd", save_alpha_history)]
    parts += [_class("osd", OSDGeneration), _class("osd.generation", GeneratedBatch)]
    parts += [_class("osd", cls) for cls in (PairEngine, PairConfig, PairPrompt)]
    parts += [_class("osd.engine.engine", PairCompletion)]
    parts += [_class("osd.engine.served", ServedPair)]
    parts += [_class("osd.engine.request", PairOptions), _class("osd", OSDTrainer), _options("osd", OSDConfig)]
    parts += [_options("osd.train.data", DataArguments)]
    parts += [_command("osd generate", GenerateConfig), _command("osd compare", CompareConfig)]
    return "\n".join(parts)


def _class(home: str, cls: type) -> str:
    lines = [f"## {home}.{cls.__name__}", "", _code(f"{cls.__name__}{_signature(cls)}"), "", _prose(cls.__doc__), ""]
    for name, member in _members(cls).items():
        function = member.__func__ if isinstance(member, classmethod) else member
        if name.startswith("_") or not getattr(function, "__doc__", None):
            continue
        if inspect.isfunction(function):
            lines += [
                f"### {cls.__name__}.{name}",
                "",
                _code(f"{name}{_signature(function)}"),
                "",
                _prose(function.__doc__),
                "",
            ]
        elif isinstance(member, property):
            lines += [f"- `{name}`: {_one_line(member.__doc__)}", ""]
    return "\n".join(lines)


def _members(cls: type) -> dict[str, Any]:
    """Members of a class and of those of its bases that belong to OSD and have no section of their own."""
    ours = [base for base in reversed(cls.__mro__[1:]) if base.__module__ in ("osd.weight_sync", "osd.background")]
    return {name: member for owner in (*ours, cls) for name, member in vars(owner).items()}


def _function(home: str, function: Any) -> str:
    head = [f"## {home}.{function.__name__}", "", _code(f"{function.__name__}{_signature(function)}")]
    return "\n".join([*head, "", _prose(function.__doc__), ""])


def _options(home: str, cls: Any) -> str:
    """A class of options with help texts: only what it adds to its base."""
    base = {
        field.name for parent in cls.__mro__[1:] if dataclasses.is_dataclass(parent) for field in dataclasses.fields(parent)
    }
    own = [field for field in dataclasses.fields(cls) if field.name not in base]
    rows = [f"| `{field.name}` | `{_default(field)}` | {_cell(field.metadata['help'])} |" for field in own]
    return "\n".join([f"## {home}.{cls.__name__}", "", _prose(cls.__doc__), "", _table(rows), ""])


def _command(name: str, cls: Any) -> str:
    lines = [f"## {name}", "", "Each is a flag (`--name value`) and a YAML key.", ""]
    for group in cls.groups:
        own = [field for field in dataclasses.fields(group) if field.metadata.get("help", SUPPRESS) is not SUPPRESS]
        rows = [f"| `{field.name}` | `{_default(field)}` | {_cell(field.metadata['help'])} |" for field in own]
        lines += [f"### {name}: {group._argument_group_name}", "", _table(rows), ""]
    return "\n".join(lines)


def _table(rows: list[str]) -> str:
    return "\n".join(["| option | default | |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", "<br>")


def _default(field: Any) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _signature(thing: Any) -> str:
    parameters = [p for p in inspect.signature(thing).parameters.values() if p.name != "self"]
    shown, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        value = parameter.default
        if value is inspect.Parameter.empty or "factory" in repr(value):
            shown.append(star + parameter.name + ("" if value is inspect.Parameter.empty else "=..."))
        else:
            shown.append(f"{parameter.name}={value!r}")
    return f"({', '.join(shown)})"


def _code(text: str) -> str:
    return f"```text\n{text}\n```"


def _prose(doc: str | None) -> str:
    """A docstring as Markdown: sections become lists, plain text stays."""
    lines, out = inspect.cleandoc(doc or "").splitlines(), []
    section = False
    for line in lines:
        heading = line.removesuffix(":") if line in ("Args:", "Attributes:", "Raises:", "Returns:") else None
        if heading:
            section = True
            out += [f"**{heading}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            names, _, rest = line.strip().partition(":")
            out.append(f"- `{names}`:{rest}")
        elif section and line.startswith("    "):
            out.append(f"  {line.strip()}")
        else:
            section = section and not line
            out.append(line)
    return "\n".join(out).replace("``", "`")


def _one_line(doc: str | None) -> str:
    return " ".join((doc or "").split()).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
