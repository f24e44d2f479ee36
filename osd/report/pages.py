"""Jinja pages that need nothing else, and how they are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """One of this package's pages. Text is escaped; a name that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = lambda text: text.replace("\n", "↵")
    environment.filters["decimals"] = decimals
    return environment.get_template(template).render(**values)


def decimals(value: float, digits: int) -> str:
    """A number as it is set in print: a true minus, and none before a zero."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text.replace("-", "−")).replace("inf", "∞")


def script_json(value: Any) -> str:
    """JSON that can stand inside a <script>: no markup in a completion can end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
    os.replace(part, path)
