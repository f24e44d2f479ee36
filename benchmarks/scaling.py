"""Benchmark of a pair over several GPUs of one machine: sampling, training, weight sync and the exactness tests, in one run.

    python benchmarks/scaling.py --gpus 4 --time-limit 3000                       # Qwen2.5 shapes, 32B teacher, 7B student
    python benchmarks/scaling.py --gpus 2 --pair 14B+1.5B --time-limit 1500
    python benchmarks/scaling.py --gpus 2 --pair tiny+tiny --prompt-tokens 8 --new-tokens 6 --completions 4 --micro-batch 1 \\
        --steps 1 --batch-sizes 2 --drafts 0 1 --repeats 1 --parts sampling colocate sync     # two processes on a CPU

sampling    benchmarks/speculation.py, tensor parallel over all GPUs: the pair against teacher-only, without drafts and with
colocate    benchmarks/train_step.py: FSDP2, every GPU holds a shard of student, pair and optimizer; with sleep; TRL's too
served      benchmarks/async_step.py: half of the GPUs serve the pair, the other half train; with and without overlap
sync        benchmarks/weight_sync.py: into the shards of all GPUs, and by NCCL and HTTP to a server on half of them
tests       the exactness tests that use several GPUs

Each part is a command of its own, with a share of --time-limit: what one leaves, the next may use. A part that fails or runs
out of time keeps what it has written. Prints the ratios, and writes one JSON with the whole result of every part.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks.process import GPU, ROOT, end_group, exit_on_sigterm, header, result_path
from benchmarks.shapes import config, parse_pair

ACCEPTANCE = 0.9
GRACE_SECONDS = 60  # for a command to end its workers


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, default=4, help="GPUs of this machine to use; on a CPU, processes (default: %(default)s)")
    add("--pair", default="32B+7B", help="TEACHER+STUDENT as Qwen2.5 shapes of one vocabulary (default: %(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--batch-sizes", type=int, nargs="+", default=[32, 128], help="sequences, of sampling (default: 32 128)")
    add("--drafts", nargs="+", default=["0", "1", "2", "3", "4", "5"], metavar="K", help="of sampling (default: 0 to 5)")
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, default=512)
    add("--completions", type=int, default=64, help="per optimizer step (default: %(default)s)")
    add("--micro-batch", type=int, default=4, help="completions per pass and process (default: %(default)s)")
    add("--steps", type=int, default=3, help="of training, timed as a whole and by part (default: %(default)s)")
    add("--repeats", type=int, default=5, help="of sampling and syncing (default: %(default)s)")
    add("--engine-kwargs", type=json.loads, default={}, metavar="JSON", help="vLLM engine arguments of the first three parts")
    add("--models", type=Path, help="folder for the random models of training (default: a temporary one)")
    add("--time-limit", type=float, default=3000, help="seconds for all parts (default: %(default)s)")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    args = parser.parse_args(argv)
    if args.gpus < 2 or args.gpus % 2:
        parser.error(f"--gpus {args.gpus}: give an even number from 2 on; one half serves and the other trains")
    for name in parse_pair(args.pair):
        if (heads := config(name)["num_attention_heads"]) % args.gpus:
            parser.error(f"--gpus {args.gpus} must divide the {heads} attention heads of {name}")
    return args


# -- the parts ----------------------------------------------------------------------------------------------------------


def sampling(args: argparse.Namespace) -> list[str]:
    command = ["benchmarks/speculation.py", "--pair", args.pair, "--drafts", *args.drafts, "--acceptances", str(ACCEPTANCE)]
    command += ["--batch-sizes", *map(str, args.batch_sizes), "--repeats", str(args.repeats)]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    return [*command, "--engine-kwargs", json.dumps({**args.engine_kwargs, "tensor_parallel_size": args.gpus})]


def colocate(args: argparse.Namespace) -> list[str]:
    systems = ["osd", "trl_autocast"] if GPU else ["osd"]
    return ["benchmarks/train_step.py", "--systems", *systems, *_training(args, args.gpus), *(["--sleep"] if GPU else [])]


def served(args: argparse.Namespace) -> list[str]:
    return ["benchmarks/async_step.py", "--systems", "osd_server", "osd_async", *_training(args, args.gpus // 2)]


def _training(args: argparse.Namespace, gpus: int) -> list[str]:
    same = ("pair", "prompt_tokens", "new_tokens", "completions", "micro_batch", "steps", "models")
    command = [text for name in same for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command += ["--processes", str(gpus), "--tensor-parallel-size", str(gpus), "--warm-up", "1"]
    return [*command, "--engine-kwargs", json.dumps(args.engine_kwargs), *(["--gradient-checkpointing"] if GPU else [])]


def sync(args: argparse.Namespace) -> list[str]:
    command = ["benchmarks/weight_sync.py", "--pair", args.pair, "--systems", "osd", "--repeats", str(args.repeats)]
    command += ["--servers", *(("nccl", "http") if GPU else ("http",))]
    return [*command, "--tensor-parallel-size", str(args.gpus), "--server-tensor-parallel-size", str(args.gpus // 2)]


def tests(args: argparse.Namespace) -> list[str]:
    return ["-m", "pytest", "-q", "-m", "gpu", "-k", "gpus", "tests"]


PARTS: dict[str, tuple[Callable[[argparse.Namespace], list[str]], float]] = {  # and their shares of the time
    "sampling": (sampling, 0.3),
    "colocate": (colocate, 0.25),
    "served": (served, 0.2),
    "sync": (sync, 0.15),
    "tests": (tests, 0.1),
}


def run(command: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Run a part's command; return its status, its result as far as it is written, and the end of its output."""
    begin = time.monotonic()
    written = command[0].startswith("benchmarks")
    with out.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command, *(["--output", str(out)] if written else [])],
            cwd=ROOT,
            env=os.environ | ({} if GPU else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}),  # vLLM has a NUMA node per worker
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(timeout=max(seconds, 0)) == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = "stopped at the time limit"
        finally:
            _end(process)
        log.seek(0)
        text = log.read()
    found = {"command": ["python", *command], "status": status, "seconds": time.monotonic() - begin}
    found["result"] = json.loads(out.read_text()) if out.exists() else None
    return found | {"log": text[-2000:] if status == "ok" else text[-20000:]}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command, which ends its workers: they are in groups of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    end_group(process)


