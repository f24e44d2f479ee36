"""Configs by name: the YAML files that are shipped with the package, and suggestions for mistyped paths."""

from __future__ import annotations

from pathlib import Path

from osd.core import suggest

# In an installed package beside this module's parent; in a checkout (also an editable install) at the top level.
_PACKAGE = Path(__file__).parent.parent
ROOT = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE / "configs")


def shipped(folder: str = "") -> dict[str, Path]:
    """Return the shipped YAML files of a folder of `configs`, by name."""
    return {path.stem: path for path in sorted((ROOT / folder).glob("*.yaml"))}


def find(given: str, *, key: str = "config", folder: str = "") -> Path:
    """Return the YAML file at a path, or the shipped one of that name.

    Raises:
        ValueError: there is neither.
    """
    path, known = Path(given), shipped(folder)
    if path.is_file():
        return path
    if given in known:
        return known[given]
    if path.exists():
        raise ValueError(f"{key}={given!r} is not a file; give a YAML file, or one of {', '.join(known)}")
    raise ValueError(f"{key}={given!r} does not exist{nearby(given, known)}; give a YAML file, or one of {', '.join(known)}")


def nearby(given: str | Path, known: dict[str, Path] | None = None) -> str:
    """Return " (did you mean ...?)" with the name of a file beside a path that does not exist, or a known name."""
    path = Path(given)
    siblings = [str(path.with_name(file.name)) for file in path.parent.iterdir()] if path.parent.is_dir() else []
    return suggest(str(path), [*siblings, *(known or {})])
