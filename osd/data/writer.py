"""Writing of a run's output: shards that are whole or absent, with one commit per shard.

    data-00000-of-00002-000003.parquet      shard 3 of process 0 of 2
    rejected.jsonl                          input that could not be used, with reasons
    run.json                                what made the data: settings, models, versions, the date in the prompts
    summary.json                            the counts, once every process is done
    state/00000-of-00002.json               the progress of process 0: the commit

A commit writes a shard to a temporary file, syncs and renames it, appends the rejected lines and syncs them, and then replaces
the state. Only the state decides: the next run overwrites a shard that has no state, and cuts off rejected lines beyond it.
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
from osd.data.strict_json import finite, json_line, json_text

RUN, SUMMARY, REJECTED, STATE = "run.json", "summary.json", "rejected.jsonl", "state"
STARTED = "started"  # key of run.json: local time of the run's first start, which chat templates print as today's date


@dataclass
class Counts:
    """Numbers of samples; `drawn` is `kept` and all of `removed`."""

    drawn: int = 0
    kept: int = 0
    rejected: int = 0
    tokens: int = 0
    alpha_sum: float = 0.0
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def alpha_mean(self) -> float:
        """Mean α of all drawn tokens; NaN if there are none."""
        return self.alpha_sum / self.tokens if self.tokens else math.nan

    def __add__(self, other: Counts) -> Counts:
        removed = {name: self.removed.get(name, 0) + other.removed.get(name, 0) for name in {**self.removed, **other.removed}}
        left, right = asdict(self), asdict(other)
        return Counts(**{name: left[name] + right[name] for name in left if name != "removed"}, removed=removed)


@dataclass
class State:
    """Progress of a process.

    Attributes:
        shards: committed shards.
        tasks: finished tasks, all of them in the committed shards.
        rejected_bytes: length of the committed rejected lines.
        finished: True after the last task.
        counts: of the finished tasks.
    """

    shards: int = 0
    tasks: int = 0
    rejected_bytes: int = 0
    finished: bool = False
    counts: Counts = field(default_factory=Counts)


class Store:
    """The output folder of one process.

    Args:
        folder: the output folder.
        format: "parquet" or "jsonl".
        place: (i, n): process i of n.

    Use: `open`, then `commit` for the tasks from `state.tasks` on, shard by shard, then `finish`.
    """

    def __init__(self, folder: Path, format: str, place: tuple[int, int]) -> None:
        self.folder, self.format = folder, format
        self.index, self.total = place
        self.state = State()

    # -- start ----------------------------------------------------------------------------------------------------------

    def check(self, run: Mapping[str, Any], *, resume: bool) -> None:
        """Check that this run may write here; change nothing.

        Args:
            run: what makes the data. `run["settings"]` must equal that of an earlier run that wrote data here.

        Raises:
            ValueError: the folder has data of another run, or of this run and `resume` is off.
        """
        self._check_place()
        if not self._begun():
            return
        if not (self.folder / RUN).exists():
            raise ValueError(f"output={str(self.folder)!r} has data and no {RUN}; write to another folder")
        self._check_same(_read_json(self.folder / RUN)["settings"], run["settings"])
        if not resume and self._state_path().exists():
            raise ValueError(f"output={str(self.folder)!r} has this run's data already; add --resume to go on with it")

    def open(self, run: Mapping[str, Any], *, resume: bool) -> dict[str, Any]:
        """Claim the folder for a run, or continue an interrupted run. Raises as `check`.

        Returns:
            What run.json has: `run`, or what the first process of this run wrote there. Processes that start together and
            runs that are resumed therefore agree on `run[STARTED]`.
        """
        self.check(run, resume=resume)
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        for part in (*self.folder.glob(".*.part"), *(self.folder / STATE).glob(".*.part")):
            if part.name.endswith(f"-{self._place()}.part"):  # left by a killed run of this process
                part.unlink()
        written = self._claim(run)
        if self._state_path().exists():
            self.state = self._read_state(self._state_path())
        self._cut_rejected()
        self._write_state()
        return written

    def _claim(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Write run.json unless it is there; return its content."""
        path = self.folder / RUN
        if path.exists() and not self._begun() and {**_read_json(path), STARTED: run.get(STARTED)} != run:
            path.unlink(missing_ok=True)  # of an attempt with other settings that wrote no data
        part = self._part(path)
        _write(part, json_text(run).encode())
        try:
            os.link(part, path)  # unlike a rename, this fails if another process was first
        except FileExistsError:
            part.unlink()
        except OSError:  # a file system without hard links
            _replace(part, path) if not path.exists() else part.unlink()
        else:
            part.unlink()
            _sync_folder(path.parent)
        return dict(_read_json(path))

    def _check_place(self) -> None:
        """Check that the folder can be written, or made."""
        nearest = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise ValueError(f"output={str(self.folder)!r} cannot be a folder: {str(nearest)!r} is a file")
        if not os.access(nearest, os.W_OK):
            raise ValueError(f"output={str(self.folder)!r} cannot be written: no permission to write to {str(nearest)!r}")

    def _begun(self) -> bool:
        """Return whether any process has finished a shard here."""
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

    def commit(self, samples: Sequence[Sample], rejected: Sequence[Mapping[str, Any]], counts: Counts, tasks: int) -> None:
        """Write the next shard: the kept samples and the rejected input of the next `tasks` tasks."""
        self._write_shard(self.shard_path(self.state.shards), samples)
        if rejected:
            self._append_rejected(rejected)
        self.state.shards += 1
        self.state.tasks += tasks
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
            file.write(b"".join(json_line(entry) for entry in rejected))
            file.flush()
            os.fsync(file.fileno())
            self.state.rejected_bytes = file.tell()

    def _write_state(self) -> None:
        path = self._state_path()
        part = self._part(path)
        _write(part, json_text(asdict(self.state)).encode())
        _replace(part, path)

    def finish(self) -> Counts | None:
        """Mark this process as finished. Return the counts of all processes if all have finished, else None.

        The last process also writes summary.json, and joins the rejected lines of all in rejected.jsonl. No process waits for
        another.
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
            self.write_whole(self.folder / REJECTED, b"".join(path.read_bytes() for path in parts))
        self.write_whole(self.folder / SUMMARY, json_text(finite({**asdict(counts), "alpha_mean": counts.alpha_mean})).encode())
        return counts

    def write_whole(self, path: Path, data: bytes) -> None:
        """Write a file atomically."""
        part = self._part(path)
        _write(part, data)
        _replace(part, path)

    # -- names ----------------------------------------------------------------------------------------------------------

    def shard_path(self, number: int) -> Path:
        """Return the file of shard `number` of this process."""
        return self.folder / f"data-{self._place()}-{number:06d}.{self.format}"

    def rejected_path(self, index: int | None = None) -> Path:
        """Return the file for the rejected input of a process: rejected.jsonl itself if it is the only process."""
        return self.folder / REJECTED if self.total == 1 else self.folder / STATE / f"{self._place(index)}.{REJECTED}"

    def first_reason(self, *, whole: bool) -> str:
        """Return the reason of the first rejection: of this process, or (`whole`) of all after the last has finished."""
        with (self.folder / REJECTED if whole else self.rejected_path()).open(encoding="utf-8") as lines:
            return str(json.loads(next(lines))["reason"])

    def _state_path(self, index: int | None = None) -> Path:
        return self.folder / STATE / f"{self._place(index)}.json"

    def _place(self, index: int | None = None) -> str:
        return f"{self.index if index is None else index:05d}-of-{self.total:05d}"

    def _part(self, path: Path) -> Path:
        """Return a temporary name of this process, on the same file system, that no reader takes for data."""
        return path.with_name(f".{path.name}-{self._place()}.part")

    @staticmethod
    def _read_state(path: Path) -> State:
        written = _read_json(path)
        if written.keys() != State.__dataclass_fields__.keys():
            raise ValueError(f"{str(path)!r} is of another version of osd; write to another folder")
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
    """Sync a temporary file and rename it: after a crash, the old file or the new one is there, whole."""
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


def _json_line(sample: Mapping[str, Any]) -> bytes:
    """Write one sample as a line of JSON; a log-probability of -inf becomes null."""
    return json_line(finite(sample))


def is_data_file(path: Path) -> bool:
    """Return whether a file of an output folder is a shard."""
    return path.name.startswith("data-") and path.suffix in (".parquet", ".jsonl")