# -- the result ---------------------------------------------------------------------------------------------------------


def summarise(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios of sampling, the medians of training, and the syncs against a raw copy."""
    results = {name: part["result"] for name, part in parts.items() if part.get("result")}
    found: dict[str, Any] = {}
    if "sampling" in results:
        found["sampling"] = over_teacher(results["sampling"]["systems"])
    for name in ("colocate", "served"):
        if name in results:
            systems = results[name]["systems"].values()
            peaks = [system["memory_bytes_of_ranks"] for system in systems if system["status"] == "ok"]
            found[name] = {**results[name]["summary"], "memory_bytes_of_ranks": peaks}
    if "sync" in results:
        rows = {name: system["rows"] for name, system in results["sync"]["systems"].items()}
        found["sync"] = {
            f"{name}: {row['way']}": {"ms": row["ms"], "over_raw_copy": row["over_raw_copy"]}
            for name, measured in rows.items()
            for row in measured
        }
    return found


def over_teacher(systems: dict[str, Any]) -> dict[str, Any]:
    """Return the milliseconds of teacher-only by batch size, and those of the pair divided by them: k = 0, and the best k."""
    times = {
        name: {row["batch_size"]: row["ms_per_step"] for row in system["rows"] if row["ms_per_step"]}
        for name, system in systems.items()
    }
    found = {}
    for batch, alone in times.get("teacher", {}).items():
        ratios = {k: ms[batch] / alone for k, ms in times.items() if k.isdecimal() and batch in ms}
        drafts = {k: ratio for k, ratio in ratios.items() if k != "0"}
        best = min(drafts, key=lambda k: drafts[k]) if drafts else None
        found[str(batch)] = {"teacher_ms": alone, "0": ratios.get("0"), "best": best, "at_best": drafts.get(best or "")}
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = ["python", "benchmarks/scaling.py", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {**header(command, vars(args)), "parts": {}, "summary": {}}
    path = result_path(args.output, f"scaling_{args.pair}_{args.gpus}", result["hardware"]["device"])
    begin, share = time.monotonic(), 0.0
    whole = sum(PARTS[name][1] for name in args.parts)
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        args.models = args.models or Path(scratch) / "models"
        for name in args.parts:
            arguments, own = PARTS[name][0](args), PARTS[name][1]
            share += own / whole
            print(f"[{time.monotonic() - begin:5.0f} s] {name}: python {' '.join(arguments)}", flush=True)
            left = begin + args.time_limit * share - time.monotonic()
            if arguments[0].startswith("benchmarks") and not (ROOT / arguments[0]).exists():
                part = {"status": f"skipped: this checkout has no {arguments[0]}"}
            else:
                part = run(arguments, Path(scratch) / f"{name}.json", left)
            result["parts"][name] = part
            result["summary"] = summarise(result["parts"])
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"[{time.monotonic() - begin:5.0f} s] {name}: {part['status']}", flush=True)
    print(f"{json.dumps(result['summary'], indent=1)}\n\nwritten to {path}")
    return int(any(part["status"] != "ok" and "skipped" not in part["status"] for part in result["parts"].values()))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
