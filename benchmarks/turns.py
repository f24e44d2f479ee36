"""Engines that take turns, each in a process of its own: what slows the machine down for a while slows all of them.

The order of the turns is drawn anew in every round. A turn samples one token for each prompt, then N of them, with the prompts
in the prefix cache: ms per token = (seconds of N - seconds of one) / (N - 1).
"""

from __future__ import annotations

import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from benchmarks.systems import Job, Paired
from benchmarks.worker import WARM_UP_TOKENS, start, step_times

SIDES = ("teacher", "student")
RESAMPLES = 10_000
Prompts = list[tuple[list[int], list[int]]]  # the teacher's and the student's token ids of each request
Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A setting of an engine that one row of the result measures.

    Attributes:
        name: a number of drafts, "auto", "teacher" or "student".
        engine: the engine that it runs on.
        acceptance: the probability that a draft is accepted; None: what the policies say.
        pinned: the number of drafts of an engine that otherwise chooses it; None: what the engine says.
    """

    name: str
    engine: str
    acceptance: float | None = None
    pinned: int | None = None


# -- in the process of an engine -----------------------------------------------------------------------------------------

_systems: list[Any] = []
_completions: dict[Variant, list[Any]] = defaultdict(list)  # for the record


def begin(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine of this process; returns its settings and how long that took."""
    alone = name in SIDES
    if alone:  # at vLLM's default, which importing osd.engine in the main module may have changed
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    system, seconds = start(name if alone else "paired", Job(**job))
    _systems.append(system)
    return {"settings": system.settings, "start": seconds}


def turn(variant: Variant, pairs: Prompts, tokens: int, keep: bool) -> float:
    """Return the seconds of one call; `keep` adds it to what `observed` returns.

    Raises:
        RuntimeError: a completion has another length.
    """
    [system] = _systems
    pair = isinstance(system, Paired)
    if pair and variant.acceptance is not None:
        system.force_acceptance(variant.acceptance)
    if pair and system.chooses_drafts:
        system.pin_drafts(variant.pinned, variant.acceptance)
    side = int(variant.name == "student")
    began = time.perf_counter()
    outputs = system.generate_pairs(pairs, tokens) if pair else system.generate([prompts[side] for prompts in pairs], tokens)
    seconds = time.perf_counter() - began
    if {len(output) for output in outputs} != {tokens}:
        raise RuntimeError(f"asked for {len(pairs)} sequences of {tokens} tokens, got {[len(output) for output in outputs]}")
    if pair and keep:
        _completions[variant].extend(system.completions)
    return seconds


def observed(variant: Variant) -> dict[str, float]:
    """Return what the record says of the kept turns of a variant, and forget them."""
    [system] = _systems
    if isinstance(system, Paired):
        system.completions = _completions.pop(variant)
    return system.observed()


def end() -> None:
    _systems[0].close()


# -- in the main process -------------------------------------------------------------------------------------------------


@contextmanager
def engines(
    jobs: dict[str, dict[str, Any]], environment: Callable[[str], dict[str, str]]
) -> Iterator[tuple[dict[str, Call], dict[str, dict[str, Any]]]]:
    """Start an engine for each job, all at the same time.

    Yields a way to call the functions above in each process, and what `begin` returned; an engine that did not start has an
    `error` there, and no way to be called.
    """
    with ExitStack() as stack:
        pools, starting = {}, {}
        for name, job in jobs.items():
            os.environ |= environment(name)  # the process inherits it
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            starting[name] = pools[name].submit(begin, name, job)
        started: dict[str, dict[str, Any]] = {}
        for name, future in starting.items():
            try:
                started[name] = future.result()
            except Exception as error:
                started[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: {started[name].get('error', 'started')}", flush=True)
        running = [name for name in jobs if "error" not in started[name]]
        calls = {name: lambda f, *args, pool=pools[name]: pool.submit(f, *args).result() for name in running}
        yield calls, started
        for name in running:
            calls[name](end)


def measure(
    calls: dict[str, Call], variants: list[Variant], pairs: Prompts, tokens: int, repeats: int, seconds: float
) -> Iterator[dict[Variant, dict[str, Any]]]:
    """Time all variants in turns; yields a row for each after every round, and at the end with what the record says.

    Starts no further round after `seconds`. "auto" has its first steps in two turns that are not counted.
    """
    draw = random.Random(0)
    times: dict[Variant, dict[str, list[float]]] = {variant: {"fresh": [], "first": [], "seen": []} for variant in variants}
    for variant in variants:
        for count in [tokens] * 2 if variant.name == "auto" else [min(tokens, WARM_UP_TOKENS)] * 2:
            calls[variant.engine](turn, variant, pairs, count, False)
    began = time.perf_counter()
    for _ in range(repeats):
        for variant in draw.sample(variants, len(variants)):
            for key, count in (("first", 1), ("seen", tokens)):
                times[variant][key].append(calls[variant.engine](turn, variant, pairs, count, key == "seen"))
        yield {variant: row(variant, len(pairs), tokens, of, {}) for variant, of in times.items()}
        if time.perf_counter() - began > seconds:
            break
    rows = {v: row(v, len(pairs), tokens, of, calls[v.engine](observed, v)) for v, of in times.items()}
    none = next((variant for variant in variants if variant.name == "0"), None)
    for variant in variants if none else ():
        if variant.name not in (*SIDES, "0"):
            rows[variant]["over_no_drafts"] = over(times[variant]["seen"], times[none]["seen"])
    yield rows


def row(variant: Variant, batch: int, tokens: int, times: dict[str, list[float]], seen: dict[str, float]) -> dict[str, Any]:
    shape = {"kind": "batch", "batch_size": batch, "new_tokens": tokens, "acceptance": variant.acceptance}
    return {**shape, **step_times(times, tokens), "observed": seen}


def over(seconds: list[float], reference: list[float]) -> dict[str, Any]:
    """Return the ratio of the median times of two variants with its 95 % interval, a bootstrap over paired rounds.

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
