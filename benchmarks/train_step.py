"""Benchmark of a training step: OSDTrainer and TRL's DistillationTrainer with vLLM in colocate mode, in one run.

    python benchmarks/train_step.py                                    # Qwen2.5 shapes, 3B teacher, 0.5B student, one GPU
    python benchmarks/train_step.py --completions 256 --micro-batch 16
    python benchmarks/train_step.py --pair tiny+tiny --prompt-tokens 8 --new-tokens 8 --completions 4 --micro-batch 2 --steps 2

trl            samples from the student in vLLM, then runs a transformers teacher over the samples
trl_autocast   the same with the loss under autocast: TRL 1.16 computes in float32 although bf16=True
osd            samples from q* with student and teacher in one vLLM engine, and trains against the recorded teacher

Equal for all systems: models (random weights, saved once, logits of standard deviation --logit-std), prompts (no prompt occurs
twice), number of tokens of every prompt and completion (EOS is ignored), completions per optimizer step and per pass, loss
(reverse KL), optimizer and dtypes. Each model of an engine gets a KV cache for the same number of tokens, so that memory peaks
are comparable. Only `trl` computes its passes in float32, so use osd_over_trl_autocast for comparisons. All other settings are
TRL's defaults, and the engine settings are part of the result. Each system runs in a separate process with its own empty
compile caches. benchmarks/train_worker.py describes the timing of a step and its parts.

The methods differ: OSD decodes two models, TRL one; TRL runs the teacher over every sample, OSD does not. TRL's teacher reads
the student's prompt, so here OSD's teacher does too. The time of a decoding step hardly depends on the number of completions,
and the time of TRL's teacher grows with the number of tokens. So the ratio depends mostly on the number of completions.

Prints a table and writes a JSON after each system, so finished results are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks.process import (
    GPU,
    MULTIPROCESSING,
    ROOT,
    Written,
    accelerate,
    environment,
    exit_on_sigterm,
    header,
    nothing,
    result_path,
    run_worker,
)
from benchmarks.shapes import config, parse_pair
from benchmarks.stopwatch import PARTS

SYSTEMS = {"trl": "TRL DistillationTrainer", "trl_autocast": "TRL DistillationTrainer, autocast", "osd": "OSDTrainer"}
ROOM = 64  # extra tokens of KV cache per completion: the last block of each sequence is not full


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__, SYSTEMS, list(SYSTEMS))
    return checked(options, options.parse_args(argv))


def parser(description: str | None, systems: dict[str, str], default: list[str]) -> argparse.ArgumentParser:
    """Return the options of a benchmark of training steps with these systems."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", default="3B+0.5B", help="TEACHER+STUDENT as Qwen2.5 shapes of one vocabulary (default: %(default)s)")
    add("--systems", nargs="+", choices=systems, default=default, metavar="SYSTEM", help=f"of {', '.join(systems)}")
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, default=512)
    add("--completions", type=int, default=32, help="per optimizer step (default: %(default)s)")
    add("--micro-batch", type=int, default=8, help="completions per forward and backward pass (default: %(default)s)")
    add("--warm-up", type=int, default=2, help="steps that are not counted (default: %(default)s)")
    add("--steps", type=int, default=5, help="steps timed as a whole, and as many timed by part (default: %(default)s)")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if GPU else "float32",
        help="dtype of engines and teacher",
    )
    add("--student-dtype", choices=("bfloat16", "float32"), default="float32", help="dtype of the trained weights; float32 "
        "with bfloat16 elsewhere is TRL's default, mixed precision")  # fmt: skip
    add("--gradient-checkpointing", action="store_true")
    add("--sleep", action="store_true", help="the engines free their memory while the student trains")
    add("--learning-rate", type=float, default=1e-6)
    add("--logit-std", type=float, default=4.0, help="standard deviation of the logits of the random weights")
    add("--engine-kwargs", type=json.loads, default={}, metavar="JSON", help="vLLM engine arguments for both")
    add("--models", type=Path, help="folder for the random models, used again by the next run with the same --pair")
    add("--processes", type=int, default=1, help="that train, one per GPU (default: %(default)s)")
    add("--tensor-parallel-size", type=int, default=1, help="processes that hold one engine together (default: %(default)s)")
    add("--accelerate-config", default="fsdp2" if GPU else "cpu_ddp", help="of configs/accelerate, for several processes")
    add("--time-limit", type=float, help="seconds for the whole run; finished results are kept")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    return parser


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments, or end the program with what is wrong with them."""
    teacher, student = parse_pair(args.pair)
    if config(teacher)["vocab_size"] != config(student)["vocab_size"]:
        parser.error(f"--pair {args.pair}: TRL's trainer needs two models of one vocabulary size")
    if args.completions % (args.micro_batch * args.processes):
        processes = f" times --processes {args.processes}" if args.processes > 1 else ""
        parser.error(f"--completions {args.completions} must be a multiple of --micro-batch {args.micro_batch}{processes}")
    if args.processes % args.tensor_parallel_size:
        parser.error(f"--tensor-parallel-size {args.tensor_parallel_size} must divide --processes {args.processes}")
    if min(args.steps, args.warm_up) < 1:
        parser.error("--steps and --warm-up must be at least 1")
    return args


def job(args: argparse.Namespace, models: Path, output: Path) -> dict[str, Any]:
    """Return the job of a worker (see benchmarks.train_worker.TrainJob)."""
    same = ("dtype", "student_dtype", "prompt_tokens", "new_tokens", "completions", "micro_batch", "warm_up", "steps")
    same += ("gradient_checkpointing", "sleep", "learning_rate", "engine_kwargs", "processes", "tensor_parallel_size")
    return {
        "teacher": str(models / "teacher"),
        "student": str(models / "student"),
        "gpu": GPU,
        "kv_tokens": args.completions * (args.prompt_tokens + args.new_tokens + ROOM),
        "output_dir": str(output),
        **{name: getattr(args, name) for name in same},
    }


def launcher(args: argparse.Namespace) -> list[str]:
    """Return the launcher of a worker in several processes, or nothing for one."""
    return accelerate(args.accelerate_config, args.processes) if args.processes > 1 else []


def make_models(args: argparse.Namespace, folder: Path) -> Path:
    """Save random checkpoints of both models. The files are then in the page cache, so no system waits for the disk.

    Those of --models are used as they are.
    """
    if args.models is not None and (args.models / "student" / "config.json").exists():
        return args.models
    folder = args.models or folder
    teacher, student = parse_pair(args.pair)
    command = [sys.executable, "-m", "benchmarks.checkpoints", str(folder), "--teacher", teacher, "--student", student]
    command += ["--dtype", args.dtype, "--logit-std", str(args.logit_std)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(folder / "caches"))
    return folder


def summarise(systems: dict[str, Written], ours: str = "osd") -> dict[str, Any]:
    """Return the medians of each system, and those of the system `ours` divided by those of each other."""
    of = {name: medians(system) for name, system in systems.items() if system["status"] == "ok"}
    osd = of.get(ours, {})
    ratios = {
        f"{ours}_over_{name}": {key: value / of[name][key] for key, value in osd.items() if of[name].get(key)}
        for name in of
        if osd and name != ours
    }
    return of | ratios


def medians(system: Written) -> dict[str, float]:
    """Return seconds of a step and of its parts, sampled tokens per second, and memory peaks in GB."""
    job, step = system["trainer"], median(system["step_s"])
    tokens = job["completions"] * job["new_tokens"]
    memory = {f"{name}_gb": size / 1e9 for name, size in system["memory_bytes"].items() if name.endswith("peak")}
    parts = {f"{part}_s": median(parts[part] for parts in system["parts_s"]) for part in PARTS}
    whole = median(sum(parts.values()) for parts in system["parts_s"])
    return {"step_s": step, "tokens_per_s": tokens / step, "instrumented_step_s": whole, **parts, **memory}


def table(summary: dict[str, Any]) -> str:
    if not summary:
        return "nothing was measured"
    lines = [" " * 24 + "".join(f"{name:>23}" for name in summary)]
    for key in next(iter(summary.values())):
        cells = (f"{column[key]:23.3f}" if key in column else f"{'–':>23}" for column in summary.values())
        lines.append(f"{key:>24}{''.join(cells)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return run_systems(parse_args(argv), argv, "train_step", SYSTEMS, measured)


def measured(args: argparse.Namespace, spec: dict[str, Any], folder: Path, left: float | None) -> dict[str, Any]:
    """Run one system's worker; return what it wrote."""
    env = environment(folder / f"caches-{spec['system']}") | {MULTIPROCESSING: "0", "HF_HUB_OFFLINE": "1"}
    return run_worker(spec, env, folder, left, "benchmarks.train_worker", launcher(args))


