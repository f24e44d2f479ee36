"""Profile of one paired decoding step: host time by part, and GPU time by kernel.

    python benchmarks/step_profile.py --pair 3B+1.5B --batch-sizes 8 32 128

The engine core runs in this process, so that its methods can be timed. The difference between `all` and `core` is the front
end, which vLLM runs in another process by default. Host: mean milliseconds per step between two `perf_counter` calls, without
a profiler. Parts are nested as printed, and the host is idle in `wait for the GPU`. GPU: busy time and the longest kernels,
from a CUPTI trace of --traced steps (tracing slows the step down). Prints tables and writes a JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

import torch

from benchmarks.process import header, result_path
from benchmarks.shapes import parse_pair, write_model
from benchmarks.systems import Job, Paired

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", default="3B+1.5B", help="TEACHER+STUDENT as Qwen2.5 shapes (default: %(default)s)")
    add("--batch-sizes", type=int, nargs="+", default=[8, 32, 128])
    add("--prompt-tokens", type=int, default=256)
    add("--new-tokens", type=int, default=256)
    add("--traced", type=int, default=24, help="steps of the GPU trace; 0: no trace")
    add("--engine-kwargs", type=json.loads, default={}, metavar="JSON")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder, or the path of the JSON")
    return parser.parse_args()


class Clock:
    """Seconds and call counts of wrapped methods, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time the calls of ``owner.method``. Does nothing if the method does not exist in this version of vLLM."""
        inner = getattr(owner, method, None)
        if inner is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1

        setattr(owner, method, timed)

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def per_step(self) -> dict[str, float]:
        """Return the milliseconds per step by name. A step is one call of the worker's `execute_model`."""
        steps = max(1, self.calls["execute"])
        return {name: seconds / steps * 1e3 for name, seconds in self.seconds.items()}


def wrap_engine(clock: Clock, engine: Any) -> None:
    """Wrap the parts of a step. A name contains its parents, separated by slashes."""
    from vllm.v1.executor import uniproc_executor

    front = engine._frontend
    worker, scheduler = front.worker, front.scheduler
    clock.wrap(front.engine, "step", "all")
    clock.wrap(front._core, "step_fn", "core")
    clock.wrap(scheduler, "schedule", "schedule")
    clock.wrap(scheduler.student, "schedule", "schedule/student")
    clock.wrap(scheduler, "_pair_up", "schedule/pair_up")
    clock.wrap(scheduler, "update_from_output", "update")
    clock.wrap(scheduler, "_update_student", "update/student")
    clock.wrap(worker, "execute_model", "execute")
    clock.wrap(worker, "_admit", "execute/admit")
    clock.wrap(worker, "_student_forward", "execute/student+logits")
    clock.wrap(worker, "sample_tokens", "sample")
    clock.wrap(worker, "_align", "sample/align")
    clock.wrap(worker, "_finish_step", "sample/finish_student")
    clock.wrap(worker, "_record", "sample/record")
    clock.wrap(worker, "sampler", "sample/draw")
    clock.wrap(worker.model_runner, "postprocess_sampled", "sample/postprocess")
    for side, runner in (("student", worker.student_runner), ("teacher", worker.model_runner)):
        clock.wrap(runner, "execute_model", f"execute/{side}")
        for part in ("add_requests", "update_requests", "gather_batch_req_state", "prepare_inputs", "prepare_attn"):
            clock.wrap(runner, part, f"execute/{side}/{part}")
        clock.wrap(runner.model_state, "prepare_attn", f"execute/{side}/attention metadata")
        clock.wrap(runner.cudagraph_manager, "run_fullgraph", f"execute/{side}/replay")
    future = getattr(uniproc_executor, "AsyncOutputFuture", None)
    if future is not None:
        clock.wrap(future, "result", "wait for the GPU")


def prompts(batch_size: int, length: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch_size)
    return torch.randint(100, vocab, (batch_size, length), generator=generator).tolist()


