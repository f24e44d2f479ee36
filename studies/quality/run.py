"""Run a study: does sampling from q* make better students?

    python studies/quality/run.py privileged --seeds 5 --processes 4
    python studies/quality/run.py capacity --seeds 5 --processes 4
    python studies/quality/run.py privileged --phases sweep --seeds 5 --processes 4

privileged: student and teacher are SmolLM2-135M-Instruct; the teacher also reads the answer.
capacity: a fine-tuned SmolLM2 teaches one of half its layers; both read the same prompt. Made on the first run.

Phases, in order:
    check    accuracy of student and teacher before training
    compare  `osd compare` on validation prompts: its table and its verdict before training
    tune     the on-policy arm alone, at several learning rates: they fix learning rate and length for all arms
    main     all arms at that learning rate and length
    sweep    (if asked for) all arms at all learning rates

One JSON per run, in a folder for this kind of machine, written when the run is finished. A run that has its JSON is skipped,
so the same command continues a study that was stopped. With --processes, several processes share the GPU; each has its own
engine. Use one command per GPU (CUDA_VISIBLE_DEVICES) and divide the tasks between them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # Python adds only this folder to a script's path

from osd.terminal import silence_libraries

silence_libraries()  # before vLLM and transformers are imported
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the trainer passes tensors by reference

from benchmarks.process import commit, hardware, versions
from osd.data.comparison import Arm, compare
from osd.data.pair import EnginePair
from osd.data.settings import CompareConfig
from osd.data.strict_json import finite, json_text
from osd.report.pages import write
from studies.quality import models, results, runs
from studies.quality.arms import ARMS, LOSSES, STUDENT, mixing_at
from studies.quality.runs import Run
from studies.quality.tasks import SPLITS, TASKS

RESULTS = Path(__file__).parent / "results"
STUDIES = {"privileged": ("bookings", "shifts", "contacts"), "capacity": ("long_sums",)}
# A worse teacher has nothing to teach.
TEACHER_AT_LEAST = {"privileged": 0.5, "capacity": 0.85}
PHASES = ("check", "compare", "tune", "main", "sweep")
FURTHER = ("fixed 0.5", "ess_balance")  # arms that `osd compare` draws for the study alone
TUNING_SEEDS = 1000  # the first seed of tuning, which no other run has


@dataclass(frozen=True, kw_only=True)
class Job:
    """One result to make: `kind` is "check", "compare" (of the task `of`) or "run" (a `Run`)."""

    kind: str
    path: Path
    of: str | Run
    rows: int


def main(argv: list[str] | None = None) -> int:
    """Run what is missing of a study; return 1 if a run failed."""
    flags = parse(argv)
    folder = flags.output / flags.study
    teacher, student = make_models(flags)
    with Workers(teacher, student, flags.processes) as workers:
        for phase in flags.phases:
            jobs = [job for job in planned(phase, flags, folder) if not finished(job, teacher, student)]
            print(f"{flags.study}, {phase}: {len(jobs)} to run", flush=True)
            if not workers.do(jobs):
                return 1
            if phase == "check":
                check_teachers(flags, folder)
            results.check_distinct(results.load(folder / ("tune" if phase == "tune" else "runs")))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--seeds", type=int, default=5, help="seeds of every arm (default: %(default)s)")
    add("--processes", type=int, default=1, help="runs at a time, each in a process with its own engine")
    add("--phases", nargs="+", choices=PHASES, default=["check", "compare", "tune", "main"], metavar="PHASE")
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="default: all of the study")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    add("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help="forward and reverse KL")
    add("--learning_rate", type=float, help="of the main phase (default: chosen by the tune phase)")
    add("--steps", type=int, help="optimizer steps of the main phase (default: chosen by the tune phase)")
    add("--learning_rates", nargs="+", type=float, default=[5e-5, 1e-4, 2e-4], help="of the tune and sweep phases")
    add("--tune_steps", type=int, default=128, help="optimizer steps of the tune phase (default: %(default)s)")
    add("--tune_seeds", type=int, default=2)
    add("--batch", type=int, default=8, help="completions per optimizer step (default: %(default)s)")
    add("--limit", type=int, default=SPLITS["held_out"], help="held-out rows (default: %(default)s)")
    add("--validation", type=int, default=SPLITS["validation"], help="validation rows (default: %(default)s)")
    add("--points", type=int, default=len(runs.FRACTIONS), help="measurements of a run (default: %(default)s)")
    add("--cross_check", type=int, default=32, help="held-out rows that transformers completes too (default: %(default)s)")
    add("--teacher_at_least", type=float, help=f"accuracy of the teacher (default: {TEACHER_AT_LEAST})")
    add("--model", help="base model (default: SmolLM2-135M-Instruct, made from its wheel)")
    add("--models", type=Path, default=models.ROOT / "models" / "capacity", help="folder of the capacity study's models")
    add("--teacher_steps", type=int, default=models.TEACHER.steps, help="of the capacity study (default: %(default)s)")
    add("--student_steps", type=int, default=models.STUDENT.steps, help="of the capacity study (default: %(default)s)")
    add("--student_layers", type=int, default=models.STUDENT.layers, help="of the capacity study (default: %(default)s)")
    add("--output", type=Path, help="folder of the results (default: one of this machine in studies/quality/results)")
    flags = parser.parse_args(argv)
    flags.tasks = flags.tasks or list(STUDIES[flags.study])
    flags.output = flags.output or RESULTS / hardware()["device"].lower().replace(",", "").replace(" ", "-")
    for name in ("seeds", "processes", "tune_seeds", "tune_steps", "batch", "limit", "validation"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)} must be at least 1")
    if wrong := set(flags.tasks) - set(STUDIES[flags.study]):
        parser.error(f"--tasks: {', '.join(sorted(wrong))} is not a task of the {flags.study} study")
    if (flags.learning_rate is None) != (flags.steps is None):
        parser.error("--learning_rate and --steps are given together, or both chosen by the tune phase")
    flags.phases = [phase for phase in PHASES if phase in flags.phases]
    if flags.steps is not None and "tune" in flags.phases:
        flags.phases.remove("tune")
    return flags


def make_models(flags: argparse.Namespace) -> tuple[str, str]:
    base = flags.model or models.smollm2()
    if flags.study == "privileged":
        return base, base
    teacher = dataclasses.replace(models.TEACHER, steps=flags.teacher_steps)
    student = dataclasses.replace(models.STUDENT, steps=flags.student_steps, layers=flags.student_layers)
    return models.capacity_pair(flags.models, base, teacher, student)


# -- the runs of a phase -----------------------------------------------------------------------------------------------------


def planned(phase: str, flags: argparse.Namespace, folder: Path) -> Iterator[Job]:
    """Yield all jobs of a phase, seed by seed: a study that is stopped early has whole tables."""
    if phase in ("check", "compare"):
        for task in flags.tasks:
            yield Job(kind=phase, path=folder / phase / f"{task}.json", of=task, rows=flags.validation)
        return
    for run in planned_runs(phase, flags, folder):
        kind = "tune" if phase == "tune" else "runs"
        yield Job(kind="run", path=folder / kind / f"{run.name}.json", of=run, rows=flags.validation)


def planned_runs(phase: str, flags: argparse.Namespace, folder: Path) -> Iterator[Run]:
    fixed = {name: getattr(flags, name) for name in ("batch", "limit", "validation", "points", "cross_check")}
    every = [(task, loss) for task in flags.tasks for loss in flags.losses]
    if phase == "tune":
        for number in range(flags.tune_seeds):
            seed = TUNING_SEEDS + number
            for task, loss in every:
                for rate in flags.learning_rates:
                    yield Run(task=task, arm=STUDENT, loss=loss, seed=seed, learning_rate=rate, steps=flags.tune_steps, **fixed)
        return
    chosen = settings_of(flags, folder)
    for seed in range(flags.seeds):
        for task, loss in every:
            for rate in [chosen[task, loss]["learning_rate"]] if phase == "main" else flags.learning_rates:
                for arm in flags.arms:
                    steps = chosen[task, loss]["steps"]
                    yield Run(task=task, arm=arm, loss=loss, seed=seed, learning_rate=rate, steps=steps, **fixed)


def finished(job: Job, teacher: str, student: str) -> bool:
    """Return whether a job has its result.

    Raises:
        SystemExit: a result of other models, or of a run with other sizes.
    """
    if not job.path.exists():
        return False
    found = json.loads(job.path.read_text(encoding="utf-8"))
    wanted: dict[str, Any] = {"models": described(teacher, student)}
    if isinstance(job.of, Run):
        wanted["run"] = dataclasses.asdict(job.of)
    for name, value in wanted.items():
        if found[name] != value:
            raise SystemExit(
                f"{job.path} has {name} {found[name]}, and this command asks for {value}; use another --output or remove it"
            )
    return True


def described(teacher: str, student: str) -> dict[str, Any]:
    return {"teacher": models.described(teacher), "student": models.described(student)}


def settings_of(flags: argparse.Namespace, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return learning rate and length of every task and loss: as given, or as the tune phase chose them."""
    every = [(task, loss) for task in flags.tasks for loss in flags.losses]
    if flags.steps is not None:
        return {key: {"learning_rate": flags.learning_rate, "steps": flags.steps} for key in every}
    chosen = results.frozen(results.load(folder / "tune"))
    if missing := [key for key in every if key not in chosen]:
        raise SystemExit(f"no tuning runs of {missing}: run the tune phase first, or give --learning_rate and --steps")
    return chosen


