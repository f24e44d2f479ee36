"""What it costs to push a live student into its engine, four ways in one run.

    python benchmarks/weight_sync.py --pair 3B+1.5B
    python benchmarks/weight_sync.py --pair small+tiny          # a try on a CPU

map           OSD: the copies of the first sync, repeated
load_weights  one `load_weights` call for all tensors
per tensor    one `load_weights` call for each, as TRL's `VLLMGeneration.sync_weights` does
raw copy      every tensor of the trainer's model copied once on the device: the floor

The student is the pair's own, with random weights, in the engine's process; the trainer's copy lies on the same device. Medians
over --repeats, each with the device drained before and after. Writes a JSON with every figure, the configuration and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as in training
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, this finds only its own folder

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.sampling import hardware, versions
from benchmarks.shapes import parse_pair, write_model
from osd.engine.pair import PairConfig, PairEngine

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="3B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def median_ms(sync: Callable[[], Any], repeats: int) -> float:
    def once() -> float:
        _drain()
        start = time.perf_counter()
        sync()
        _drain()
        return (time.perf_counter() - start) * 1e3

    once()
    return statistics.median(once() for _ in range(repeats))


def _drain() -> None:
    if GPU:
        torch.cuda.synchronize()


def ways(engine: PairEngine, student: torch.nn.Module) -> dict[str, Callable[[], Any]]:
    """The four, each as something to call."""
    named = [(name, p.data) for name, p in student.named_parameters()]
    copies = [torch.empty_like(tensor) for _, tensor in named]
    worker = engine._worker()
    assert worker is not None
    model = worker.student_runner.get_model()

    def per_tensor() -> None:
        with worker._as_student(), torch.no_grad():
            for item in named:
                model.load_weights([item])

    def one_call() -> None:
        with worker._as_student(), torch.no_grad():
            model.load_weights(named)

    def raw() -> None:
        for copy, (_, tensor) in zip(copies, named, strict=True):
            copy.copy_(tensor, non_blocking=True)

    return {
        "map": lambda: engine.load_student_weights(named),
        "load_weights": one_call,
        "per tensor": per_tensor,
        "raw copy": raw,
    }


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = (write_model(name, Path(folder)) for name in parse_pair(args.pair))
        dtype = torch.bfloat16 if GPU else torch.float32
        kwargs: dict[str, Any] = dict(load_format="dummy", skip_tokenizer_init=True, dtype=str(dtype).removeprefix("torch."))
        kwargs |= dict(max_model_len=256, max_num_seqs=4, enforce_eager=True, kv_cache_memory_bytes=1 << 28)
        with PairEngine(PairConfig(teacher=str(teacher), student=str(student), engine_kwargs=kwargs)) as engine:
            with torch.device("cuda" if GPU else "cpu"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student), dtype=dtype)
            milliseconds = {name: median_ms(sync, args.repeats) for name, sync in ways(engine, model).items()}
            gigabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    rows = {name: {"ms": ms, "over_raw_copy": ms / milliseconds["raw copy"]} for name, ms in milliseconds.items()}
    print(f"{args.pair.split('+')[1]}, {gigabytes:.2f} GB")
    for name, row in rows.items():
        print(f"{name:>14} {row['ms']:9.2f} ms {row['over_raw_copy']:7.2f} x a raw copy")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "configuration": {"pair": args.pair, "repeats": args.repeats, "gigabytes": gigabytes},
        "rows": rows,
    }
    path = args.output
    if path.suffix != ".json":
        device = "".join(c if c.isalnum() else "-" for c in result["hardware"]["device"].lower())
        path = path / f"weight_sync_{args.pair}_{device}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
