"""Results of a study on disk: loading, the choices that follow from them, and checks that they are of different runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

Result = dict[str, Any]
SATURATED = 0.95  # of the final accuracy: training longer gains little


def load(folder: Path) -> list[Result]:
    """Load all results of a folder, in the order of their names; an absent folder has none."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def check_distinct(results: Iterable[Result]) -> None:
    """Refuse two runs with the same losses, tokens and final loss elsewhere: an option or a seed of one had no effect.

    Raises:
        RuntimeError: naming both runs.
    """
    seen: dict[str, Any] = {}
    for result in results:
        trace = json.dumps([result["steps"]["loss"], result["steps"]["tokens"], result["elsewhere"]])
        if trace in seen:
            raise RuntimeError(
                f"two runs have the same losses; an arm, seed or option had no effect: {seen[trace]}, {result['run']}"
            )
        seen[trace] = result["run"]


def check_comparable(results: Iterable[Result]) -> None:
    """Refuse runs of one task that were measured on different rows, or trained on different ones.

    Raises:
        RuntimeError: naming the task.
    """
    digests: dict[str, str] = {}
    for result in results:
        data = json.dumps(result["data"], sort_keys=True)
        if digests.setdefault(result["run"]["task"], data) != data:
            raise RuntimeError(f"the runs of task {result['run']['task']!r} have different rows; report them apart")


def frozen(tuning: Iterable[Result]) -> dict[tuple[str, str], dict[str, Any]]:
    """Choose learning rate and length of every task and loss, from runs of the on-policy arm and validation rows alone.

    The learning rate has the best final accuracy (the smaller KL decides between equals). The length is the first measured
    step at which the mean accuracy is SATURATED of the final one.
    """
    groups: dict[tuple[str, str], dict[float, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in tuning:
        run = result["run"]
        groups[run["task"], run["loss"]][run["learning_rate"]].append(result)
    return {key: _chosen(by_rate) for key, by_rate in groups.items()}


def _chosen(by_rate: dict[float, list[Result]]) -> dict[str, Any]:
    def final(rate: float) -> tuple[float, float]:
        ends = [result["curve"][-1] for result in by_rate[rate]]
        return fmean(end["validation"] for end in ends), -fmean(end["kl_teacher"] or 0.0 for end in ends)

    rate = max(sorted(by_rate), key=final)
    curves = [result["curve"] for result in by_rate[rate]]
    means = [(points[0]["step"], fmean(point["validation"] for point in points)) for points in zip(*curves, strict=True)]
    length = next(step for step, mean in means if step and mean >= SATURATED * means[-1][1])
    return {"learning_rate": rate, "steps": length if means[-1][1] > 0 else means[-1][0]}
