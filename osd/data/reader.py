"""Reading a file, folder or dataset of prompts: as rows for the data commands, as a `datasets.Dataset` for training.

Both come from one pass over the same records (`osd.data.formats`), so one file means the same messages everywhere:

- Values stay as written. NaN means "no value" and becomes None.
- Every row has every column; None stands for a value that the row does not have.
- A line that is not a row does not stop the reading: it becomes a row with an `error`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osd.data.formats import is_local, open_input
from osd.data.strict_json import canonical
from osd.prompt_checks import without_nones

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Row", "Rows", "is_local", "read", "read_dataset"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the input.

    Attributes:
        id: the value of the id column, or a hash of the row's content (with -2, -3, ... for repetitions).
        number: place in the input, from 0.
        values: the columns; empty if the row could not be read.
        error: the reason why the row cannot be used, or None.
        absent: the columns that the row does not have, which are None in `values`.
    """

    id: str
    number: int
    values: Mapping[str, Any]
    error: str | None = None
    absent: frozenset[str] = frozenset()

    @property
    def source(self) -> dict[str, Any]:
        """The columns that the row has."""
        return {name: value for name, value in self.values.items() if name not in self.absent}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All rows of the input.

    Attributes:
        rows: in the order of the input.
        columns: the columns of all rows together.
        fingerprint: a hash of all rows in their order.
    """

    rows: list[Row]
    columns: tuple[str, ...]
    fingerprint: str


def read(
    source: str, *, config: str | None = None, split: str = "train", id_column: str | None = None, limit: int | None = None
) -> Rows:
    """Read the input, or its first `limit` rows.

    Raises:
        ValueError: an input that cannot be opened or has no rows; a split or an id column that it does not have.
    """
    return _read(open_input(source, config, split), source, id_column, limit)


def _read(opened: Iterable[Any], source: str, id_column: str | None = None, limit: int | None = None) -> Rows:
    rows: list[Row] = []
    columns: dict[str, None] = dict.fromkeys(getattr(opened, "column_names", ()))
    seen: dict[str, int] = {}
    whole = hashlib.sha256()
    for number, found in enumerate(islice(opened, limit)):
        values, digest, error = _examine(found)
        whole.update(digest.encode())
        columns.update(dict.fromkeys(values))
        name, error = _name(values, id_column, digest[:16], error)
        seen[name] = times = seen.get(name, 0) + 1
        if times > 1:
            if id_column and error is None:
                error = f"its {id_column!r}, {name!r}, is the id of an earlier row; ids must differ"
            name = f"{name}-{times}"
        rows.append(Row(id=name, number=number, values=values, error=error))
    if not rows:
        raise ValueError(f"input={source!r} has no rows")
    if id_column is not None and columns and id_column not in columns:
        raise ValueError(f"id_column={id_column!r} is not a column of {source!r}; its columns are {sorted(columns)}")
    return Rows(rows=[_filled(row, columns) for row in rows], columns=tuple(columns), fingerprint=whole.hexdigest()[:16])


def read_dataset(
    source: str | Path, *, config: str | None = None, split: str = "train", drop_bad_rows: bool = False
) -> Dataset:
    """Read the same rows as `read`, as a dataset for training. Each row of the result equals `Row.values`.

    A column has the Arrow type that gives back all its values exactly. Where there is none (texts beside conversations, 408
    beside 3.5, messages with different keys), it is a `datasets.Json` column, whose values come back as they were written.

    Args:
        source: a file or a folder, or a dataset of the Hub.
        config: the configuration of a dataset that has several.
        split: the split of a folder or dataset; a file has only one.
        drop_bad_rows: drop the rows that cannot be read, with a warning, instead of raising.

    Raises:
        ValueError: as `read`; rows that cannot be read (their number, the first one's index and its reason).
    """
    import datasets

    opened = open_input(str(source), config, split)
    if isinstance(opened, datasets.Dataset) and len(opened):
        return opened
    rows = _read(opened, str(source))
    good = [row.values for row in rows.rows if row.error is None]
    if problem := _problem(rows, str(source)):
        if not (drop_bad_rows and good):
            raise ValueError(f"{problem}. Correct or remove these rows, or set drop_bad_rows=True to use the others")
        warnings.warn(f"drop_bad_rows: {problem}", stacklevel=2)
    columns = {name: _column([values[name] for values in good]) for name in rows.columns}
    table = datasets.table.InMemoryTable.from_pydict({name: array for name, (array, _) in columns.items()})
    info = datasets.DatasetInfo(features=datasets.Features({name: feature for name, (_, feature) in columns.items()}))
    return datasets.Dataset(table, info=info)


def _problem(rows: Rows, source: str) -> str | None:
    bad = [row for row in rows.rows if row.error is not None]
    if not bad:
        return None
    first = f"the first is row {bad[0].number} (from 0): {bad[0].error}"
    return f"{len(bad)} of {len(rows.rows)} rows of {source!r} cannot be used; {first}"


# -- rows ---------------------------------------------------------------------------------------------------------------


def _examine(found: Mapping[str, Any] | str) -> tuple[dict[str, Any], str, str | None]:
    """Return the values of a record, a hash of them, and the reason why it cannot be used (or None)."""
    if isinstance(found, str):
        return {}, _digest(found), found
    try:
        values = {key: _known(value) for key, value in found.items()}
        return values, _digest(values), _no_text(values)
    except RecursionError:
        return {}, _digest("too deep"), "its values are nested too deeply"


def _name(values: Mapping[str, Any], id_column: str | None, default: str, error: str | None) -> tuple[str, str | None]:
    given = values.get(id_column) if id_column else default
    return (default, error or f"it has no {id_column!r} (id_column)") if given is None else (str(given), error)


def _filled(row: Row, columns: Mapping[str, None]) -> Row:
    """Return the row with None in the columns that it does not have, as Parquet has it."""
    absent = columns.keys() - row.values.keys()
    if not absent or not row.values:
        return row
    return dataclasses.replace(row, values={name: row.values.get(name) for name in columns}, absent=frozenset(absent))


def _known(value: Any) -> Any:
    """Replace NaN by None, at any depth."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    return [_known(item) for item in value] if isinstance(value, list) else value


def _no_text(values: Mapping[str, Any]) -> str | None:
    r"""Return why UTF-8 cannot hold a row, or None: half of a surrogate pair, which JSON can write as "\ud800"."""
    try:
        canonical(values).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"it has {error.object[error.start]!r}, which is half of a surrogate pair and no character"
    return None


def _digest(found: Any) -> str:
    """Hash the content of a record. Null and absent are the same, as they are in Parquet."""
    return hashlib.sha256(canonical(without_nones(found)).encode("utf-8", "surrogatepass")).hexdigest()


# -- columns ------------------------------------------------------------------------------------------------------------


def _column(values: Sequence[Any]) -> tuple[Any, Any]:
    """Return an Arrow array of the values and its `datasets` feature: a type that gives back each value exactly, or JSON."""
    import pyarrow as pa
    from datasets.features.features import generate_from_arrow_type

    try:
        array = pa.array(values)
        if _written(array.to_pylist()) == _written(values):
            return array, generate_from_arrow_type(array.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    texts = [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
    return pa.array(texts, pa.string()).cast(pa.json_()), _json_feature()


def _written(values: Sequence[Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=repr)


def _json_feature() -> Any:
    from osd.data.json_feature import ExactJson  # imports datasets

    return ExactJson()
