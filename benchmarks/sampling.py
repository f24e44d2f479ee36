"""Benchmark of sampling from two models: five systems in one run.

    python benchmarks/sampling.py --pair 3B+1.5B                    # Qwen2.5 shapes with random weights
    python benchmarks/sampling.py --teacher Qwen/Qwen2.5-3B --student Qwen/Qwen2.5-1.5B
    python benchmarks/sampling.py --pair small+tiny --batch-sizes 2 4 --new-tokens 16 --contexts 16 64   # short run on a CPU

teacher       vLLM with the teacher alone, at its defaults (async scheduling, CUDA graphs)
student       the same with the student alone
paired        OSD: both models in one vLLM engine
transformers  two transformers models with KV caches in lock-step
nested        a logits processor of one vLLM engine calls a second vLLM engine for every token

All systems get the same prompts (random ids), lengths, batch sizes and repeats, and no sequence ends early. Each system runs in
a separate process with its own empty compile caches. A small engine is started and discarded first, so that the files that all
systems read are in memory. benchmarks/worker.py describes the timing of a step. Prints tables and writes a JSON after each
system, so finished results are kept. Writes a plot if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks import process
from benchmarks.process import (
    GPU,
    MULTIPROCESSING,
    ROOT,
    commit,
    exit_on_sigterm,
    hardware,
    nothing,
    result_path,
    run_worker,
    versions,
    without_folders,
)
from benchmarks.shapes import parse_pair, write_model
from benchmarks.summary import SYSTEMS, Result, summarise, tables

SLOW = ("transformers", "nested")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", default="3B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes with random weights (default: %(default)s)")
    add("--teacher", help="path or model id; with --student, instead of --pair")
    add("--student", help="path or model id")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)}")
    add("--batch-sizes", type=int, nargs="*", default=[8, 32, 128])
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, default=512)
    add(
        "--slow-tokens",
        type=int,
        default=64,
        help="new tokens of transformers and nested; low values favour nested, whose cost grows with the length",
    )
    add("--contexts", type=int, nargs="*", default=[256, 4096], help="prompt lengths to compare; empty: skip this comparison")
    add("--context-batch", type=int, default=32)
    add("--context-tokens", type=int, default=128, help="new tokens at each context")
    add("--repeats", type=int, default=3)
    add("--shape-seconds", type=float, default=40, help="start no further repeat of a shape after this many seconds")
    add("--time-limit", type=float, help="seconds for the whole run; a system stopped by it keeps its finished shapes")
    add("--start-only", action="store_true", help="time only the start of each system")
    add("--warm-start", action="store_true", help="also time a second start of each system, with filled compile caches")
    add(
        "--no-prime",
        dest="prime",
        action="store_false",
        help="skip the discarded first start; the first system reads files from disk",
    )
    add("--in-process", nargs="*", choices=SYSTEMS, default=[] if GPU else list(SYSTEMS), metavar="SYSTEM",
        help="systems whose vLLM engine core runs in the worker process (default: none on a GPU, all on a CPU)")  # fmt: skip
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if GPU else "float32")
    add("--alpha-method", default="kl_symmetry")
    add("--logit-std", type=float, default=4.0, help="standard deviation of the logits of random weights")
    add("--engine-kwargs", type=json.loads, default={}, metavar="JSON", help="vLLM engine arguments for every vLLM engine")
    add("--pair-kwargs", type=json.loads, default={}, metavar="JSON", help="further engine arguments for the pair only")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    args = parser.parse_args(argv)
    if (args.teacher is None) != (args.student is None):
        parser.error("--teacher and --student must be given together")
    if min(args.new_tokens, args.slow_tokens, args.context_tokens) < 2:
        parser.error("--new-tokens, --slow-tokens and --context-tokens must be at least 2: one-token runs are subtracted")
    return args


def shapes(system: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the shapes at which a system is timed. The slow systems skip the contexts and get fewer tokens."""
    if args.start_only:
        return []
    tokens = args.slow_tokens if system in SLOW else args.new_tokens
    found = [dict(kind="batch", batch_size=b, prompt_tokens=args.prompt_tokens, new_tokens=tokens) for b in args.batch_sizes]
    if system not in SLOW:
        shape = dict(kind="context", batch_size=args.context_batch, new_tokens=args.context_tokens)
        found += [{**shape, "prompt_tokens": context} for context in args.contexts]
    return [{**shape, "record_off_too": system == "paired" and shape["kind"] == "batch"} for shape in found]


