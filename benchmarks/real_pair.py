"""Benchmark of drafts on a real pair, whose acceptance is its own (`--pair demo` or `healed` of benchmarks/speculation.py).

    demo     student and teacher are SmolLM2-135M-Instruct; the teacher also reads the answer
    healed   the same teacher; the student has a third of the layers, fine-tuned for about a minute on a GPU

The prompts are bookings (studies/quality/tasks.py), different on each side. All engines are alive at once, each in a process of
its own, and take turns: what slows the machine down for a while slows all of them. Every turn samples the same number of
tokens, which end inside most answers. Acceptance is the share of accepted drafts, and beside it what the record says of the
same positions: the mean of min(1, π_θ/q*) over their tokens, which is 1 - TV(q*, π_θ) on average.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process import ROOT
from benchmarks.systems import Job, Paired
from benchmarks.worker import start, step_times

PAIRS, SIDES = ("demo", "healed"), ("teacher", "student")
TASK = "bookings"
WARM_UP = 2  # turns that are not counted; "auto" has its first steps in them
RESAMPLES = 10_000


def make_models(pair: str, folder: Path, base: Path | None, layers: int | None, steps: int) -> tuple[str, str, dict[str, Any]]:
    """Return teacher, student, and how the student was made; healing runs in a process of its own, which frees the GPU."""
    from studies.quality.models import smollm2

    teacher = smollm2() if base is None else str(base)
    if pair == "demo":
        return teacher, teacher, {}
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.real_pair", teacher, str(folder / "healed"), str(layers or 0), str(steps)]
    subprocess.run(command, check=True, cwd=ROOT)
    return (
        teacher,
        str(folder / "healed"),
        {"layers": layers or "a third", "steps": steps, "seconds": time.perf_counter() - began},
    )


def heal(base: str, path: str, layers: int, steps: int) -> None:
    """Write a student with `layers` layers of `base` (0: a third), fine-tuned on rows that the benchmark does not use."""
    from transformers import AutoConfig

    from studies.quality.models import Recipe, make
    from studies.quality.tasks import TASKS

    layers = layers or AutoConfig.from_pretrained(base).num_hidden_layers // 3
    make(Path(path), base, TASKS[TASK], Recipe(layers=layers, steps=steps))


def prompts(teacher: str, student: str, count: int) -> list[tuple[list[int], list[int]]]:
    """Return token ids of the teacher's and the student's prompt of validation rows."""
    from transformers import AutoTokenizer

    from osd.prompts import encode_all
    from studies.quality.tasks import TASKS

    task = TASKS[TASK]
    rows = task.rows("validation", count)
    sides = ((teacher, task.teacher_prompt), (student, task.student_prompt))
    ids = [encode_all(AutoTokenizer.from_pretrained(path), [prompt(row) for row in rows]) for path, prompt in sides]
    return list(zip(*ids, strict=True))


# -- the processes of the engines ----------------------------------------------------------------------------------------

_systems: list[Any] = []  # of this process
_completions: list[Any] = []  # of its turns, for the record


def begin(name: str, job: dict[str, Any]) -> None:
    """Start the engine of this process."""
    alone = name in SIDES
    if alone:  # at vLLM's default, which importing osd.engine in the main module may have changed
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    _systems.append(start(name if alone else "paired", Job(**job))[0])


def turn(pairs: list[tuple[list[int], list[int]]], tokens: int, side: int) -> float:
    """Return the seconds of one call; `side` is which prompt a single model reads."""
    [system] = _systems
    pair = isinstance(system, Paired)
    began = time.perf_counter()
    outputs = system.generate_pairs(pairs, tokens) if pair else system.generate([prompts[side] for prompts in pairs], tokens)
    seconds = time.perf_counter() - began
    if {len(output) for output in outputs} != {tokens}:
        raise RuntimeError(f"asked for {len(pairs)} sequences of {tokens} tokens, got {[len(output) for output in outputs]}")
    if pair and tokens > 1:
        _completions.extend(system.completions)
    return seconds


def observed() -> dict[str, float]:
    """Return what the record says of all turns since the last call."""
    [system] = _systems
    if isinstance(system, Paired):
        system.completions = _completions[:]
        _completions.clear()
    return system.observed()


def settings() -> Any:
    return _systems[0].settings


@contextmanager
def engines(jobs: dict[str, dict[str, Any]], env: dict[str, str]) -> Iterator[dict[str, Callable[..., Any]]]:
    """Start an engine in a process of its own for each job, one after the other; give a way to call functions there."""
    os.environ |= env
    with ExitStack() as stack:
        pools = {}
        for name, job in jobs.items():
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), begin, (name, job)))
            pools[name].submit(settings).result()
            print(f"{name}: started", flush=True)
        yield {name: lambda f, *args, pool=pool: pool.submit(f, *args).result() for name, pool in pools.items()}


# -- the measurement -----------------------------------------------------------------------------------------------------


def measure(
    calls: dict[str, Callable[..., Any]], pairs: list[tuple[list[int], list[int]]], tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Time all engines in turn; returns a row for each. The order of the turns is drawn anew for each repeat."""
    draw = random.Random(0)
    times: dict[str, dict[str, list[float]]] = {name: {"fresh": [], "first": [], "seen": []} for name in calls}
    for repeat in range(-WARM_UP, repeats):
        for name in draw.sample(list(calls), len(calls)):
            side = int(name == "student")
            # The prompts are in the prefix cache, except in the first turn, which is not counted.
            first, seen = (calls[name](turn, pairs, count, side) for count in (1, tokens))
            if repeat >= 0:
                times[name]["first"].append(first)
                times[name]["seen"].append(seen)
    shape = {"kind": "batch", "batch_size": len(pairs), "new_tokens": tokens, "acceptance": None}
    rows = {name: {**shape, **step_times(of, tokens), "observed": calls[name](observed)} for name, of in times.items()}
    if "0" in rows:
        for name in rows.keys() - {*SIDES, "0"}:
            rows[name]["over_no_drafts"] = over(times[name]["seen"], times["0"]["seen"])
    return rows


def over(seconds: list[float], reference: list[float]) -> dict[str, Any]:
    """Return the ratio of the median times of two engines with its 95 % interval, a bootstrap over paired repeats.

    A machine that stops for a while gives a few times that are many times longer; `of_totals` has them in it.
    """
    both = np.array([seconds, reference])
    drawn = np.random.default_rng(0).integers(both.shape[1], size=(RESAMPLES, both.shape[1]))
    above, below = np.median(both[:, drawn], axis=-1)
    return {
        "ratio": float(np.divide(*np.median(both, axis=-1))),
        "interval": [float(q) for q in np.quantile(above / below, [0.025, 0.975])],
        "of_totals": float(np.divide(*both.sum(axis=-1))),
    }


def job(args: argparse.Namespace, teacher: str, student: str, drafts: str, longest: int) -> dict[str, Any]:
    """Return the job of an engine (see benchmarks.systems.Job)."""
    small = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}  # so that all engines fit side by side
    return {
        "teacher": teacher,
        "student": student,
        "dtype": args.dtype,
        "random_weights": False,
        "gpu": args.gpu,
        "max_model_len": longest + args.new_tokens,
        "max_num_seqs": max(args.batch_sizes),
        "engine_kwargs": {**small, **args.engine_kwargs},
        "num_speculative_tokens": drafts,
    }


if __name__ == "__main__":
    heal(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