def check_teachers(flags: argparse.Namespace, folder: Path) -> None:
    least = TEACHER_AT_LEAST[flags.study] if flags.teacher_at_least is None else flags.teacher_at_least
    for task in flags.tasks:
        found = json.loads((folder / "check" / f"{task}.json").read_text())
        print(f"{task}: student {found['student']['accuracy']:.0%}, teacher {found['teacher']['accuracy']:.0%}", flush=True)
        if found["teacher"]["accuracy"] < least:
            raise SystemExit(f"the teacher of {task} has {found['teacher']['accuracy']:.0%}, below {least:.0%}")


# -- doing them --------------------------------------------------------------------------------------------------------------


class Workers:
    """This process with one engine, or several processes that share the device, each with its own."""

    def __init__(self, teacher: str, student: str, processes: int) -> None:
        self.pair, self.processes, self.began = (teacher, student), processes, False
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.processes > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes)))
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.processes, spawn, initializer=begin, initargs=self.pair)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        elif self.began:
            _engines.pop().close()

    def do(self, jobs: Sequence[Job]) -> bool:
        """Do all jobs; print those that fail, and return False if any did."""
        if not jobs:
            return True
        if self.pool is None:
            if not _engines:
                begin(*self.pair)
                self.began = True
            done = [self._done(job, lambda job=job: work(job, self.processes)) for job in jobs]
        else:
            futures = {self.pool.submit(work, job, self.processes): job for job in jobs}
            done = [self._done(futures[future], future.result) for future in as_completed(futures)]
        return all(done)

    @staticmethod
    def _done(job: Job, finish: Any) -> bool:
        try:
            finish()
        except Exception:
            print(f"failed: {job.path.stem}\n{traceback.format_exc()}", flush=True)
            return False
        print(f"done: {job.path.stem}", flush=True)
        return True


