"""Benchmark of weight syncs: methods of OSD and TRL to copy the trained student into its engine, in one run.

    python benchmarks/weight_sync.py --pair 3B+1.5B
    python benchmarks/weight_sync.py --student-dtype float32     # the dtype in which TRL loads a model for training
    python benchmarks/weight_sync.py --tensor-parallel-size 4    # four processes hold one pair, each with a whole student
    python benchmarks/weight_sync.py --systems --servers http nccl --server-tensor-parallel-size 2   # into a server
    python benchmarks/weight_sync.py --pair small+tiny           # short run on a CPU

sync            OSD: `OSDGeneration.sync_weights()`, the whole sync of a training step
engine          OSD: `PairEngine.load_student_weights` alone
load_weights    one `load_weights` call of vLLM for all tensors
per tensor      one `load_weights` call for each tensor, into the pair's engine
trl             TRL: `VLLMGeneration.sync_weights()` in colocate mode, into an engine with the student only
server          OSD: `OSDGeneration.sync_weights()` into an `osd serve` process, on the GPUs after the trainer's (--servers)
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

from benchmarks.checkpoints import save_tokenizer
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
from benchmarks.serving import server
from benchmarks.shapes import config, parse_pair, write_model
from benchmarks.sync_worker import SyncJob
from osd.engine.config import WEIGHT_TRANSFERS

SYSTEMS = ("osd", "trl")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", default="3B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes (default: %(default)s)")
    add("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    add("--servers", nargs="*", choices=WEIGHT_TRANSFERS, default=[], help="ways into an `osd serve` process")
    add("--tensor-parallel-size", type=int, default=1, help="processes that hold an engine together (default: %(default)s)")
    add("--server-tensor-parallel-size", type=int, default=1, help="GPUs of the server (default: %(default)s)")
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
    same = {name: getattr(args, name) for name in ("dtype", "student_dtype", "repeats", "tensor_parallel_size")}
    spec = {"system": system, "job": {"teacher": teacher, "student": student, "gpu": GPU, **same}}
    env = environment(folder / f"caches-{system}") | {"HF_HUB_OFFLINE": "1"}
    worker = "benchmarks.sync_worker"
    if system in args.servers:
        for path, name in zip((teacher, student), parse_pair(args.pair), strict=True):
            save_tokenizer(Path(path), config(name)["vocab_size"])
        spec["job"]["tensor_parallel_size"] = 1
        given = SyncJob(**spec["job"]).engine_kwargs()
        del given["skip_tokenizer_init"]  # the trainer reads the tokenizers
        given |= {"tensor_parallel_size": args.server_tensor_parallel_size, "weight_transfer_config": {"backend": system}}
        try:
            with server(teacher, student, given, env, folder / f"{system}-server.log", first_gpu=1) as of_trainer:
                return run_worker({**spec, "system": "server"}, env | of_trainer, folder, None, worker)
        except RuntimeError as error:
            return nothing(str(error))
    env |= {MULTIPROCESSING: "0"}  # the engine lives in the trainer's process
    several = accelerate("ddp" if GPU else "cpu_ddp", args.tensor_parallel_size) if args.tensor_parallel_size > 1 else []
    return run_worker(spec, env, folder, None, worker, several)


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
        for name in [*args.systems, *args.servers]:
            result["systems"][name] = system = measure(name, args, Path(scratch))
            path.write_text(json.dumps(result, indent=1) + "\n")
            if system["error"]:
                print(f"{name} FAILED: {system['error']}\n{system.get('log', '')[-3000:]}")
    print(f"{table(result['systems'])}\n\nwritten to {path}")
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