def job(system: str, args: argparse.Namespace, models: tuple[str, str]) -> dict[str, Any]:
    """Return the job of a worker (see benchmarks.systems.Job)."""
    # With --start-only the engine still gets the size that the full run would need.
    planned = shapes(system, argparse.Namespace(**{**vars(args), "start_only": False}))
    return {
        "system": system,
        "shapes": shapes(system, args),
        "repeats": args.repeats,
        "shape_seconds": args.shape_seconds,
        "job": {
            "teacher": models[0],
            "student": models[1],
            "dtype": args.dtype,
            "random_weights": args.teacher is None,
            "gpu": GPU,
            "max_model_len": max([16, *(s["prompt_tokens"] + s["new_tokens"] for s in planned)]),
            "max_num_seqs": max([1, *(s["batch_size"] for s in planned)]),
            "engine_kwargs": args.engine_kwargs,
            "pair_kwargs": args.pair_kwargs,
            "alpha_method": args.alpha_method,
            "logit_std": args.logit_std,
        },
    }


def environment(system: str, args: argparse.Namespace, caches: Path) -> dict[str, str]:
    """Return the environment of the worker: process.environment and the settings of this system."""
    env = process.environment(caches)
    env.pop(MULTIPROCESSING, None)
    if args.teacher is None:
        env["HF_HUB_OFFLINE"] = "1"
    if system == "nested":
        # Both engines must be in one process, and only the V1 model runner accepts custom logits processors. When an engine
        # estimates the memory of its CUDA graphs, vLLM drops the graphs of every engine in the process.
        env |= {MULTIPROCESSING: "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS": "0"}
    elif system in args.in_process:
        env[MULTIPROCESSING] = "0"
    return env


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    begin = time.monotonic()
    pair = args.pair if args.teacher is None else f"{Path(args.teacher).name}+{Path(args.student).name}"
    result: Result = {"pair": pair, "hardware": hardware(), "versions": versions(), "runs": [], "systems": {}, "summary": {}}
    result["runs"].append(
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": ["python", "benchmarks/sampling.py", *without_folders(sys.argv[1:] if argv is None else argv)],
            "commit": commit(),
            "hardware": result["hardware"],
            "configuration": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        }
    )
    path = result_path(args.output, f"sampling_{pair}", result["hardware"]["device"])
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        folder = Path(scratch)
        models = _models(args, folder)
        if args.prime:
            _prime(args, folder)
        for system in args.systems:
            left = None if args.time_limit is None else args.time_limit - (time.monotonic() - begin)
            _say(begin, f"{SYSTEMS[system]} ...")
            result["systems"][system] = _run_system(system, args, models, folder, left)
            result["summary"] = summarise(result)
            path.write_text(json.dumps(result, indent=1) + "\n")
            _say(begin, _describe(result["systems"][system]))
    print(f"\n{tables(result)}\n\nwritten to {path}")
    _try_plot(result, path)
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


def _models(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    if args.teacher is not None:
        return args.teacher, args.student
    teacher, student = (str(write_model(name, folder / "models")) for name in parse_pair(args.pair))
    return teacher, student


def _prime(args: argparse.Namespace, folder: Path) -> None:
    """Start and discard a tiny engine, so that the first system's times do not include reading files from the disk."""
    tiny = str(write_model("tiny", folder / "models"))
    spec = job("teacher", argparse.Namespace(**{**vars(args), "teacher": None, "start_only": True}), (tiny, tiny))
    done = run_worker(spec, environment("teacher", args, folder / "caches-prime"), folder, args.time_limit)
    if done["status"] != "ok":
        print(f"the discarded first start failed: {done['error']}", file=sys.stderr)


def _run_system(
    system: str, args: argparse.Namespace, models: tuple[str, str], folder: Path, left: float | None
) -> dict[str, Any]:
    if left is not None and left <= 0:
        return nothing("no time was left")
    begin = time.monotonic()
    spec, env = job(system, args, models), environment(system, args, folder / f"caches-{system}")
    result = run_worker(spec, env, folder, left)
    if args.warm_start and result["status"] == "ok":
        left = None if left is None else max(1.0, left - (time.monotonic() - begin))
        result["warm_start"] = run_worker({**spec, "shapes": []}, env, folder, left)["start"]
    shutil.rmtree(folder / f"caches-{system}", ignore_errors=True)
    return result


def _say(begin: float, text: str) -> None:
    print(f"[{time.monotonic() - begin:5.0f} s] {text}", flush=True)


def _describe(system: dict[str, Any]) -> str:
    parts = [f"ready in {system['start']['ready_s']:.1f} s"] if system["start"] else []
    for row in system["rows"]:
        ms = "–" if row["ms_per_step"] is None else f"{row['ms_per_step']:.2f} ms"
        parts.append(f"{row['batch_size']} x {row['prompt_tokens']}{'' if row['record'] else ' no record'}: {ms}")
    return "; ".join(parts + ([f"FAILED: {system['error']}\n{system.get('log', '')[-2000:]}"] if system["error"] else []))


def _try_plot(result: Result, path: Path) -> None:
    from benchmarks.plot import plot

    try:
        print("plotted in", *plot([result], path))
    except (ImportError, ValueError) as error:
        print(f"no plot ({error}); python benchmarks/plot.py {path} draws it later")


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
