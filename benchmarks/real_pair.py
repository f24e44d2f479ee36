"""Benchmark of drafts on a real pair, whose acceptance is its own (`--pair demo` or `healed` of benchmarks/speculation.py).

    demo     student and teacher are SmolLM2-135M-Instruct; the teacher also reads the answer
    healed   the same teacher; the student has a third of the layers, fine-tuned for about a minute on a GPU

The prompts are bookings (studies/quality/tasks.py), different on each side. Every turn samples the same number of tokens,
which end inside most answers. Acceptance is the share of accepted drafts, and beside it what the record says of the same
positions: the mean of min(1, π_θ/q*) over their tokens, which is 1 - TV(q*, π_θ) on average.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT

PAIRS = ("demo", "healed")
TASK = "bookings"


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


if __name__ == "__main__":
    heal(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
