"""What a run has written, and what it still has to: shards that are whole or absent, and one commit per shard.

    data-00000-of-00002-000003.parquet      shard 3 of process 0 of 2
    rejected.jsonl                          input that could not be used, and why
    run.json                                what made the data: settings, models, versions
    summary.json                            the counts, once every process is done
    state/00000-of-00002.json               how far process 0 is: the commit

A shard is written to a temporary file, synced and renamed; then the rejected lines are appended and synced; then the state
is replaced. Only the state counts: what a killed run wrote after its last state is written again by the next one, under the
same names, and the rejected lines beyond the state are cut off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from osd.data.samples import SCHEMA, Sample

RUN, SUMMARY, REJECTED, STATE = "run.json", "summary.json", "rejected.jsonl", "state"


@dataclass
class Counts:
    """What became of the samples; `drawn` is `kept` and everything in `removed`."""

    drawn: int = 0
    kept: int = 0
    rejected: int = 0
    tokens: int = 0
    alpha_sum: float = 0.0
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def alpha_mean(self) -> float:
        """Mean α of all tokens drawn."""
        return self.alpha_sum / self.tokens if self.tokens else math.nan

    def __add__(self, other: Counts) -> Counts:
        removed = {name: self.removed.get(name, 0) + other.removed.get(name, 0) for name in {**self.removed, **other.removed}}
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine if name != "removed"}, removed=removed)


@dataclass
class State:
    """How far a process is: finished shards, length of its rejected lines in bytes, counts, and whether that is all."""

    shards: int = 0
    rejected_bytes: int = 0
    finished: bool = False
    counts: Counts = field(default_factory=Counts)


class Store:
    """The output folder of one process.

    Args:
        folder: where to.
        format: "parquet" or "jsonl".
        place: (i, n), this process and how many there are.

    Use: `open`, then `commit` for every shard from `state.shards` on, then `finish`.
    """

    def __init__(self, folder: Path, format: str, place: tuple[int, int]) -> None:
        self.folder, self.format = folder, format
        self.index, self.total = place
        self.state = State()

    # -- beginning ------------------------------------------------------------------------------------------------------

    def check(self, run: Mapping[str, Any], *, resume: bool) -> None:
        """Whether this run may write here; changes nothing.

        Args:
            run: what makes the data. `run["settings"]` must be what an earlier run's was, if that has written any.

        Raises:
            ValueError: the folder has another run's data, or this run's and `resume` is off.
        """
        self._check_place()
        if not self._begun():
            return
        if not (self.folder / RUN).exists():
            raise ValueError(f"output={str(self.folder)!r} has data and no {RUN}; write to another folder")
        self._check_same(_read_json(self.folder / RUN)["settings"], run["settings"])
        if not resume and self._state_path().exists():
            raise ValueError(f"output={str(self.folder)!r} has this run's data already; add --resume to go on with it")

    def open(self, run: Mapping[str, Any], *, resume: bool) -> None:
        """Claim the folder for a run, or take an interrupted one up. Raises as `check`."""
        self.check(run, resume=resume)
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        for part in (*self.folder.glob(".*.part"), *(self.folder / STATE).glob(".*.part")):
            if part.name.endswith(f"-{self._place()}.part"):  # left by a killed run of this process
                part.unlink()
        if not (self.folder / RUN).exists() or not self._begun():
            self._write_whole(self.folder / RUN, json_text(run).encode())  # every process writes the same
        if self._state_path().exists():
            self.state = self._read_state(self._state_path())
        self._cut_rejected()
        self._write_state()

    def _check_place(self) -> None:
        """Whether there is a folder, or can be one."""
        nearest = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise ValueError(f"output={str(self.folder)!r} cannot be a folder: {str(nearest)!r} is a file")
        if not os.access(nearest, os.W_OK):
            raise ValueError(f"output={str(self.folder)!r} cannot be written: {str(nearest)!r} is not yours to write to")

    def _begun(self) -> bool:
        """Whether any process has finished a shard here."""
        states = [path for path in (self.folder / STATE).glob("*.json") if not path.name.startswith(".")]
        return any(self.folder.glob("data-*")) or any(self._read_state(path).shards for path in states)

    def _check_same(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in {**earlier, **now}:
            if earlier.get(name) != now.get(name):
                raise ValueError(
                    f"output={str(self.folder)!r} was made with {name}={earlier.get(name)!r}, and this run has "
                    f"{name}={now.get(name)!r}; go on with the earlier setting, or write to another folder"
                )

    def _cut_rejected(self) -> None:
        path = self.rejected_path()
        if path.exists():
            os.truncate(path, self.state.rejected_bytes)

    # -- shards ---------------------------------------------------------------------------------------------------------

    def commit(self, samples: Sequence[Sample], rejected: Sequence[Mapping[str, Any]], counts: Counts) -> None:
        """Write the next shard with what was kept of it, what was rejected, and then that it is done."""
        self._write_shard(self.shard_path(self.state.shards), samples)
        if rejected:
            self._append_rejected(rejected)
        self.state.shards += 1
        self.state.counts = self.state.counts + counts
        self._write_state()

    def _write_shard(self, path: Path, samples: Sequence[Sample]) -> None:
        if not samples:
            path.unlink(missing_ok=True)
            return
        part = self._part(path)
        if self.format == "parquet":
            pq.write_table(pa.Table.from_pylist(list(samples), schema=SCHEMA), part)
        else:
            _write(part, b"".join(_json_line(sample) for sample in samples))
        _replace(part, path)

    def _append_rejected(self, rejected: Sequence[Mapping[str, Any]]) -> None:
        with self.rejected_path().open("ab") as file:
            file.write(b"".join(_json_line(entry) for entry in rejected))
            file.flush()
            os.fsync(file.fileno())
            self.state.rejected_bytes = file.tell()

    def _write_state(self) -> None:
        path = self._state_path()
        part = self._part(path)
        _write(part, json_text(asdict(self.state)).encode())
        _replace(part, path)

    def finish(self) -> Counts | None:
        """Say that this process is done; the counts of all processes together if every one is, else None.

        The last one also writes summary.json, and rejected.jsonl from the parts of each.
        """
        self.state.finished = True
        self._write_state()
        states = [self._state_path(i) for i in range(self.total)]
        if not all(path.exists() for path in states):
            return None
        read = [self._read_state(path) for path in states]
        if not all(state.finished for state in read):
            return None
        counts = sum((state.counts for state in read), Counts())
        if self.total > 1:
            parts = [path for i in range(self.total) if (path := self.rejected_path(i)).exists()]
            self._write_whole(self.folder / REJECTED, b"".join(path.read_bytes() for path in parts))
        self._write_whole(
            self.folder / SUMMARY, json_text(finite({**asdict(counts), "alpha_mean": counts.alpha_mean})).encode()
        )
        return counts

    def _write_whole(self, path: Path, data: bytes) -> None:
        part = self._part(path)
        _write(part, data)
        _replace(part, path)

    # -- names ----------------------------------------------------------------------------------------------------------

    def shard_path(self, number: int) -> Path:
        """The file of this process's shard of that number."""
        return self.folder / f"data-{self._place()}-{number:06d}.{self.format}"

    def rejected_path(self, index: int | None = None) -> Path:
        """Where a process's rejected input goes: rejected.jsonl itself if it is the only process."""
        return self.folder / REJECTED if self.total == 1 else self.folder / STATE / f"{self._place(index)}.{REJECTED}"

    def first_reason(self, *, whole: bool) -> str:
        """Why the first rejected input was rejected: of this process, or of all when all are done."""
        with (self.folder / REJECTED if whole else self.rejected_path()).open(encoding="utf-8") as lines:
            return str(json.loads(next(lines))["reason"])

    def _state_path(self, index: int | None = None) -> Path:
        return self.folder / STATE / f"{self._place(index)}.json"

    def _place(self, index: int | None = None) -> str:
        return f"{self.index if index is None else index:05d}-of-{self.total:05d}"

    def _part(self, path: Path) -> Path:
        """A temporary name of this process, on the same file system, that no reader takes for data."""
        return path.with_name(f".{path.name}-{self._place()}.part")

    @staticmethod
    def _read_state(path: Path) -> State:
        written = _read_json(path)
        return State(**{**written, "counts": Counts(**written["counts"])})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); write to another folder") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)


def _replace(part: Path, path: Path) -> None:
    """Put a finished temporary file in its place, so that after a crash there is the old file or the new one, whole."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_text(value: Any) -> str:
    """Indented JSON, for a file to be read by people too."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"


def _json_line(value: Mapping[str, Any]) -> bytes:
    """One line of JSON. It has no infinities: a log-probability of -inf becomes null."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, default=str)
    return (text + "\n").encode("utf-8", "replace")


def finite(value: Any) -> Any:
    """A copy that JSON can hold: null where a number is infinite or none."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None  # nine digits hold every float32
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_data_file(path: Path) -> bool:
    """Whether a file of an output folder is a shard."""
    return path.name.startswith("data-") and path.suffix in (".parquet", ".jsonl")