def run_systems(
    args: argparse.Namespace,
    argv: list[str] | None,
    script: str,
    names: dict[str, str],
    measured: Callable[..., dict[str, Any]],
    ours: str = "osd",
) -> int:
    """Measure the systems one after another, and write the result after each; returns the exit status.

    Args:
        script: name of the benchmark, without ".py".
        names: of the systems, for the reader.
        measured: called as `measured` above.
        ours: the system that `summarise` compares the others with.
    """
    begin = time.monotonic()
    command = ["python", f"benchmarks/{script}.py", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {**header(command, vars(args)), "systems": {}, "summary": {}}
    path = result_path(args.output, f"{script}_{args.pair}", result["hardware"]["device"])
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        folder = Path(scratch)
        say(begin, f"saving {args.pair} with random weights ...")
        models = make_models(args, folder / "models")
        for system in args.systems:
            say(begin, f"{names[system]} ...")
            left = None if args.time_limit is None else args.time_limit - (time.monotonic() - begin)
            spec = {"system": system, "job": job(args, models, folder / f"output-{system}")}
            none_left = left is not None and left <= 0
            result["systems"][system] = nothing("no time was left") if none_left else measured(args, spec, folder, left)
            result["summary"] = summarise(result["systems"], ours)
            path.write_text(json.dumps(result, indent=1) + "\n")
            say(begin, describe(result["systems"][system]))
    print(f"\n{table(result['summary'])}\n\nwritten to {path}")
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


def describe(system: Written) -> str:
    if system["error"]:
        return f"FAILED: {system['error']}\n{system.get('log', '')[-3000:]}"
    return f"ready in {system['start']['ready_s']:.1f} s; seconds per step {[round(s, 3) for s in system['step_s']]}"


def say(begin: float, text: str) -> None:
    print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
