"""What it costs to push a live student into its engine: OSD's ways and TRL's, in one run.

    python benchmarks/weight_sync.py --pair 3B+1.5B
    python benchmarks/weight_sync.py --student-dtype float32     # as TRL loads a model that it trains
    python benchmarks/weight_sync.py --pair small+tiny           # a try on a CPU

sync            OSD: `OSDGeneration.sync_weights()`, all that a training step waits for
map             OSD: `PairEngine.load_student_weights`, all tensors at once, as sync_weights does for a plain student
map, by one     the same, each tensor copied as it comes, as for sharded students and merged adapters
load_weights    one `load_weights` call for all tensors, which is what there is without a map
per tensor      one `load_weights` call for each, into the pair's engine
trl             TRL: `VLLMGeneration.sync_weights()` in colocate mode, into its own engine of the student alone
raw, at once    every tensor of the trainer's model copied on the device, to the engine's dtype, by one call of torch
raw copy        the same tensor by tensor: the floor

OSD and TRL each have a process of their own, with an engine that holds random weights and, on the same device, a transformers
model to push; each measures the raw copy too, and a way is compared with that of its own process. Medians over --repeats, each
with the device drained before and after; `host` is the time until the call returned, while the device may still copy. Prints a
table, and writes a JSON with every figure, the configuration and the versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, this finds only its own folder

from benchmarks.process import GPU, MULTIPROCESSING, ROOT, Written, environment, header, result_path, run_worker
from benchmarks.shapes import parse_pair, write_model

SYSTEMS = ("osd", "trl")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", default="3B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes (default: %(default)s)")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--repeats", type=int, default=20)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if GPU else "float32", help="of the engine's weights")
    add("--student-dtype", choices=("bfloat16", "float32"), help="of the trainer's (default: the engine's)")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    args = parser.parse_args(argv)
    parse_pair(args.pair)
    args.student_dtype = args.student_dtype or args.dtype
    return args


def measure(system: str, args: argparse.Namespace, folder: Path) -> Written:
    teacher, student = (str(write_model(name, folder / "models")) for name in parse_pair(args.pair))
    same = {name: getattr(args, name) for name in ("dtype", "student_dtype", "repeats")}
    spec = {"system": system, "job": {"teacher": teacher, "student": student, "gpu": GPU, **same}}
    env = environment(folder / f"caches-{system}") | {MULTIPROCESSING: "0", "HF_HUB_OFFLINE": "1"}  # in process, as in training
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
    sys.exit(main())
