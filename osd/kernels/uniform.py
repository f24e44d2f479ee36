"""Uniform random numbers from a seed and a position: the same for the same pair, whatever the batch.

SplitMix64 (Steele, Lea and Flood 2014) applied to the seed, and again to that plus the position times the golden ratio.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["num_rows"])  # or Triton would compile kernels in mid-run for some batch sizes
def uniform_kernel(seed_ptr, length_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    seed = tl.load(seed_ptr + row, mask=inside, other=0).to(tl.uint64, bitcast=True)
    length = tl.load(length_ptr + row, mask=inside, other=0).to(tl.uint64)
    x = _mix(_mix(seed) + length * 0x9E3779B97F4A7C15)
    tl.store(out_ptr + row, (x >> 11).to(tl.float64) * 1.1102230246251565e-16, mask=inside)  # 2**-53


def uniform(seed_B: Tensor, length_B: Tensor) -> Tensor:
    """Return one number in [0, 1) per row, float64 [B], on a GPU; see ``osd.engine.mixture.uniform`` for the definition.

    seed_B: int64 [B]. length_B: int32 or int64 [B], tokens before the one that is drawn.
    """
    out = torch.empty(len(seed_B), dtype=torch.float64, device=seed_B.device)
    uniform_kernel[(triton.cdiv(len(out), 128),)](seed_B, length_B, out, len(out), BLOCK=128, num_warps=1)
    return out
