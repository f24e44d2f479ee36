"""One run of the study: a student trained by one arm on a running engine, measured on the way; its result as plain JSON.

A result depends on its `Run` and the models alone, not on what the engine did before: the student is loaded from its files,
the trainer's syncs push it into the engine, and both prefix caches are empty at the start.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from osd import OSDConfig
from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from osd.prompts import encode_all
from osd.train.fields import changed
from studies.quality import tasks
from studies.quality.arms import ARMS, LOSSES, check_sampled_as, mixing_at, trainer_class
from studies.quality.tasks import TASKS, Row, Task

ON_GPU = torch.cuda.is_available()
GENERAL_TEXT = Path(__file__).parent / "general.txt"
FRACTIONS = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)  # of the run, where it is measured
STEP_METRICS = {
    "loss": "loss",
    "osd/alpha/mean": "alpha",
    "osd/q/kl_student": "kl_q_student",
    "osd/q/kl_teacher": "kl_q_teacher",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides a run.

    Attributes:
        task, arm, loss: of TASKS, ARMS and LOSSES.
        seed: of the order of the prompts, and of every draw.
        steps, batch: optimizer steps, and completions per step.
        limit: held-out rows to measure on; validation: validation rows.
        points: at most so many measurements, the first before training and the last after it.
        cross_check: held-out rows that transformers completes too, after training.
    """

    task: str
    arm: str
    loss: str
    seed: int
    learning_rate: float
    steps: int
    batch: int = 8
    limit: int = tasks.SPLITS["held_out"]
    validation: int = tasks.SPLITS["validation"]
    points: int = len(FRACTIONS)
    cross_check: int = 32

    @property
    def name(self) -> str:
        """Name of the result's file, without its suffix."""
        arm = self.arm.replace("*", "star").replace(" ", "-")
        return f"{self.task}_{self.loss}_{arm}_lr{self.learning_rate:g}_{self.steps}steps_seed{self.seed}"

    def measured_at(self) -> set[int]:
        """Return the steps at which the student is measured."""
        last = len(FRACTIONS) - 1
        chosen = {round(i * last / max(self.points - 1, 1)) for i in range(self.points)}
        return {round(self.steps * FRACTIONS[i]) for i in chosen} | {0, self.steps}


def start_engine(teacher: str, student: str) -> PairEngine:
    """Start the engine that all runs of a process share."""
    kwargs: dict[str, Any] = {"max_model_len": 384, "max_num_seqs": 256, "use_tqdm_on_load": False, "seed": 0}
    if ON_GPU:  # a small share of the memory, so that several processes fit
        kwargs |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 4 << 30}
        # The processes start at the same time, and without torch.compile that takes a third of the time.
        kwargs["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    else:
        kwargs |= {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
    return PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=kwargs))


