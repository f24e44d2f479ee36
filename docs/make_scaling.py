"""Write the memory table of docs/scaling.md, by the code of `osd check`. Needs no weights and no network."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkpoints import save_tokenizer
from benchmarks.shapes import config, write_model
from osd.check import TRAINING_BYTES, Report, Wanted, check

PAGE = Path(__file__).with_name("scaling.md")
PAIRS = {  # as they are called, and their shapes
    "8B + 0.6B": ("Qwen3-8B", "Qwen3-0.6B"),
    "14B + 1.5B": ("14B", "1.5B"),
    "32B + 7B": ("32B", "7B"),
}
REQUESTS, LENGTH, RANKS = 64, 4096, 4
MARKS = "<!-- written by docs/make_scaling.py -->", "<!-- to here -->"


def table() -> str:
    """Return the table: GiB of each part of a pair, and of each GPU in each set-up."""
    columns = {name: _column(*shapes) for name, shapes in PAIRS.items()}
    lines = [f"| GiB | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | {' | '.join(f'{column[row] / 2**30:.1f}' for column in columns.values())} |")
    return "\n".join(lines)


def _column(teacher: str, student: str) -> dict[str, float]:
    alone, shared = (
        checked(teacher, student, Wanted(gpus=gpus, max_model_len=LENGTH, max_num_seqs=REQUESTS)) for gpus in (1, RANKS)
    )
    (weights, request), (weights_of_rank, request_of_rank) = _known(alone), _known(shared)
    caches, caches_of_rank = REQUESTS * request, REQUESTS * request_of_rank
    training = TRAINING_BYTES * (alone.sides["student"].parameters or 0)
    head = config(teacher)["vocab_size"] * config(teacher)["hidden_size"] * alone.sides["teacher"].facts.itemsize
    return {
        "weights of both, in 16 bits": weights,
        f"caches of {REQUESTS} requests of {LENGTH:,} tokens": caches,
        "training of the student: float32 weights, gradients, AdamW": training,
        "the teacher's output layer, for `teacher_signal: recorded`": head,
        "**1 GPU**": weights + caches + training + head,
        f"**8 GPUs, tensor parallel {RANKS}, FSDP2**: each": weights_of_rank + caches_of_rank + training / 8 + head,
        f"**4 + 4**: each that serves (tensor parallel {RANKS})": weights_of_rank + caches_of_rank,
        "**4 + 4**: each that trains (FSDP2)": training / 4 + head,
        "**several nodes**: each of 16 that train (FSDP2)": training / 16 + head,
    }


def checked(teacher: str, student: str, wanted: Wanted) -> Report:
    """Return what `osd check` finds about models of two shapes."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = [write_model(shape, Path(scratch)) for shape in (teacher, student)]
        for path in paths:
            save_tokenizer(path, 64)
            save_file({}, path / "model.safetensors")  # `osd check` refuses a folder without weights
        report = check(*map(str, paths), wanted)
    assert not report.status, (report.sampling, report.training)
    return report


def _known(report: Report) -> tuple[float, int]:
    needed = report.needed()
    assert needed is not None, "the layers of these models are known"
    return needed


def page() -> str:
    """Return the page with its table computed again."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
