"""Benchmark of the two modes of syncing a LoRA student: time of the sync, and of a decoding step afterwards.

    python benchmarks/lora_sync.py --pair 3B+1.5B --rank 16
    python benchmarks/lora_sync.py --pair small+tiny --sequences 2 --tokens 8          # short run on a CPU

merged    merges and copies every layer that has an adapter; the engine decodes with plain weights
adapter   copies only A and B; the engine decodes through vLLM's LoRA layers

All linear layers have an adapter, and all weights are random. The trainer's model is in the process and on the device of the
engine. Each mode runs in a new process. Reports medians over --repeats, without the first sync. The time of a decoding step of
the pair is (time of N tokens - time of 1 token) / (N - 1). Prints both times and writes a JSON with every measurement, the
configuration and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as in training
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.process import GPU, ROOT, header, result_path
from benchmarks.shapes import parse_pair, write_model
from benchmarks.sync_worker import timed
from osd.engine.engine import PairConfig
from osd.generation import OSDGeneration


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="3B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine-kwargs", type=json.loads, default={}, metavar="JSON", help="vLLM engine arguments for both")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def lora_student(path: Path, rank: int) -> Any:
    """Build a student with a non-zero adapter on every linear layer."""
    dtype = torch.bfloat16 if GPU else torch.float32
    with torch.device("cuda" if GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    lora = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def step_ms(generation: OSDGeneration, sequences: int, tokens: int, repeats: int) -> float:
    """Measure the milliseconds of one decoding step of the pair."""
    prompts = [[10 + i, *range(20, 83)] for i in range(sequences)]

    def seconds(length: int) -> float:
        generation.max_completion_length = length
        start = time.perf_counter()
        generation.generate(prompts, None, 1)
        return time.perf_counter() - start

    seconds(tokens)  # fills the prefix caches
    return 1e3 * statistics.median((seconds(tokens) - seconds(1)) / (tokens - 1) for _ in range(repeats))


def measure(lora_sync: str, args: argparse.Namespace, teacher: Path, student: Path) -> dict[str, float]:
    kwargs: dict[str, Any] = dict(load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16" if GPU else "float32")
    kwargs |= dict(max_model_len=256 + args.tokens, max_num_seqs=args.sequences, gpu_memory_utilization=0.7)
    kwargs |= {} if GPU else dict(enforce_eager=True, kv_cache_memory_bytes=1 << 28)
    kwargs |= args.engine_kwargs
    generation = OSDGeneration(
        lora_student(student, args.rank),
        Accelerator(cpu=not GPU),
        None,
        pair=PairConfig(teacher=str(teacher), student=str(student), engine_kwargs=kwargs),
        lora_sync=lora_sync,
        generation_kwargs={"ignore_eos": True},
    )
    try:
        sync = timed(generation.sync_weights, torch.cuda.synchronize if GPU else lambda: None, args.repeats)
        return {"sync_ms": sync["ms"], "step_ms": step_ms(generation, args.sequences, args.tokens, args.repeats)}
    finally:
        generation.close()


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = (write_model(name, Path(folder)) for name in parse_pair(args.pair))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
            waiting = {way: processes.submit(measure, way, args, teacher, student) for way in ("merged", "adapter")}
            rows = {way: row.result() for way, row in waiting.items()}
    for name, row in rows.items():
        print(f"{name:>8} sync {row['sync_ms']:9.2f} ms, decoding {row['step_ms']:7.2f} ms per step")
    result = {**header(["python", "benchmarks/lora_sync.py", *sys.argv[1:]], vars(args)), "rows": rows}
    path = result_path(args.output, f"lora_sync_{args.pair}", result["hardware"]["device"])
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