_engines: list[Any] = []  # of this process: none or one


def begin(teacher: str, student: str) -> None:
    """Start the engine of this process."""
    _engines.append(runs.start_engine(teacher, student))


def work(job: Job, processes: int) -> None:
    """Do one job with this process's engine and write its result, whole or not at all."""
    [engine] = _engines
    head = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": {**hardware(), "processes": processes},
        "versions": versions(),
        "models": described(engine.config.teacher, engine.config.student),
    }
    made = {"check": check, "compare": compared, "run": lambda run, rows, engine: runs.execute(run, engine)}
    result = {**head, **made[job.kind](job.of, job.rows, engine)}
    write(job.path, json_text(finite(result)))


def check(task: str, rows: int, engine: Any) -> dict[str, Any]:
    """Measure student and teacher on validation rows, before training."""
    runs.untrain(engine)
    chosen = TASKS[task].rows("validation", rows)
    found: dict[str, Any] = {}
    for side, alpha in (("student", 0.0), ("teacher", 1.0)):
        figures = runs.measure(engine, TASKS[task], chosen, alpha)
        right = figures.pop("right")
        found[side] = {"right": sum(right), "accuracy": sum(right) / len(right), **figures}
    return {"task": task, "rows": rows, **found}


def compared(task: str, rows: int, engine: Any) -> dict[str, Any]:
    """Run `osd compare` on validation rows with the engine that trains later, and keep its table and verdict."""
    runs.untrain(engine)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in TASKS[task].columns(TASKS[task].rows("validation", rows))))
        settings = CompareConfig(
            model_name_or_path=engine.config.student,
            teacher_model_name_or_path=engine.config.teacher,
            input=str(data),
            output=folder,
            answer_column="answer",
            answer_match=TASKS[task].grader,
            max_completion_length=TASKS[task].max_new_tokens,
            linear_weights=[0.1, 0.5],
            limit=rows,
            quiet=True,
        )
        further = [Arm(name=name, mixing=mixing_at(name, 0, 1)) for name in FURTHER]
        result = compare(settings, lambda settings: EnginePair(settings, engine=engine), further)
    return {"task": task, **{key: result[key] for key in ("prompts", "quality", "arms", "verdict")}}


if __name__ == "__main__":
    sys.exit(main())
