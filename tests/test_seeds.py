"""Random numbers of the draws: uniform, and the same on a CPU and a GPU for the same seed and position."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import torch
from scipy import stats

from osd.engine.mixture import uniform

SCRIPT = """
import sys, torch
from osd.kernels.uniform import uniform
seeds, lengths = torch.load(sys.argv[1])
torch.save([uniform(seeds, lengths), uniform(seeds, lengths.int())], sys.argv[2])
"""


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator)
    lengths = torch.randint(0, 2**31 - 1, (500,), generator=generator)
    edges = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 42, 42, 2**62])
    return torch.cat([seeds, edges]), torch.cat([lengths, torch.tensor([0, 0, 1, 2**31 - 1, 5, 0, 1, 7])])


def test_torch_and_the_kernel_agree_bit_for_bit(tmp_path):
    seeds, lengths = inputs()
    torch.save([seeds, lengths], tmp_path / "in.pt")
    (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, env=interpreted(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = uniform(seeds, lengths)
    for got in torch.load(tmp_path / "out.pt"):
        assert torch.equal(got, expected)
    assert torch.equal(uniform(seeds, lengths.int()), expected)


def interpreted() -> dict[str, str]:
    import os

    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()}


def splitmix64(x: int) -> int:
    """The definition, in Python's integers."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)


def test_numbers_follow_the_definition():
    seeds, lengths = inputs()
    for seed, length, got in zip(seeds.tolist(), lengths.tolist(), uniform(seeds, lengths).tolist(), strict=True):
        assert got == (splitmix64(splitmix64(seed) + length * 0x9E3779B97F4A7C15) >> 11) / 2**53


def chi_square(numbers: torch.Tensor) -> float:
    counts = np.histogram(numbers.numpy(), bins=256, range=(0, 1))[0]
    return float(stats.chisquare(counts).statistic)


def test_numbers_are_uniform_over_positions_and_over_seeds():
    """255 degrees of freedom; a uniform generator exceeds 370 once in 400,000 times. Successive pairs fill the square, too."""
    positions = torch.arange(1 << 18)
    along = uniform(torch.full_like(positions, 1234), positions)
    across = uniform(positions, torch.full_like(positions, 17))
    assert max(chi_square(along), chi_square(across)) < 370
    cells = (along[:-1] * 16).long() * 16 + (along[1:] * 16).long()
    assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).statistic < 370
    assert abs(np.corrcoef(along, across)[0, 1]) < 0.01


def test_a_generator_of_31_bits_of_the_seed_is_seen():
    """The planted error: seeds that differ in their high bits alone give the same numbers."""
    seeds = torch.arange(256) << 32
    assert uniform(seeds, torch.zeros(256)).unique().numel() == 256
    assert uniform(seeds & (2**31 - 1), torch.zeros(256)).unique().numel() == 1
