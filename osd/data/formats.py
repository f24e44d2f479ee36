"""Opening of an input as records: files of seven formats, folders of them, saved datasets and datasets of the Hub.

CSV and TSV cells are text. JSON values keep their JSON types. Parquet, Arrow and saved datasets keep their stored types.
Nothing is converted between them: 12 stays 12, 0042 and NA and dates in text files stay text.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Records = Iterator[dict[str, Any] | str]
"""Rows as mappings; for a row that cannot be read, the reason."""


def open_input(source: str, config: str | None, split: str) -> Dataset | Records:
    """Open a file, a folder or a dataset. Formats with stored types give a `datasets.Dataset`, text formats give records.

    Raises:
        ValueError: a missing or unreadable input, an unknown file ending, a missing split.
    """
    path = Path(source)
    if path.is_file() or (_kind(path) is not None and not path.is_dir()):
        return _open_file(path)
    if path.is_dir() and not _is_saved(path):
        files = _folder_files(path, config, split)
        return _open_files(files) if files else _load(source, config, split)
    return _load(source, config, split)


def is_local(source: str) -> bool:
    """Return whether a name is a local file or folder: it exists, or ends as the files that can be read."""
    return Path(source).exists() or _kind(Path(source)) is not None


def _kind(path: Path) -> str | None:
    """Return the ending of a file's name that is a key of `FORMATS`, or None."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def _open_file(path: Path) -> Dataset | Records:
    kind = _kind(path)
    if not path.is_file():
        raise ValueError(f"input={str(path)!r} does not exist")
    if kind is None:
        raise ValueError(f"input={str(path)!r} has an unknown ending; use {', '.join(FORMATS)}, or a folder of these")
    return FORMATS[kind](path)


def _open_files(paths: Sequence[Path]) -> Dataset | Records:
    import datasets

    opened = [_open_file(path) for path in paths]
    tables = [part for part in opened if isinstance(part, datasets.Dataset)]
    if len(tables) == len(opened) and len({str(table.features) for table in tables}) == 1:
        return datasets.concatenate_datasets(tables)
    return chain.from_iterable(opened)


# -- text formats -------------------------------------------------------------------------------------------------------


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _jsonl(path: Path) -> Records:
    try:
        with _open_bytes(path) as file:
            for line in file:
                if line.strip():
                    yield _record(line)
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"input={str(path)!r} is not a whole gzip file ({error})") from error


def _record(line: bytes) -> dict[str, Any] | str:
    try:
        return _mapping(json.loads(line))
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error}): {line[:200].decode('utf-8', 'replace').rstrip()}"


def _json(path: Path) -> Records:
    with _open_bytes(path) as file:
        text = file.read()
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(_record(text.lstrip().split(b"\n", 1)[0]), dict):  # JSON lines under the name .json
            return _jsonl(path)
        raise ValueError(f"input={str(path)!r} is not JSON ({error}); for one object per line, name it .jsonl") from error
    if not isinstance(whole, list):
        raise ValueError(
            f"input={str(path)!r} is not a list of objects; write [{{...}}, ...], or one object per line as .jsonl"
        )
    return map(_mapping, whole)


def _mapping(value: Any) -> dict[str, Any] | str:
    return value if value and isinstance(value, dict) else f"it is not an object with columns: {value!r:.200}"


def _csv(path: Path, delimiter: str = ",") -> Records:
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default of 131,072 characters is less than a long prompt
    try:
        with _open_bytes(path) as file:
            yield from _cells(path, (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(file)), delimiter)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"input={str(path)!r} is not CSV in UTF-8 ({error}); save it as UTF-8, or as .jsonl") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"input={str(path)!r} is not a whole gzip file ({error})") from error


def _tsv(path: Path) -> Records:
    return _csv(path, "\t")


def _cells(path: Path, lines: Iterator[str], delimiter: str) -> Records:
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)  # strict: an open quote would swallow all that follows
    names = list(reader.fieldnames or ())
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"input={str(path)!r} has several columns named {twice[0]!r}; rename them")
    for row in reader:
        if None in row:
            yield f"it has more fields than the header: {row.pop(None)!r:.200}"  # type: ignore[call-overload]
        elif None in row.values():
            yield f"it has fewer fields than the header: {row!r:.200}"
        else:
            yield dict(row)


