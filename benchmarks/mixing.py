"""Benchmark of the mixing on a GPU: fused kernels and torch reference, compared with the time to read both logits once.

    python benchmarks/mixing.py
    python benchmarks/mixing.py --batch-sizes 32 --dtypes bfloat16 --sweep

One run measures:
- the bandwidth of a large device copy;
- the floor: reading both logits of a batch once at that bandwidth, in float32 and in the given dtype;
- the fused path from logits to token and record, replayed as a CUDA graph;
- the same launched from Python, on the device and on the host;
- osd.mixing with a draw and a record.

"cold": inputs rotate among so many buffers that none is still in the cache. "warm": all calls use one buffer. In serving the
logits were just written, so the time lies between the two. Reports medians over ``--repeats``, the largest difference of alpha
between the fused path and the reference, and the share of equal tokens. ``--sweep`` first tries launch parameters of each pass
in turn, at the first batch size and dtype, and measures with the best ones. Writes a JSON with every measurement, the
configuration and the versions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

import torch
import triton
from torch import Tensor

from osd.core import MixingConfig
from osd.kernels.fused import DEFAULT, Cut, FusedMixture, Tuning, mix_and_draw
from osd.mixing import mix, record_rows

TILES = (512, 1024, 2048, 4096, 8192)
WARPS = (1, 2, 4, 8, 16)
REGISTERS = (64, 80, 96, 128)
PER_THREAD = (8, 16, 32)  # tokens per thread; more spill registers, fewer spend the time in reductions
CONFIG = MixingConfig()


class Inputs:
    """One batch of synthetic logits and uniform numbers for the draw."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, seed: int) -> None:
        g = torch.Generator("cuda").manual_seed(seed)
        theta = 3 * torch.randn(rows, vocab, device="cuda", generator=g)
        favourites = torch.randint(vocab, (rows, 20), device="cuda", generator=g)
        theta.scatter_add_(1, favourites, 12 * torch.rand(rows, 20, device="cuda", generator=g))
        gap = torch.randn(rows, vocab, device="cuda", generator=g)
        self.theta, self.teacher = theta.to(dtype), (theta + gap).to(dtype)
        self.uniform = torch.rand(rows, dtype=torch.float64, device="cuda", generator=g)
        self.temperature = torch.ones(rows, device="cuda")
        self.vocab = vocab

    def fused(self, tuning: Tuning) -> FusedMixture:
        return mix_and_draw(
            self.theta,
            self.teacher,
            CONFIG,
            vocab_size=self.vocab,
            temperature=self.temperature,
            uniform=self.uniform,
            tuning=tuning,
        )

    def reference(self) -> tuple[Tensor, Tensor]:
        """Return (token [B], record [B, R]) by osd.mixing and the draw of the engine."""
        mixture = mix(self.theta, self.teacher, CONFIG, temperature_B=self.temperature)
        peak = mixture.logq_BV.amax(-1, keepdim=True)
        cdf = (mixture.logq_BV - peak).exp_().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(cdf, self.uniform[:, None] * cdf[:, -1:], right=True).clamp_(max=self.vocab - 1)
        logp = mixture.logq_BV.gather(-1, token)[:, 0]
        return token[:, 0], record_rows(mixture, self.theta, self.teacher, self.temperature, token[:, 0], logp)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def device_us(run: Callable[[], Any], repeats: int, calls: int = 1) -> float:
    """Measure the median microseconds of device time per call, where run() makes `calls` calls, after a warm-up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def copy_bandwidth(repeats: int) -> float:
    """Measure the bytes read plus written per second by a copy of 1 GiB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (device_us(lambda: target.copy_(source), repeats) * 1e-6)


