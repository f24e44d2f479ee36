"""Worker process that starts one system, times it, and writes the results after every shape.

    python -m benchmarks.worker job.json out.json        (started by benchmarks/sampling.py)

Every system is timed in the same way. The same random prompts are sampled three times:

    fresh   N tokens for new prompts: the time a caller waits, including prefill
    first   1 token for the same prompts, which are now in the prefix cache if there is one
    seen    N tokens for the same prompts

ms per step = (seen - first) / (N - 1): all sequences decode together at this batch size, and the prefill cancels, cached or
not. ms with prefill = fresh / N. Both are computed from the fastest and from the median of the repeats.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.process import Written, guarded, serve
from benchmarks.systems import Job, System

WARM_UP_TOKENS = 8


def start(name: str, job: Job) -> tuple[System, dict[str, float]]:
    """Start a system. Returns it with the seconds of the imports, the constructor and the first token."""
    clock = [time.perf_counter()]
    build = _builder(name, job)
    clock.append(time.perf_counter())
    system = build()
    clock.append(time.perf_counter())
    system.generate([[1] * 8], 2)  # counts compilation and loading on first use as part of the start
    clock.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    return system, {"import_s": seconds[0], "construct_s": seconds[1], "first_use_s": seconds[2], "ready_s": sum(seconds[1:])}


def _builder(name: str, job: Job) -> Callable[[], System]:
    """Return the constructor of a system, after importing its packages.

    Imports nothing else: importing osd.engine changes vLLM's defaults.
    """
    from benchmarks import systems

    if name in ("teacher", "student"):
        from vllm import LLM  # noqa: F401

        return lambda: systems.Single(job, getattr(job, name))
    if name == "paired":
        import osd.engine.engine  # noqa: F401

        return lambda: systems.Paired(job)
    if name == "transformers":
        from transformers import AutoModelForCausalLM  # noqa: F401

        return lambda: systems.LockStep(job)
    if name == "nested":
        from benchmarks import nested

        return lambda: nested.Nested(job)
    raise ValueError(f"unknown system {name!r}")


def measure(system: System, shape: dict[str, Any], vocab_size: int, repeats: int, shape_seconds: float) -> list[dict[str, Any]]:
    """Time one shape and return a row for each variant: record on, and also off if the shape asks for it.

    The variants alternate, so that a machine that slows down affects all of them. Runs at most ``repeats`` rounds, and
    starts no further round after ``shape_seconds``.
    """
    batch_size, prompt_tokens, new_tokens = (shape[key] for key in ("batch_size", "prompt_tokens", "new_tokens"))

    def prompts(*name: object) -> list[list[int]]:
        rng = random.Random(repr((batch_size, prompt_tokens, *name)))  # equal for every system
        return [[rng.randrange(100, vocab_size) for _ in range(prompt_tokens)] for _ in range(batch_size)]

    def seconds(ids: list[list[int]], tokens: int, record: bool) -> float:
        begin = time.perf_counter()
        outputs = system.generate(ids, tokens, record=record)
        end = time.perf_counter()
        lengths = {len(output) for output in outputs}
        if len(outputs) != batch_size or lengths != {tokens}:
            raise RuntimeError(
                f"asked for {batch_size} sequences of {tokens} tokens, "
                f"got {len(outputs)} sequences of lengths {sorted(lengths)}"
            )
        return end - begin

    variants = (True, False) if shape["record_off_too"] else (True,)
    times: dict[bool, dict[str, list[float]]] = {v: {"fresh": [], "first": [], "seen": []} for v in variants}
    for record in variants:
        seconds(prompts("warm-up", record), min(WARM_UP_TOKENS, new_tokens), record)
    begin = time.perf_counter()
    for repeat in range(repeats):
        for record, lists in times.items():
            ids = prompts(repeat, record)
            if record:
                lists["fresh"].append(seconds(ids, new_tokens, record))
            else:
                seconds(ids, 1, record)  # puts the prompts into the prefix cache
            lists["first"].append(seconds(ids, 1, record))
            lists["seen"].append(seconds(ids, new_tokens, record))
        if time.perf_counter() - begin > shape_seconds:
            break
    shape = {key: value for key, value in shape.items() if key != "record_off_too"}
    rows = [{**shape, "record": record, **step_times(lists, new_tokens)} for record, lists in times.items()]
    rows[0]["observed"] = system.observed()
    return rows


def step_times(times: dict[str, list[float]], new_tokens: int) -> dict[str, Any]:
    """Return milliseconds per step from the seconds of each run. None if noise makes the difference negative."""
    row: dict[str, Any] = {}
    for suffix, choose in (("", min), ("_median", median)):
        step = (choose(times["seen"]) - choose(times["first"])) / (new_tokens - 1) * 1e3
        row[f"ms_per_step{suffix}"] = step if step > 0 else None
        if times["fresh"]:
            row[f"ms_with_prefill{suffix}"] = choose(times["fresh"]) / new_tokens * 1e3
    return row | {"seconds": times}


def run(spec: dict[str, Any], write: Callable[[Written], None]) -> Written:
    """Start and time the system named in ``spec``. Calls ``write`` with partial results before every shape."""
    started: list[System] = []

    def measure_all(result: Written) -> None:
        job = Job(**spec["job"])
        system, result["start"] = start(spec["system"], job)
        started.append(system)
        result["settings"] = system.settings
        for shape in spec["shapes"]:
            write(result)
            result["rows"] += measure(system, shape, job.shared_vocab(), spec["repeats"], spec["shape_seconds"])

    result = guarded(measure_all, write)
    if result["status"] == "ok":
        started[0].close()
    return result


if __name__ == "__main__":
    serve(run)
