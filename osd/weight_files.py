"""Check of the files of weights in a model's folder: present, whole and complete."""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from osd.engine.config import PairConfig

# Beginnings of the names of files that hold no weights of a whole model; vLLM reads no hidden files.
_OTHERS = (".", "adapter_", "training_args", "optimizer", "scheduler", "scaler")
_AGAIN = "copy, download or save the model again"
_INDEXES = {".safetensors": "model.safetensors.index.json", ".bin": "pytorch_model.bin.index.json"}
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)")


def check_weights(config: PairConfig) -> None:
    """Raise if a model's files of weights are missing from its folder, or damaged there or in the Hub's cache.

    It reads headers only, and never the network: of a Hub id it checks the files that are in the cache.

    Raises:
        ValueError: a folder without weights (one of an adapter alone is one); an index that cannot be read or names a file
            that is not there; shards that are fewer than their names say; a file that is empty, cut short or of another kind.
    """
    for side in ("teacher", "student"):
        model, kwargs = getattr(config, side), config.side_kwargs(side)
        if kwargs.get("load_format", "auto") not in ("auto", "hf", "safetensors"):
            continue
        local = Path(model).is_dir()
        files = _complete(side, Path(model)) if local else _cached(model, kwargs.get("revision"), kwargs.get("download_dir"))
        for file in files:
            if why := _damage(file):
                fix = _AGAIN if local else f"delete {str(file.resolve())!r}, and it is downloaded again"
                raise ValueError(f"{side}={str(model)!r}: {file.name} is no whole file of weights ({why}); {fix}")


def _complete(side: str, folder: Path) -> list[Path]:
    """Return the files of weights in a folder, all that its index or their names announce."""
    suffix, files = _files(folder)
    if not files:
        raise ValueError(
            f"{side}={str(folder)!r}: the folder has no weights; save the whole model there (of an adapter, the merged "
            "model), or give the folder or the id that has them"
        )
    index = folder / _INDEXES.get(suffix, "")
    if index.is_file():
        return _indexed(side, index)
    found: dict[tuple[str, int], int] = defaultdict(int)
    for file in files:
        if shard := _SHARD.fullmatch(file.stem):
            found[shard[1], int(shard[2])] += 1
    for (name, count), present in found.items():
        if present < count:
            raise ValueError(
                f"{side}={str(folder)!r}: {count - present} of the {count} files {name}-*{suffix} are not there; {_AGAIN}"
            )
    return files


def _cached(model: str, revision: str | None, cache: str | None) -> list[Path]:
    """Return the files of weights that the Hub's cache has of a model; what is absent will be downloaded."""
    try:  # the pattern: a snapshot counts as complete without files that no model needs
        folder = snapshot_download(
            model, revision=revision, cache_dir=cache, local_files_only=True, allow_patterns="config.json"
        )
    except (OSError, ValueError):
        return []
    return [file for file in _files(Path(folder))[1] if file.is_file()]


def _files(folder: Path) -> tuple[str, list[Path]]:
    """Return the suffix that vLLM prefers among the weights of a folder, and the files with it."""
    weights = [
        path for path in sorted(folder.iterdir()) if not path.name.startswith(_OTHERS) and (path.is_file() or path.is_symlink())
    ]
    for suffix in (".safetensors", ".bin", ".pt"):
        if files := [path for path in weights if path.suffix == suffix]:
            # Mistral's consolidated.safetensors are the same weights a second time.
            return suffix, [path for path in files if not path.name.startswith("consolidated")] or files
    return "", []


def _indexed(side: str, index: Path) -> list[Path]:
    """Return the files that an index names, all of which exist."""
    where = f"{side}={str(index.parent)!r}: {index.name}"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read ({error}); {_AGAIN}") from error
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not mapping or not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise ValueError(f"{where} has no weight_map from the weights to the names of their files; {_AGAIN}")
    names = sorted(set(mapping.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{where} names {len(missing)} of {len(names)} files that are not there ({missing[0]}); {_AGAIN}")
    return [index.parent / name for name in names]


def _damage(file: Path) -> str:
    """Return what is wrong with a file of weights; empty if it is whole."""
    try:
        size = file.stat().st_size
        if not size:
            return "it is empty"
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np"):
                return ""
        with file.open("rb") as opened:
            start = opened.read(16)
            if not start.startswith((b"PK", b"\x80")):  # a zip, or a pickle of before PyTorch 1.6
                return f"{size} bytes: it begins with {start!r}, as no file of PyTorch does"
            cut = start.startswith(b"PK") and not zipfile.is_zipfile(opened)  # the directory of a zip is at its end
            return f"{size} bytes: its end is missing" if cut else ""
    except SafetensorError as error:
        return f"{size} bytes: {error}"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