def graph_us(buffers: list[Inputs], tuning: Tuning, repeats: int) -> float:
    """Measure the device time of one call with a graph that uses all buffers in turn."""
    buffers[0].fused(tuning)  # compiles
    calls = buffers * math.ceil(16 / len(buffers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [inputs.fused(tuning) for inputs in calls]
    time_us = device_us(graph.replay, repeats, len(calls))
    del kept
    return time_us


def host_us(inputs: Inputs, tuning: Tuning, repeats: int) -> float:
    """Measure the host time of one call, without waiting for the device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            inputs.fused(tuning)
        times.append((time.perf_counter() - start) / 10 * 1e6)
    return statistics.median(times)


def rotation(rows: int, vocab: int, dtype: torch.dtype) -> list[Inputs]:
    """Make enough batches to fill four times the cache."""
    size = 2 * rows * vocab * dtype.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [Inputs(rows, vocab, dtype, seed) for seed in range(min(64, max(2, math.ceil(4 * cache / size))))]


def measure(rows: int, dtype: torch.dtype, tuning: Tuning, bandwidth: float, args: argparse.Namespace) -> dict[str, Any]:
    buffers = rotation(rows, args.vocab, dtype)
    floor_float32_us = 2 * rows * args.vocab * 4 / bandwidth * 1e6
    turn = itertools.cycle(buffers)
    cold_us, warm_us = graph_us(buffers, tuning, args.repeats), graph_us(buffers[:1], tuning, args.repeats)
    launched_us = device_us(lambda: [next(turn).fused(tuning) for _ in range(16)], args.repeats, 16)
    fused, (token, record) = buffers[0].fused(tuning), buffers[0].reference()
    assert fused.token_P is not None
    return {
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "buffers": len(buffers),
        "floor_float32_us": floor_float32_us,
        "floor_us": floor_float32_us * dtype.itemsize / 4,
        "graph_cold_us": cold_us,
        "graph_warm_us": warm_us,
        "launched_us": launched_us,
        "host_us": host_us(buffers[0], tuning, args.repeats),
        "torch_us": device_us(lambda: next(turn).reference(), args.repeats),
        "cold_over_floor_float32": cold_us / floor_float32_us,
        "warm_over_floor_float32": warm_us / floor_float32_us,
        "cold_over_floor": cold_us / (floor_float32_us * dtype.itemsize / 4),
        "alpha_apart": float((fused.alpha_P - record[:, 0]).abs().max()),
        "same_token": float((fused.token_P == token).float().mean()),
    }


def sweep(rows: int, dtype: torch.dtype, args: argparse.Namespace) -> tuple[Tuning, list[dict[str, Any]]]:
    """Find the fastest launch parameters of each pass in turn, then try register limits. Returns them and all times."""
    buffers, best, tried = rotation(rows, args.vocab, dtype), DEFAULT, []
    pairs = itertools.product(TILES, WARPS)
    cuts = [Cut(tile, warps) for tile, warps in pairs if tile // (32 * warps) in PER_THREAD]
    for name in ("meet", "draw", "refine"):
        times = {cut: graph_us(buffers, replace(best, **{name: cut}), 5) for cut in cuts}
        fastest = min(times, key=times.__getitem__)
        for cut in (replace(fastest, registers=registers) for registers in REGISTERS):
            times[cut] = graph_us(buffers, replace(best, **{name: cut}), 5)
        ranking = sorted(times, key=times.__getitem__)
        for cut in ranking[:5]:
            print(f"{name:>7} {times[cut]:8.2f} us  {cut}")
        tried += [{"pass": name, **asdict(cut), "graph_cold_us": times[cut]} for cut in ranking]
        best = replace(best, **{name: ranking[0]})
    return best, tried


def main() -> None:
    args = parse_args()
    dtypes = [getattr(torch, name) for name in args.dtypes]
    tuning, tried = sweep(args.batch_sizes[0], dtypes[0], args) if args.sweep else (DEFAULT, [])
    bandwidth = copy_bandwidth(args.repeats)
    rows = [measure(rows, dtype, tuning, bandwidth, args) for dtype in dtypes for rows in args.batch_sizes]
    print(f"copy {bandwidth / 1e12:.2f} TB/s; {tuning}")
    for name in rows[0]:
        print(
            f"{name:>24}", *(f"{row[name]:>10}" if isinstance(row[name], (str, int)) else f"{row[name]:>10.3g}" for row in rows)
        )
    device = torch.cuda.get_device_name()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {
            "device": device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "configuration": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "tuning": asdict(tuning),
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
        "sweep": tried,
    }
    hardware = "".join(c if c.isalnum() else "-" for c in device.lower())
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"mixing_{hardware}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