def execute(run: Run, engine: PairEngine) -> dict[str, Any]:
    """Train and measure one student. Returns the result, without the description of the machine.

    Raises:
        RuntimeError: held-out or validation rows in the training data; completions that were not sampled as the arm says.
    """
    task = TASKS[run.task]
    rows = {
        "train": task.columns(task.rows("train")),
        "held_out": task.columns(task.rows("held_out", run.limit)),
        "validation": task.columns(task.rows("validation", run.validation)),
    }
    tasks.check_unseen(rows["train"], rows["held_out"] + rows["validation"])
    engine.reset_prefix_cache()
    student = load(engine.config.student)
    before = general_loss(student, engine.student_tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(run, student, Dataset.from_list(rows["train"]), engine, folder)
        watch = Watch(run, trainer, task)
        trainer.train()
    result = {
        "run": dataclasses.asdict(run),
        "arm": ARMS[run.arm],
        "configuration": configuration(trainer.args),
        "data": {name: {"rows": len(part), "digest": tasks.digest(part)} for name, part in rows.items()},
        "curve": watch.curve,
        "steps": {name: [step[name] for step in watch.steps] for name in watch.steps[0]},
        "elsewhere": {"before": before, "after": general_loss(trainer.model, engine.student_tokenizer)},
        "cross_check": cross_check(trainer.model, task, engine, run),
    }
    del trainer, watch, student
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()  # for the other processes
    return result


def make_trainer(run: Run, student: Any, data: Dataset, engine: PairEngine, folder: str) -> Any:
    """Build the trainer of a run; all arms share its options, except those that define the arm."""
    args = OSDConfig(
        output_dir=folder,
        max_completion_length=TASKS[run.task].max_new_tokens,
        per_device_train_batch_size=run.batch,
        max_steps=run.steps,
        beta=LOSSES[run.loss],
        learning_rate=run.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        adam_beta2=0.95,
        weight_decay=0.0,
        seed=run.seed,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not ON_GPU,
        bf16=ON_GPU,
        **ARMS[run.arm],
    )
    return trainer_class(run.arm)(model=student, args=args, train_dataset=data, engine=engine)


class Watch(TrainerCallback):
    """Measurements of a run. The clock stands still while the student is measured.

    Attributes:
        curve: of every measurement: step, completion tokens and seconds of training until then, and `measure`'s figures.
        steps: of every step: loss, mean α, both KLs of q per token (nats), tokens, seconds.
    """

    def __init__(self, run: Run, trainer: Any, task: Task) -> None:
        self.run, self.trainer, self.task = run, trainer, task
        self.rows = task.rows("held_out", run.limit), task.rows("validation", run.validation)
        self.curve: list[dict[str, Any]] = []
        self.steps: list[dict[str, float]] = []
        self.tokens, self.seconds, self.started = 0, 0.0, 0.0
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.measure(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = now() - self.started
        completions = self.trainer.vllm_generation.last_batch.completions
        sampled = [c.record for c in completions if c.record is not None and not c.error]
        check_sampled_as(mixing_at(self.run.arm, state.global_step - 1, self.run.steps), sampled)
        tokens = sum(len(c.token_ids) for c in completions)
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.steps.append({"tokens": tokens, "seconds": round(seconds, 4)})
        if state.global_step in self.run.measured_at():
            self.measure(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.steps[-1] |= {name: finite(logs[key]) for key, name in STEP_METRICS.items()}

    def measure(self, step: int) -> None:
        generation = self.trainer.vllm_generation
        generation.sync_weights()
        held_out, validation = self.rows
        figures = measure(generation.engine, self.task, held_out + validation)
        marks = figures.pop("right")
        self.curve.append(
            {
                "step": step,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 3),
                "accuracy": sum(marks[: len(held_out)]) / len(held_out),
                "validation": sum(marks[len(held_out) :]) / len(validation),
                **figures,
            }
        )


def untrain(engine: PairEngine) -> None:
    """Push the student's own files into the engine, which may have a trained student, and empty both prefix caches."""
    engine.load_student_weights(load(engine.config.student).named_parameters())
    engine.reset_prefix_cache()


def measure(engine: PairEngine, task: Task, rows: list[Row], alpha: float = 0.0) -> dict[str, Any]:
    """Complete prompts greedily with the student alone (α = 0) or the teacher alone (α = 1).

    Returns `right` of every row; the share of completions that `finished`; their mean `length` in tokens; and with α = 0
    `kl_teacher`, the mean KL(student ‖ teacher) per token, in nats, at the states that the student itself reaches.
    """
    completions = complete(engine, task, rows, {"temperature": 0.0}, alpha)
    texts = [engine.tokenizer.decode(c.token_ids, skip_special_tokens=True).strip() for c in completions]
    kl_N = torch.cat([c.record.kl_teacher for c in completions if c.record is not None])
    return {
        "right": [task.right(text, row["answer"]) for text, row in zip(texts, rows, strict=True)],
        "finished": sum(c.finish_reason == "stop" for c in completions) / len(rows),
        "length": sum(len(c.token_ids) for c in completions) / len(rows),
        "kl_teacher": finite(kl_N.mean().item()),
    }


def complete(engine: PairEngine, task: Task, rows: list[Row], sampling: dict[str, Any], alpha: float | None) -> list[Any]:
    """Complete the prompts of both sides in one call, leaving torch's random state, which seeds training, as it was."""
    sides = ((engine.tokenizer, task.teacher_prompt), (engine.student_tokenizer, task.student_prompt))
    teacher, student = (encode_all(tokenizer, [prompt(row) for row in rows]) for tokenizer, prompt in sides)
    prompts = [PairPrompt(teacher_token_ids=t, student_token_ids=s) for t, s in zip(teacher, student, strict=True)]
    with torch.random.fork_rng(devices=[]):
        return engine.generate(prompts, sampling={"max_tokens": task.max_new_tokens, **sampling}, alpha=alpha)


@torch.inference_mode()
def cross_check(model: Any, task: Task, engine: PairEngine, run: Run) -> dict[str, Any]:
    """Complete some held-out prompts with transformers too: the measurement does not rest on OSD's engine alone."""
    rows = task.rows("held_out", min(run.cross_check, run.limit))
    if not rows:
        return {"rows": 0, "transformers": 0, "engine": 0}
    model.eval()
    tokenizer = engine.student_tokenizer
    prompts = {"input_ids": encode_all(tokenizer, [task.student_prompt(row) for row in rows])}
    inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=task.max_new_tokens)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [task.right(text.strip(), row["answer"]) for text, row in zip(texts, rows, strict=True)]
    return {"rows": len(rows), "transformers": sum(right), "engine": sum(measure(engine, task, rows)["right"])}


@torch.inference_mode()
def general_loss(model: Any, tokenizer: Any, window: int = 256) -> float:
    """Return the loss on a fixed general text, in nats per token: what training costs elsewhere."""
    model.eval()
    ids_N = torch.tensor(tokenizer(GENERAL_TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    total, count = 0.0, 0
    for ids in ids_N.split(window):
        if len(ids) > 1:
            inputs = ids[None].to(model.device)
            total += model(inputs, labels=inputs).loss.item() * (len(ids) - 1)
            count += len(ids) - 1
    return total / count


def load(path: str) -> Any:
    """Load a model in float32 on the device of the study."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to("cuda" if ON_GPU else "cpu")


def configuration(args: OSDConfig) -> dict[str, Any]:
    """Return the fields of a trainer's configuration that are not at their defaults, without local paths."""
    names = [name for name in args.__dataclass_fields__ if changed(args, name) and not name.endswith("_dir")]
    plain = args.to_dict()
    return {name: plain[name] for name in sorted(names)}


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def finite(value: float) -> float | None:
    """Return None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None
