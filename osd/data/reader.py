"""Reading prompts: JSONL, JSON, CSV, Parquet, or a dataset, as rows with an id that does not depend on their order.

A line that is not a row does not stop the reading: it becomes a row with an `error`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

FILES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the input.

    Attributes:
        id: its name: of the id column, or a hash of its content (with -2, -3, ... for its repetitions).
        number: its place in the input, from 0.
        values: its columns; empty if there is an error.
        error: why it cannot be used, or None.
    """

    id: str
    number: int
    values: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The input, whole.

    Attributes:
        rows: in the order of the input.
        columns: every column that some row has.
        fingerprint: a hash of all rows in their order.
    """

    rows: list[Row]
    columns: tuple[str, ...]
    fingerprint: str


def read(
    source: str, *, config: str | None = None, split: str = "train", id_column: str | None = None, limit: int | None = None
) -> Rows:
    """Read the input.

    Raises:
        ValueError: nothing there, no rows, a split or an id column that it does not have.
    """
    rows: list[Row] = []
    columns: dict[str, None] = {}
    seen: dict[str, int] = {}
    whole = hashlib.sha256()
    for number, found in enumerate(islice(_records(source, config, split), limit)):
        values = {} if isinstance(found, str) else {key: _known(value) for key, value in found.items()}
        error = found if isinstance(found, str) else _no_text(values)
        digest = _digest(found if isinstance(found, str) else values)
        whole.update(digest.encode())
        columns.update(dict.fromkeys(values))
        name = values.get(id_column) if id_column else digest[:16]
        if name is None:
            name, error = digest[:16], error or f"it has no {id_column!r} (id_column)"
        seen[str(name)] = times = seen.get(str(name), 0) + 1
        if times > 1:
            if id_column and error is None:
                error = f"its {id_column!r}, {name!r}, is that of an earlier row; ids must differ"
            name = f"{name}-{times}"
        rows.append(Row(id=str(name), number=number, values=values, error=error))
    if not rows:
        raise ValueError(f"input={source!r} has no rows")
    if id_column is not None and columns and id_column not in columns:
        raise ValueError(f"id_column={id_column!r} is not a column of {source!r}; its columns are {sorted(columns)}")
    return Rows(rows=rows, columns=tuple(columns), fingerprint=whole.hexdigest()[:16])


def canonical(value: Any) -> str:
    """JSON of a value, the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _known(value: Any) -> Any:
    """None for the NaN by which a table says that there is no value."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _no_text(values: Mapping[str, Any]) -> str | None:
    r"""Why no file of text can hold a row: half of a surrogate pair, which JSON can write as "\ud800"."""
    try:
        canonical(values).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"it has {error.object[error.start]!r}, which is half of a surrogate pair and no character"
    return None


def _digest(found: Any) -> str:
    return hashlib.sha256(canonical(found).encode("utf-8", "surrogatepass")).hexdigest()


def _records(source: str, config: str | None, split: str) -> Iterator[dict[str, Any] | str]:
    """Rows as mappings, and what cannot be one as the reason."""
    path = Path(source)
    kind = FILES.get(path.suffix)
    if kind is not None or path.is_file():
        if not path.is_file():
            raise ValueError(f"input={source!r} does not exist")
        if kind is None:
            raise ValueError(f"input={source!r} has an unknown ending; use {', '.join(FILES)}, or a folder")
        return {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}[kind](path)
    return _dataset(source, config, split)


def _jsonl(path: Path) -> Iterator[dict[str, Any] | str]:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                yield _mapping(json.loads(line))
            except (ValueError, RecursionError) as error:
                yield f"it is not JSON ({error}): {line[:200].decode('utf-8', 'replace').rstrip()}"


def _json(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"input={str(path)!r} is not JSON ({error}); for one object per line, name it .jsonl") from error
    if not isinstance(whole, list):
        raise ValueError(
            f"input={str(path)!r} is not a list of objects; write [{{...}}, ...], or one object per line as .jsonl"
        )
    return map(_mapping, whole)


def _mapping(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"it is not an object with columns: {value!r:.200}"


def _csv(path: Path) -> Iterator[dict[str, Any] | str]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default of 131,072 characters is less than a long prompt
    try:
        yield from _csv_rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"input={str(path)!r} is not CSV in UTF-8 ({error}); save it as UTF-8, or as .jsonl") from error


def _csv_rows(path: Path) -> Iterator[dict[str, Any] | str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
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


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"input={str(path)!r} is not a whole Parquet file ({error})") from error


def _dataset(source: str, config: str | None, split: str) -> Iterator[Any]:
    import datasets

    folder = Path(source)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, name=config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"input={source!r} is no file, no folder of data, and no dataset that can be loaded ({reason})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"dataset_train_split={split!r} is not a split of {source!r}; it has {sorted(loaded)}")
        loaded = loaded[split]
    return iter(loaded)
