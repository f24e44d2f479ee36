"""Benchmark of weight syncs: methods of OSD and TRL to copy the trained student into its engine, in one run.

    python benchmarks/weight_sync.py --pair 3B+1.5B
    python benchmarks/weight_sync.py --student-dtype float32     # the dtype in which TRL loads a model for training
    python benchmarks/weight_sync.py --pair small+tiny           # short run on a CPU

sync            OSD: `OSDGeneration.sync_weights()`, the whole sync of a training step
engine          OSD: `PairEngine.load_student_weights` alone
load_weights    one `load_weights` call of vLLM for all tensors
per tensor      one `load_weights` call for each tensor, into the pair's engine
trl             TRL: `VLLMGeneration.sync_weights()` in colocate mode, into an engine with the student only
raw, at once    one torch call that copies all tensors of the trainer's model on the device, to the engine's dtype
raw copy        the same tensor by tensor: the floor

OSD and TRL run in separate processes. Each has an engine with random weights and, on the same device, a transformers model to
copy from. Each process also measures the raw copy, and its methods are compared with that. Reports medians over --repeats, with
the device drained before and after. `host` is the time until the call returns, while the device may still be copying. Prints a
table and writes a JSON with every measurement, the configuration and the versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks.process import (
    GPU,
    MULTIPROCESSING,
    ROOT,
    Written,
    environment,
    exit_on_sigterm,
    header,
    result_path,
    run_worker,
)
from benchmarks.shapes import parse_pair, write_model

SYSTEMS = ("osd", "trl")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", default="3B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes (default: %(default)s)")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--repeats", type=int, default=20)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if GPU else "float32", help="dtype of the engine")
    add("--student-dtype", choices=("bfloat16", "float32"), help="dtype of the trainer's weights (default: as the engine)")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    args = parser.parse_args(argv)
    parse_pair(args.pair)
    args.student_dtype = args.student_dtype or args.dtype
    return args


def measure(system: str, args: argparse.Namespace, folder: Path) -> Written:
    teacher, student = (str(write_model(name, folder / "models")) for name in parse_pair(args.pair))
    same = {name: getattr(args, name) for name in ("dtype", "student_dtype", "repeats")}
    spec = {"system": system, "job": {"teacher": teacher, "student": student, "gpu": GPU, **same}}
    env = environment(folder / f"caches-{system}") | {
        MULTIPROCESSING: "0",
        "HF_HUB_OFFLINE": "1",
    }  # one process, as in training
    return run_worker(spec, env, folder, None, "benchmarks.sync_worker")


def table(systems: dict[str, Written]) -> str:
    lines = [f"{'ms':>20} {'median':>10} {'host':>10} {'x raw copy':>12}"]
    for name, system in systems.items():
        for row in system["rows"]:
            label = f"{row['way']} ({name})" if row["way"].startswith("raw") else row["way"]
            lines.append(f"{label:>20} {row['ms']:10.2f} {row['host_ms']:10.2f} {row['over_raw_copy']:12.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = ["python", "benchmarks/weight_sync.py", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {**header(command, vars(args)), "systems": {}}
    path = result_path(args.output, f"weight_sync_{args.pair}", result["hardware"]["device"])
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        for name in args.systems:
            result["systems"][name] = system = measure(name, args, Path(scratch))
            path.write_text(json.dumps(result, indent=1) + "\n")
            if system["error"]:
                print(f"{name} FAILED: {system['error']}\n{system.get('log', '')[-3000:]}")
    print(f"{table(result['systems'])}\n\nwritten to {path}")
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
