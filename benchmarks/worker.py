"""One system in a process of its own: start it, time it, and write what is known after every shape.

    python -m benchmarks.worker job.json out.json        (benchmarks/sampling.py does this)

How a shape is timed, the same for every system. The same random prompts are sampled three times:

    fresh   N tokens for prompts never seen: what a caller waits for, prefill included
    first   1 token for the same prompts, which a system with a prefix cache has now seen
    seen    N tokens for the same prompts

ms per step = (seen - first) / (N - 1): all sequences decode together at this batch size and the prefill cancels, whether it
comes from a cache or is done again. ms with prefill = fresh / N. Both from the fastest and from the median of the repeats.
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
    """Start a system; also how long the imports, the constructor and the first token took, in seconds."""
    clock = [time.perf_counter()]
    build = _builder(name, job)
    clock.append(time.perf_counter())
    system = build()
    clock.append(time.perf_counter())
    system.generate([[1] * 8], 2)  # what is compiled or loaded on first use belongs to the start
    clock.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    return system, {"import_s": seconds[0], "construct_s": seconds[1], "first_use_s": seconds[2], "ready_s": sum(seconds[1:])}


def _builder(name: str, job: Job) -> Callable[[], System]:
    """The system's constructor, with what it needs imported. Not more: importing osd.engine changes vLLM's defaults."""
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
    raise ValueError(f"no system is called {name!r}")


def measure(system: System, shape: dict[str, Any], vocab_size: int, repeats: int, shape_seconds: float) -> list[dict[str, Any]]:
    """A row for each variant of one shape (the record on; off as well where that is asked for).

    The variants take turns, so that a machine that slows down slows all of them. At most ``repeats`` rounds; no further one
    once ``shape_seconds`` have passed.
    """
    batch_size, prompt_tokens, new_tokens = (shape[key] for key in ("batch_size", "prompt_tokens", "new_tokens"))

    def prompts(*name: object) -> list[list[int]]:
        rng = random.Random(repr((batch_size, prompt_tokens, *name)))  # the same for every system
        return [[rng.randrange(100, vocab_size) for _ in range(prompt_tokens)] for _ in range(batch_size)]

    def seconds(ids: list[list[int]], tokens: int, record: bool) -> float:
        begin = time.perf_counter()
        outputs = system.generate(ids, tokens, record=record)
        end = time.perf_counter()
        lengths = {len(output) for output in outputs}
        if len(outputs) != batch_size or lengths != {tokens}:
            raise RuntimeError(f"asked for {batch_size} x {tokens} tokens, and got {len(outputs)} of lengths {sorted(lengths)}")
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
                seconds(ids, 1, record)  # only to have the prompts seen
            lists["first"].append(seconds(ids, 1, record))
            lists["seen"].append(seconds(ids, new_tokens, record))
        if time.perf_counter() - begin > shape_seconds:
            break
    shape = {key: value for key, value in shape.items() if key != "record_off_too"}
    rows = [{**shape, "record": record, **step_times(lists, new_tokens)} for record, lists in times.items()]
    rows[0]["observed"] = system.observed()
    return rows


def step_times(times: dict[str, list[float]], new_tokens: int) -> dict[str, Any]:
    """Milliseconds per step from the seconds of each run; None where noise left nothing to divide."""
    row: dict[str, Any] = {}
    for suffix, choose in (("", min), ("_median", median)):
        step = (choose(times["seen"]) - choose(times["first"])) / (new_tokens - 1) * 1e3
        row[f"ms_per_step{suffix}"] = step if step > 0 else None
        if times["fresh"]:
            row[f"ms_with_prefill{suffix}"] = choose(times["fresh"]) / new_tokens * 1e3
    return row | {"seconds": times}


def run(spec: dict[str, Any], write: Callable[[Written], None]) -> Written:
    """Start and time the system that ``spec`` names; ``write`` is called whenever more is known."""
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
