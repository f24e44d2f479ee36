"""Self-contained HTML pages from Jinja templates, and their files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, *, folder: Path | None = None, filters: dict[str, Any] | None = None, **values: Any) -> str:
    """Render a template of this package or of `folder`. Text is escaped; a missing name is an error.

    Args:
        template: its file name.
        folder: where else templates are; they can extend this package's.
        filters: more Jinja filters.
        values: the names that the template reads.
    """
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, folder or here]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": lambda text: text.replace("\n", "↵"), "decimals": decimals, **(filters or {})}
    return environment.get_template(template).render(**values)


def decimals(value: float, digits: int) -> str:
    """Format a number for print: with a true minus, and none before a zero."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text.replace("-", "−")).replace("inf", "∞")


def script_json(value: Any) -> str:
    """Write JSON for a <script> element: no markup inside a string can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
    os.replace(part, path)


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before anything is computed; create nothing.

    Raises:
        ValueError: a parent is a file or not writable.
    """
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not nearest.is_dir():
        raise ValueError(
            f"{str(path)!r} cannot be written: {str(path if path.is_dir() else nearest)!r} is in the way; use another path"
        )
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be written: no permission to write in {str(nearest)!r}; use another path")