def gpu_trace(run: Callable[[], Any]) -> dict[str, Any]:
    """Trace the GPU while ``run`` decodes, and evaluate the middle half of the steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name(), e.device_resource_id())
        for e in profiler.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    kernels.sort()
    marks = [k for k in kernels if "draw_kernel" in k[2]]
    begin, end = marks[len(marks) // 4], marks[3 * len(marks) // 4]
    count = 3 * len(marks) // 4 - len(marks) // 4
    window = [k for k in kernels if begin[0] <= k[0] < end[0]]
    busy, until = 0, 0
    for start, stop, _, _ in window:
        busy += max(0, stop - max(start, until))
        until = max(until, stop)
    by_stream, by_name = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for start, stop, name, stream in window:
        by_stream[str(stream)] += (stop - start) / 1e6 / count
        by_name[name[:90]][0] += (stop - start) / 1e6 / count
        by_name[name[:90]][1] += 1
    top = sorted(by_name.items(), key=lambda item: -item[1][0])[:25]
    return {
        "steps": count,
        "ms_per_step": (end[0] - begin[0]) / 1e6 / count,
        "busy_ms": busy / 1e6 / count,
        "by_stream_ms": dict(by_stream),
        "kernels_per_step": len(window) / count,
        "longest": {name: {"ms": ms, "per_step": n / count} for name, (ms, n) in top},
    }


def profile(system: Paired, clock: Clock, batch_size: int, args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    batch = prompts(batch_size, args.prompt_tokens, vocab)
    system.generate(batch, args.new_tokens)  # fills the prefix caches and captures graphs of this size
    plain = []
    for tokens in (1, args.new_tokens, 1, args.new_tokens):
        clock.clear()
        start = time.perf_counter()
        system.generate(batch, tokens)
        plain.append(time.perf_counter() - start)
    result = {
        "batch_size": batch_size,
        "ms_per_step": (min(plain[1::2]) - min(plain[::2])) / (args.new_tokens - 1) * 1e3,
        "host_ms": clock.per_step(),
    }
    if args.traced and GPU:
        result["gpu"] = gpu_trace(lambda: system.generate(batch, args.traced))
    return result


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['batch_size']} sequences: {result['ms_per_step']:.2f} ms per step")
    for name, ms in sorted(result["host_ms"].items()):
        print(f"  {'  ' * name.count('/')}{name.split('/')[-1]:<{44 - 2 * name.count('/')}}{ms:8.3f}")
    if gpu := result.get("gpu"):
        busy, whole, kernels = gpu["busy_ms"], gpu["ms_per_step"], gpu["kernels_per_step"]
        print(f"  GPU busy {busy:.2f} of {whole:.2f} ms, {kernels:.0f} kernels a step (traced)")
        print("  by stream:", {k: round(v, 2) for k, v in gpu["by_stream_ms"].items()})
        for name, row in gpu["longest"].items():
            print(f"    {row['ms']:7.3f} ms {row['per_step']:7.1f} x {name}")


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = (str(write_model(name, Path(folder))) for name in parse_pair(args.pair))
        job = Job(
            teacher=teacher,
            student=student,
            dtype="bfloat16" if GPU else "float32",
            random_weights=True,
            gpu=GPU,
            max_model_len=args.prompt_tokens + max(args.new_tokens, args.traced) + 16,
            max_num_seqs=max(args.batch_sizes),
            engine_kwargs=args.engine_kwargs,
        )
        system = Paired(job)
        clock = Clock()
        wrap_engine(clock, system.engine)
        rows = [profile(system, clock, size, args, job.shared_vocab()) for size in args.batch_sizes]
        system.close()
    for row in rows:
        show(row)
    result = {**header(["python", "benchmarks/step_profile.py", *sys.argv[1:]], vars(args)), "rows": rows}
    path = result_path(args.output, f"step_profile_{args.pair}", result["hardware"]["device"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
