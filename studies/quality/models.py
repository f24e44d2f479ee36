"""Models of the studies: SmolLM2-135M-Instruct, and for the capacity gap a teacher and a smaller student made from it.

The teacher is SmolLM2 fine-tuned on worked solutions. The student keeps a part of its layers and is fine-tuned for a few
steps, so that it writes the form but not the right results. Everything follows from fixed seeds.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from examples.smollm2 import MARKER as PREPARED
from examples.smollm2 import prepare_smollm2
from osd.prompts import encode
from studies.quality.runs import ON_GPU, load
from studies.quality.tasks import SPLITS, TASKS, Row, Task

ROOT = Path(__file__).resolve().parent.parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
MARKER = "made.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Recipe of a model of the capacity study.

    Attributes:
        layers: layers that are kept, at equal distances, the first and the last among them; None: all.
        steps, batch, learning_rate: of AdamW on references, with linear warm-up and decay.
    """

    layers: int | None
    steps: int
    batch: int = 32
    learning_rate: float = 3e-4
    seed: int = 0


TASK = "long_sums"
TEACHER = Recipe(layers=None, steps=600)
STUDENT = Recipe(layers=15, steps=150, seed=1)


def smollm2() -> str:
    return str(prepare_smollm2(SMOLLM2, dtype="float32"))


def make(path: Path, base: str, task: Task, recipe: Recipe) -> str:
    """Make a model at `path` unless it is there; returns the path.

    Raises:
        ValueError: another model is there.
    """
    wanted = {"base": Path(base).name, "task": task.name, **dataclasses.asdict(recipe)}
    if path.exists():
        marker = path / MARKER
        if marker.is_file() and json.loads(marker.read_text()) == wanted:
            return str(path)
        raise ValueError(f"{path.name} exists and was not made by {wanted}; remove it or choose another folder")
    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)
    if recipe.layers is not None:
        keep_layers(model, recipe.layers)
    fine_tune(model, tokenizer, task, recipe)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / MARKER).write_text(json.dumps(wanted, indent=1) + "\n")
    part.rename(path)
    return str(path)


def described(path: str) -> dict[str, Any]:
    """Return the name of a model and how it was made, for results."""
    for marker in (MARKER, PREPARED):
        if (file := Path(path) / marker).is_file():
            return {"name": Path(path).name, **json.loads(file.read_text())}
    return {"name": Path(path).name}


def keep_layers(model: Any, count: int) -> None:
    """Remove all but `count` layers of a Llama model in place."""
    layers = model.model.layers
    if not 1 <= count <= len(layers):
        raise ValueError(f"layers={count} must be from 1 to {len(layers)}")
    kept = [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]
    model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = count
    model.config.layer_types = None


def new_rows(task: Task, seed: int) -> Iterator[Row]:
    """Yield rows outside all splits of the study."""
    taken = {row["message"] for split in SPLITS for row in task.rows(split)}
    return (row for row in task.make(f"models {seed}") if row["message"] not in taken)


def fine_tune(model: Any, tokenizer: Any, task: Task, recipe: Recipe) -> None:
    """Train on references of new rows, in place: cross-entropy on their tokens and the end of the turn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (recipe.steps - step) / max(recipe.steps - warm_up, 1))
    )
    rows = new_rows(task, recipe.seed)
    model.train()
    for _ in range(recipe.steps):
        inputs = batch(tokenizer, task, list(islice(rows, recipe.batch)))
        with torch.autocast("cuda" if ON_GPU else "cpu", dtype=torch.bfloat16, enabled=ON_GPU):
            loss = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def batch(tokenizer: Any, task: Task, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Return right-padded ids, mask and labels of prompts with their references; prompts have no label."""
    pairs = []
    for row in rows:
        prompt = encode(tokenizer, task.student_prompt(row))
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        pairs.append((prompt, [*answer, tokenizer.eos_token_id]))
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def capacity_pair(folder: Path, base: str, teacher: Recipe, student: Recipe) -> tuple[str, str]:
    """Return teacher and student of the capacity study, made in `folder` if they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[TASK]
    return make(folder / "teacher", base, task, teacher), make(folder / "student", base, task, student)
