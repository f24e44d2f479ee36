"""Check of the files of weights in a model's folder: present, whole and complete."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from osd.engine.config import PairConfig

# Beginnings of the names of files that hold no weights of a whole model.
_OTHERS = ("adapter_", "training_args", "optimizer", "scheduler")
_AGAIN = "copy, download or save the model again"
_INDEXES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}


def check_weights(config: PairConfig) -> None:
    """Raise if files of weights in a model's folder are missing or damaged; reads headers only.

    Raises:
        ValueError: a folder without weights (one of an adapter alone is one); an index that cannot be read or names a file
            that is not there; a file that is empty or cut short.
    """
    for side in ("teacher", "student"):
        folder = Path(getattr(config, side))
        if not folder.is_dir() or config.side_kwargs(side).get("load_format", "auto") not in ("auto", "hf", "safetensors"):
            continue
        suffix, files = _files(folder)
        if not files:
            raise ValueError(
                f"{side}={str(folder)!r}: the folder has no weights; save the whole model there (of an adapter, the merged "
                "model), or give the folder or the id that has them"
            )
        index = folder / _INDEXES.get(suffix, "")
        if index.is_file():
            files = _indexed(side, index)
        for file in files:
            if why := _damage(file):
                raise ValueError(f"{side}={str(folder)!r}: {file.name} is no whole file of weights ({why}); {_AGAIN}")


def _files(folder: Path) -> tuple[str, list[Path]]:
    """Return the suffix that vLLM prefers among the weights of a folder, and the files with it."""
    weights = [path for path in sorted(folder.iterdir()) if not path.name.startswith(_OTHERS)]
    for suffix in (".safetensors", ".bin", ".pt"):
        if files := [path for path in weights if path.suffix == suffix]:
            # Mistral's consolidated.safetensors are the same weights a second time.
            return suffix, [path for path in files if not path.name.startswith("consolidated")] or files
    return "", []


def _indexed(side: str, index: Path) -> list[Path]:
    """Return the files that an index names, all of which exist."""
    where = f"{side}={str(index.parent)!r}: {index.name}"
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{where} cannot be read ({error}); {_AGAIN}") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{where} names {len(missing)} of {len(names)} files that are not there ({missing[0]}); {_AGAIN}")
    return [index.parent / name for name in names]


def _damage(file: Path) -> str:
    """Return what is wrong with a file of weights; empty if it is whole."""
    size = file.stat().st_size
    if not size:
        return "it is empty"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="np"):
                return ""
        except SafetensorError as error:
            return f"{size} bytes: {error}"
    with file.open("rb") as opened:
        cut = opened.read(2) == b"PK" and not zipfile.is_zipfile(opened)  # the directory of a zip is at its end
    return f"{size} bytes: its end is missing" if cut else ""