# -- formats with types -------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Dataset | Records:
    import pyarrow.parquet as pq

    return _table(path, "Parquet", lambda: pq.ParquetFile(path).read())


def _arrow(path: Path) -> Dataset | Records:
    import pyarrow as pa

    def read() -> Any:
        with pa.memory_map(str(path)) as file:
            try:
                return pa.ipc.open_stream(file).read_all()
            except pa.ArrowInvalid:
                return pa.ipc.open_file(file).read_all()

    return _table(path, "Arrow", read)


def _table(path: Path, name: str, read: Callable[[], Any]) -> Dataset | Records:
    import datasets
    import pyarrow as pa

    try:
        table = read()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"input={str(path)!r} is not a whole {name} file ({error})") from error
    try:
        return _exact(datasets.Dataset(datasets.table.InMemoryTable(table)))
    except (NotImplementedError, ValueError, TypeError):  # a type that `datasets` does not have: categories, maps
        return iter(table.to_pylist())


def _exact(dataset: Dataset) -> Dataset:
    """Replace NaN by null in columns of numbers, and let JSON columns keep all digits."""
    import datasets

    from osd.data.json_feature import ExactJson

    info, table = dataset.info.copy(), dataset.data
    features = {name: ExactJson() if isinstance(kind, datasets.Json) else kind for name, kind in dataset.features.items()}
    info.features = datasets.Features(features)
    for position, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if (without := _without_nan(column)) is not None:
            table = table.set_column(position, name, without)
    return datasets.Dataset(table, info=info, split=dataset.split, indices_table=dataset._indices)


def _without_nan(column: Any) -> Any | None:
    """Return a column with null for NaN, which tables use for missing values; None if the column has no NaN."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py()):
        return None
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


FORMATS: dict[str, Any] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


# -- folders and datasets -----------------------------------------------------------------------------------------------


def _is_saved(folder: Path) -> bool:
    """Return whether `datasets` saved this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _folder_files(folder: Path, config: str | None, split: str) -> list[Path]:
    """Return the files of one split of a folder, split by name as `datasets` does; empty if it has no file of our formats.

    Raises:
        ValueError: the folder has files of other splits only.
    """
    from datasets import data_files, load_dataset_builder

    if any(folder.glob("data-*")) and (folder / "run.json").is_file():  # written by `osd generate`
        return sorted(path for path in folder.glob("data-*") if _kind(path))
    try:
        if config is not None or _has_card(folder):
            by_split: Any = load_dataset_builder(str(folder), name=config).config.data_files or {}
        else:
            patterns = data_files.sanitize_patterns(data_files.get_data_patterns(str(folder)))
            by_split = data_files.DataFilesDict.from_patterns(patterns, base_path=str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"input={str(folder)!r} is a folder without data ({str(error).splitlines()[0]})") from error
    known = {str(name): [Path(file) for file in files if _kind(Path(file))] for name, files in by_split.items()}
    if not any(known.values()):
        return []
    return _of_split(str(folder), {name: files for name, files in known.items() if files}, split)


def _has_card(folder: Path) -> bool:
    """Return whether the folder's README assigns files to splits."""
    card = folder / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")


def _of_split(source: str, splits: Any, split: str) -> Any:
    if split not in splits:
        raise ValueError(
            f"{source!r} has no split {split!r}; it has {sorted(map(str, splits))}. Set dataset_train_split (of an "
            "evaluation set: dataset_test_split)"
        )
    return splits[split]


def _load(source: str, config: str | None, split: str) -> Dataset:
    import datasets

    try:
        loaded = datasets.load_from_disk(source) if _is_saved(Path(source)) else datasets.load_dataset(source, name=config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"input={source!r} is not a file, a folder with data or a dataset that can be loaded ({reason})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _of_split(source, loaded, split)
    return _exact(loaded)
