"""Comparison of the Triton kernels with the float64 definitions (tests.definitions).

Without a GPU the kernels run in Triton's interpreter in a separate process (`test_kernels_in_the_interpreter`), because
TRITON_INTERPRET is read when a kernel is defined and would apply to vLLM's kernels too. With a GPU they run natively, and
the `gpu` tests add real sizes. Alpha is compared with the bisection, all other values with the definitions at that alpha.
Tiles are small here, so that every row has several.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from osd import kernels
from osd.core import RECORD_FIELDS, MixingConfig
from osd.engine.mixture import uniform as uniform_of
from osd.kernels.graph import GraphPool
from osd.mixing import mix
from tests.definitions import INF, Exact, ess, kl, log_q, randn, sensitivity

INTERPRETED = os.environ.get("OSD_TEST_INTERPRETED") == "1"  # not TRITON_INTERPRET, which the engine sets on a CPU
COMPILED = os.environ.get("OSD_TEST_COMPILED") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
NAN = float("nan")

kernel = pytest.mark.skipif(not (GPU or INTERPRETED), reason="run by test_kernels_in_the_interpreter")
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
pytestmark = pytest.mark.gpu

if GPU or INTERPRETED:
    from osd.kernels import fused as fused_module
    from osd.kernels.common import AGAIN
    from osd.kernels.draw import draw_kernel
    from osd.kernels.fused import Cut, FusedMixture, Tuning, mix_and_draw

    def tiled(tile: int) -> Tuning:
        return Tuning(Cut(tile, 4), Cut(tile, 4), Cut(tile, 4), spare=6)  # spare programs have several tiles in most tests

    SMALL = tiled(128)


if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    # NaN never wins a minimum or maximum on a GPU, nor in the interpreter since Triton 3.9.
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)

    def tree(self: ReduceOps, values: tuple) -> list:
        """Combine halves as a GPU does. The interpreter combines single elements, a hundred times slower."""
        n = len(values[0].handle.data)
        while n > 1:
            n //= 2
            low, high = ([self.to_tensor(v.handle.data[part], v.dtype) for v in values] for part in (slice(n), slice(n, None)))
            values, reverse = self.combine_fn.fn(*low, *high), self.combine_fn.fn(*high, *low)
            # The threads of a warp combine in both orders and must get the same result.
            for a, b in zip(values, reverse, strict=True):
                np.testing.assert_array_equal(a.handle.data, b.handle.data, err_msg="not commutative")
        return [self.to_tensor(v.handle.data[0], v.dtype) for v in values]

    ReduceOps.generic_reduce = tree


def run_in_a_child(*options: str, **environment: str) -> None:
    """Run this file in another process: Triton reads TRITON_INTERPRET when a kernel is defined; the engine sets it on a CPU."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-x", "-p", "no:cacheprovider", *options, __file__]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        command,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
    assert " passed" in child.stdout


@pytest.mark.skipif(GPU or INTERPRETED or COMPILED, reason="the kernel tests run in this process")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_in_a_child(TRITON_INTERPRET="1", OSD_TEST_INTERPRETED="1")


@pytest.mark.skipif(INTERPRETED or COMPILED, reason="this is the child process")
def test_kernels_compile() -> None:
    pytest.importorskip("triton")
    run_in_a_child("-k", "compile_for_a_gpu", OSD_TEST_COMPILED="1")


@pytest.mark.skipif(not COMPILED, reason="run by test_kernels_compile")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu(dtype: str) -> None:
    """Needs no GPU. The interpreter accepts code that the compiler rejects, such as a type that changes in a loop."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from osd.kernels import draw, midpoint, refine

    pointers = dict(temperature="*fp32", parts="*fp32", count="*i32", state="*fp64", uniform="*fp64", logq="*fp32")
    types = dict(theta=f"*{dtype}", teacher=f"*{dtype}", token="*i32", record="*fp32", bad_side="*i8", **pointers)
    types |= dict(theta_stride="i32", teacher_stride="i32", vocab="i32", low="fp32", high="fp32", fixed="fp32")
    constants = dict(TILE=2048, TILES=128, GATHER_THETA=False, GATHER_TEACHER=False, TEMPERED=True, GIVEN=False)
    constants |= dict(WRITE=True, DRAW=True, SECOND=True, rows_theta=None, rows_teacher=None, alpha=None)
    for kernel in (midpoint.meet_kernel, refine.refine_kernel, draw.draw_kernel):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        values = {name: constants[name] for name in kernel.arg_names if name not in types}
        compiled = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import osd.kernels; assert not osd.kernels.available('cpu')"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
    assert not kernels.available("cpu")


def rand(seed: int, rows: int) -> Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def problems(vocab: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return one row of each kind of problem, [V] each."""

    def near(seed: int, scale: float, peak: float = 0.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        theta = 3 * randn(seed, vocab)
        theta[vocab // 2] += peak
        return theta, theta + scale * randn(seed + 1, vocab) + shift

    def cut(pair: tuple[Tensor, Tensor], theta: slice | None, teacher: slice | None) -> tuple[Tensor, Tensor]:
        for z, where in zip(pair, (theta, teacher), strict=True):
            if where is not None:
                z[where] = -INF
        return pair

    found = {
        "diffuse": (randn(1, vocab), randn(2, vocab)),
        "language": near(3, 1.0, peak=9),
        "apart": (5 * randn(5, vocab), 5 * randn(6, vocab)),
        "far": (30 * randn(7, vocab), 30 * randn(8, vocab)),
        "peaked": near(9, 1.0, peak=25),
        "very peaked": near(11, 2.0, peak=45),
        "near 1e-1": near(13, 1e-1),
        "near 1e-2": near(15, 1e-2),
        "near 1e-4": near(17, 1e-4),
        "near 1e-3, shifted": near(19, 1e-3, shift=-8.5),
        "near 1e-2, peaked": near(21, 1e-2, peak=20),
        "one-hot, another": near(25, 1.0, peak=1e4),
    }
    theta, teacher = near(27, 0.5)
    theta[3] += 14
    teacher[vocab - 2] += 11
    found["different second peaks"] = (theta, teacher)
    z = 3 * randn(29, vocab)
    found["identical"] = (z, z.clone())
    found["student masked"] = cut(near(31, 1.0), slice(0, vocab // 3), None)
    found["teacher masked"] = cut(near(33, 1.0), None, slice(vocab // 2, None))
    found["both masked"] = cut(near(35, 1.0), slice(0, vocab // 2), slice(3 * vocab // 4, None))
    found["one token shared"] = cut(near(37, 1.0), slice(0, 100), slice(101, None))
    found["disjoint"] = cut(near(39, 1.0), slice(0, vocab // 2), slice(vocab // 2, None))
    theta, teacher = near(41, 1.0)
    teacher[5] = theta[7] = -1e9
    found["masked by a number"] = (theta, teacher)
    theta, teacher = near(43, 1.0)
    # As at a low temperature: the likeliest token of the mixture is far below the maximum of either policy.
    for token, sign in ((3, 1), (vocab - 5, -1)):
        theta[token] += sign * 200
        teacher[token] -= sign * 200
    found["maxima apart"] = (theta, teacher)
    return found


def batch(vocab: int, dtype: torch.dtype) -> tuple[list[str], Tensor, Tensor]:
    pairs = problems(vocab)
    theta, teacher = (torch.stack(z).to(DEVICE, dtype) for z in zip(*pairs.values(), strict=True))
    return list(pairs), theta, teacher


def close(name: str, value: Tensor, exact: Tensor, atol: float = 2e-5, rtol: float = 2e-5) -> None:
    torch.testing.assert_close(value.double(), exact.double(), atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")


def check(fused: FusedMixture, theta: Tensor, teacher: Tensor, config: MixingConfig, greedy: Tensor | None = None) -> None:
    """Compare all values of these tempered rows with the float64 definitions at the computed alpha."""
    theta, teacher = theta.double(), teacher.double()
    expected = log_q(theta, teacher, fused.alpha_P, config)
    p, t = theta.log_softmax(-1), teacher.log_softmax(-1)
    assert fused.token_P is not None
    token = fused.token_P.long()[:, None]
    column = dict(zip(RECORD_FIELDS, fused.values_PR.unbind(1), strict=True))
    if fused.logq_PV is not None:
        close("log q", fused.logq_PV, expected, atol=5e-5)
    for name, logp in (("logq", expected), ("logp_theta", p), ("logp_teacher", t)):
        close(name, column[name], logp.gather(1, token)[:, 0], atol=5e-5)
    close("kl_theta", column["kl_theta"], kl(expected, p))
    close("kl_teacher", column["kl_teacher"], kl(expected, t))
    close("ess_theta", column["ess_theta"], ess(p, expected), rtol=1e-4)
    close("ess_teacher", column["ess_teacher"], ess(t, expected), rtol=1e-4)
    close("entropy_q", column["entropy_q"], torch.special.entr(expected.exp()).sum(-1))
    logp_draw = column["logq"] if greedy is None else torch.where(greedy, 0.0, column["logq"])
    assert torch.equal(column["logp_draw"], logp_draw)


def check_alpha(names: list[str], alpha: Tensor, theta: Tensor, teacher: Tensor) -> None:
    """Assert that alpha is within 1e-4 of the root, or that the two divergences at alpha agree to 1e-6."""
    for i, name in enumerate(names):
        z_theta, z_teacher = theta[i].cpu(), teacher[i].cpu()
        if name == "disjoint":
            continue
        exact = Exact(z_theta, z_teacher)
        found = float(alpha[i])
        error = abs(found - exact.solve("kl_symmetry"))
        if error > 1e-4 and abs(exact.condition("kl_symmetry", found)) > 1e-6:
            assert error <= 1e-4 + 2 * sensitivity(z_theta, z_teacher, "kl_symmetry"), (name, found, error)


def inverse(logq: Tensor, uniform: Tensor, slack: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return the ids at which the cumulative distribution of log q [P, V] exceeds uniform - slack and uniform + slack."""
    cdf = logq.double().exp().cumsum(-1)
    last = (logq > -INF).double().cumsum(-1).argmax(-1, keepdim=True)
    target = uniform.double()[:, None] * cdf[:, -1:]
    return tuple(torch.searchsorted(cdf, target + s, right=True).minimum(last)[:, 0] for s in (-slack, slack))


def check_draw(fused: FusedMixture, logq: Tensor, uniform: Tensor) -> None:
    low, high = inverse(logq, uniform)
    assert fused.token_P is not None
    assert ((fused.token_P >= low) & (fused.token_P <= high)).all(), (fused.token_P, low, high)
    assert (logq.gather(1, fused.token_P.long()[:, None]) > -INF).all()


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_match_the_definitions(dtype: torch.dtype) -> None:
    names, theta, teacher = batch(301, dtype)
    uniform = rand(0, len(names))
    fused = mix_and_draw(
        theta, teacher, MixingConfig(), vocab_size=301, uniform=uniform, write_logq=dtype == torch.float32, tuning=SMALL
    )
    check_alpha(names, fused.alpha_P, theta, teacher)
    assert fused.alpha_P[names.index("identical")] == 0.5
    check(fused, theta, teacher, MixingConfig())
    check_draw(fused, log_q(theta, teacher, fused.alpha_P, MixingConfig()), uniform)
    assert (fused.bad_side_P == 0).all()


@kernel
def test_gathered_rows_with_own_temperature_and_alpha() -> None:
    """Covers the engine's calls: padded vocabularies, rows gathered on both sides, settings per request."""
    vocab = 200
    theta, teacher = 3 * randn(1, 5, 256).to(DEVICE), 3 * randn(2, 6, 216).to(DEVICE)
    theta[:, vocab:], teacher[:, vocab:] = 99.0, NAN
    theta[4, 20:120] = -INF
    rows_theta = torch.tensor([4, 0, 2, 1, 4, 3, 3], device=DEVICE)
    rows_teacher = torch.tensor([1, 5, 0, 3, 3, 2, 4], device=DEVICE)
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.3, 1.0], device=DEVICE)
    alpha = torch.tensor([0.0, NAN, 0.3, 1.0, NAN, 0.9, NAN], device=DEVICE)
    config = MixingConfig(alpha_min=0.2, alpha_max=0.505)
    uniform = rand(3, 7).float()
    given = dict(rows_theta=rows_theta, rows_teacher=rows_teacher, temperature=temperature, alpha=alpha)
    fused = mix_and_draw(theta, teacher, config, vocab_size=vocab, uniform=uniform, write_logq=True, tuning=SMALL, **given)

    divisor = temperature[rows_teacher]
    z_theta, z_teacher = (
        z[rows, :vocab] / torch.where(divisor == 0, 1.0, divisor)[:, None]
        for z, rows in ((theta, rows_theta), (teacher, rows_teacher))
    )
    expected = mix(z_theta, z_teacher, config, alpha_B=alpha)
    close("alpha", fused.alpha_P, expected.alpha_B)
    assert (fused.alpha_P[[1, 4, 6]] >= 0.2).all()
    assert (fused.alpha_P[[1, 4, 6]] <= 0.505).all()
    greedy = divisor == 0
    check(fused, z_theta, z_teacher, config, greedy)
    logq = log_q(z_theta, z_teacher, fused.alpha_P, config)
    check_draw(fused, torch.where(greedy[:, None], torch.where(logq == logq.amax(1, True), 0.0, -INF), logq), uniform)

    drawn = fused.values_PR.clone()
    undrawn = mix_and_draw(theta, teacher, config, vocab_size=vocab, write_logq=True, tuning=SMALL, **given)
    assert undrawn.token_P is None
    finished = undrawn.record_at(fused.token_P, drawn[:, -1].contiguous())
    torch.testing.assert_close(finished, drawn, atol=0, rtol=0)


@kernel
@pytest.mark.parametrize("alpha", [0.0, 0.37, 1.0])
def test_fixed_alpha_and_rounding_ties(alpha: float) -> None:
    """0.1 and the next float32 become equal in log q. At alpha 0 and 1 greedy must still take the larger logit."""
    config = MixingConfig(alpha_method="fixed", fixed_alpha=alpha)
    theta, teacher = 2 * randn(1, 3, 300), 2 * randn(2, 3, 300)
    theta[2] = teacher[2] = 0.1 + 6 * (torch.arange(300) == 7)
    theta[2, 250] = teacher[2, 250] = torch.nextafter(theta[2, 7], torch.tensor(9.0))
    theta[1, 40:], teacher[1, :20] = -INF, -INF
    theta, teacher = theta.to(DEVICE), teacher.to(DEVICE)
    greedy = torch.tensor([False, False, True], device=DEVICE)
    fused = mix_and_draw(
        theta,
        teacher,
        config,
        vocab_size=300,
        temperature=torch.where(greedy, 0.0, 1.0),
        uniform=rand(1, 3),
        write_logq=True,
        tuning=SMALL,
    )
    close("alpha", fused.alpha_P, torch.full((3,), alpha, device=DEVICE))
    check(fused, theta, teacher, config, greedy)
    if alpha in (0.0, 1.0):
        assert fused.token_P[2] == 250
        assert fused.logq_PV[2].argmax() == 250


@kernel
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_0_and_1_give_the_policies(alpha: float) -> None:
    """Evaluation and mix_tokens use this: same ties as the policy, a divergence of 0, independent of the other's masks."""
    own, other = 2 * randn(1, 6, 301).round(decimals=1), 2 * randn(2, 6, 301)
    other[4, 30:90], other[5, 20:] = -1e4, -1e9
    theta, teacher = (z.to(DEVICE) for z in ((own, other) if alpha == 0 else (other, own)))
    greedy = torch.tensor([True, True, False, True, False, True], device=DEVICE)
    given = torch.full((6,), alpha, device=DEVICE)
    fused = mix_and_draw(
        theta,
        teacher,
        MixingConfig(),
        vocab_size=301,
        alpha=given,
        temperature=torch.where(greedy, 0.0, 1.0),
        uniform=rand(1, 6),
        write_logq=True,
        tuning=SMALL,
    )
    exact = own.to(DEVICE).double().log_softmax(-1)
    close("log q", fused.logq_PV, exact, atol=3e-6)
    column = dict(zip(RECORD_FIELDS, fused.values_PR.unbind(1), strict=True))
    assert (column["kl_theta" if alpha == 0 else "kl_teacher"] == 0).all()
    first = (own == own.amax(1, keepdim=True)).int().argmax(1).to(DEVICE)
    assert torch.equal(fused.token_P[greedy].long(), first[greedy])
    assert torch.equal(fused.logq_PV[greedy].argmax(1), first[greedy])


@kernel
def test_bad_row_is_nan_and_reports_its_side() -> None:
    theta, teacher = 2 * randn(1, 9, 200), 2 * randn(2, 9, 200)
    uniform = rand(2, 9)

    def run() -> FusedMixture:
        z_theta, z_teacher = theta.to(DEVICE), teacher.to(DEVICE)
        return mix_and_draw(z_theta, z_teacher, MixingConfig(), vocab_size=200, uniform=uniform, write_logq=True, tuning=SMALL)

    clean = run()
    theta[1, 3], theta[2], theta[3, 150] = NAN, -INF, INF
    teacher[4, 130], teacher[5], teacher[6, 199] = NAN, -INF, INF
    theta[7, 0], teacher[7, 0] = INF, INF
    spoilt = run()
    assert spoilt.bad_side_P.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 0]
    assert spoilt.bad_side_P.dtype == torch.int8
    assert spoilt.token_P[spoilt.bad_side_P > 0].tolist() == [-2, -2, -2, -3, -3, -3, -4]
    bad = spoilt.bad_side_P > 0
    assert spoilt.values_PR[bad][:, :9].isnan().all()
    assert spoilt.logq_PV[bad].isnan().all()
    for name in ("token_P", "values_PR", "logq_PV"):
        assert torch.equal(getattr(spoilt, name)[~bad], getattr(clean, name)[~bad]), name


@kernel
def test_draw_inverts_the_distribution_including_its_ends() -> None:
    """Tests both sides of every step of a cumulative distribution with gaps; one tile has no mass."""
    z = torch.tensor([-INF, 0.0, -INF, 1.0, -2.0, -INF, 0.5, *[-INF] * 17, 2.0, -INF, 1e-3, -INF])
    support = (z > -INF).nonzero()[:, 0]
    edges = z.double().softmax(-1)[support].cumsum(0)[:-1]
    uniform = torch.cat([torch.tensor([0.0, 1 - 2**-53]), edges - 1e-6, edges + 1e-6])
    expected = torch.cat([support[[0, -1]], support[:-1], support[1:]])
    rows = torch.zeros(len(uniform), dtype=torch.int64, device=DEVICE)
    z = z[None].to(DEVICE)
    tiny = tiled(8)
    for numbers in (uniform.to(DEVICE), torch.tensor([1 - 2**-24], device=DEVICE)):
        fused = mix_and_draw(
            z,
            z,
            MixingConfig(),
            vocab_size=28,
            rows_theta=rows[: len(numbers)],
            rows_teacher=rows[: len(numbers)],
            uniform=numbers,
            tuning=tiny,
        )
        assert fused.token_P.tolist() == (expected.tolist() if len(numbers) > 1 else [26])


@kernel
def test_ties_for_the_peak_of_a_row() -> None:
    """Logits in bfloat16 tie often. All threads must choose the same token as the peak of the row."""
    theta, teacher = 2 * randn(1, 4, 301), 2 * randn(2, 4, 301)
    for row, tied in enumerate(([3, 4], [0, 1, 2, 31, 32, 64], [5, 300], [120, 130, 250])):
        gap = 4 * rand(row, len(tied)).float().cpu() - 2
        theta[row, tied], teacher[row, tied] = 11 - gap, 11 + gap
    theta, teacher = theta.bfloat16(), teacher.bfloat16()
    theta[:, :128], teacher[:, :128] = theta[:, :128].float().round(), teacher[:, :128].float().round()
    theta, teacher = theta.to(DEVICE), teacher.to(DEVICE)
    uniform = rand(0, 4)
    fused = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=301, uniform=uniform, tuning=SMALL)
    close("alpha", fused.alpha_P, mix(theta.float(), teacher.float(), MixingConfig()).alpha_B, atol=1e-4)
    check(fused, theta, teacher, MixingConfig())
    check_draw(fused, log_q(theta, teacher, fused.alpha_P, MixingConfig()), uniform)


def mistaken(vocab: int) -> tuple[Tensor, Tensor]:
    """Return 24 rows of which two have a wrong alpha on which both interpolants agree to 1e-4.

    Measured error: 1.2e-3 if the guess is accepted, 2.3e-5 if the sums of the draw reject it and the row is refined and
    drawn again. 64 ids have mass, spread over the vocabulary.
    """
    sides = randn(112, 2, 256, 64)
    spread = torch.full((2, 24, vocab), -60.0)
    spread[..., :: vocab // 64][..., :64] = torch.stack([4 * z[80:104] for z in sides])
    return spread[0].to(DEVICE), spread[1].to(DEVICE)


class FirstRun:
    """Replacement of `draw_kernel` that skips the second draw."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return lambda *args, SECOND, **kwargs: None if SECOND else draw_kernel[grid](*args, SECOND=False, **kwargs)


def drawn_again(
    theta: Tensor, teacher: Tensor, uniform: Tensor, monkeypatch: pytest.MonkeyPatch, **tuning: Tuning
) -> list[int]:
    """Return the rows whose guess is rejected by the sums of the draw."""
    with monkeypatch.context() as patch:
        patch.setattr(fused_module, "draw_kernel", FirstRun())
        once = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=theta.shape[1], uniform=uniform, **tuning)
    return once._state_P.view(len(theta), -1)[:, AGAIN.value].nonzero().flatten().tolist()


@kernel
def test_wrong_guesses_are_rejected_and_redrawn(monkeypatch) -> None:
    """The result must be bitwise equal for any number of programs that share the four tiles."""
    theta, teacher = mistaken(64)
    uniform = rand(0, 24)
    assert drawn_again(theta, teacher, uniform, monkeypatch, tuning=tiled(16)) == [3, 20]
    few, some, all_tiles = (
        mix_and_draw(
            theta, teacher, MixingConfig(), vocab_size=64, uniform=uniform, tuning=replace(tiled(16), spare=24 * programs)
        )
        for programs in (1, 3, 4)
    )
    close("alpha", few.alpha_P, mix(theta.double(), teacher.double(), MixingConfig()).alpha_B, atol=5e-5)
    check(few, theta, teacher, MixingConfig())
    for other in (some, all_tiles):
        assert torch.equal(other.values_PR, few.values_PR)
        assert torch.equal(other.token_P, few.token_P)


@kernel
@pytest.mark.parametrize("planted", ["nothing", "alpha", "tile", "row"])
def test_planted_error_fails_the_comparison(planted: str) -> None:
    """Power: an alpha off by 5e-3, a missing tile of 128 ids, and a wrong student row each fail the comparison."""
    theta, teacher = 3 * randn(1, 2, 301).to(DEVICE), 3 * randn(2, 2, 301).to(DEVICE)
    config, vocab, rows, alpha = MixingConfig(), 301, None, None
    if planted == "alpha":
        alpha = mix(theta, teacher, config).alpha_B + 5e-3
    if planted == "tile":
        vocab = 256
    if planted == "row":
        rows = torch.tensor([1, 0], device=DEVICE)
    fused = mix_and_draw(
        theta, teacher, config, vocab_size=vocab, rows_theta=rows, alpha=alpha, uniform=rand(0, 2), tuning=SMALL
    )

    def compare() -> None:
        check_alpha(["a", "b"], fused.alpha_P, theta, teacher)
        check(fused, theta, teacher, config)

    if planted == "nothing":
        compare()
    else:
        with pytest.raises(AssertionError):
            compare()


@kernel
def test_unsupported_arguments_are_rejected() -> None:
    theta, teacher = torch.zeros(2, 9), torch.zeros(2, 9)
    assert not kernels.supports(MixingConfig(alpha_method="ess_balance"))
    assert not kernels.supports(MixingConfig(alpha_method="fixed", mixture="linear"))
    with pytest.raises(ValueError, match="has no kernel"):
        mix_and_draw(theta, teacher, MixingConfig(alpha_method="entropy"), vocab_size=9)
    with pytest.raises(ValueError, match=r"student logits have shape \(2, 9\) .*use \[B, >= 10\]"):
        mix_and_draw(theta, teacher, MixingConfig(), vocab_size=10)
    with pytest.raises(ValueError, match="uniform has 3 rows and the teacher 2"):
        mix_and_draw(theta, teacher, MixingConfig(), vocab_size=9, uniform=torch.zeros(3))
    with pytest.raises(ValueError, match="temperature has 1 values"):
        mix_and_draw(theta, teacher, MixingConfig(), vocab_size=9, temperature=torch.zeros(1))


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("rows", "vocab"), [(1, 151936), (3, 151935), (32, 151936), (128, 50257), (512, 151936)])
    def test_real_sizes(self, rows: int, vocab: int, dtype: torch.dtype) -> None:
        """Compares alpha with osd.mixing and all values with the definitions, 32 rows at a time."""
        theta, teacher = correlated(rows, vocab, dtype)
        uniform = rand(0, rows)
        fused = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=vocab, uniform=uniform, write_logq=rows <= 32)
        for start in range(0, rows, 32):
            some = slice(start, start + 32)
            z_theta, z_teacher = theta[some].float(), teacher[some].float()
            close("alpha", fused.alpha_P[some], mix(z_theta, z_teacher, MixingConfig()).alpha_B, atol=1e-4)
            part = FusedMixture(
                token_P=fused.token_P[some],
                values_PR=fused.values_PR[some],
                bad_side_P=fused.bad_side_P[some],
                logq_PV=None if fused.logq_PV is None else fused.logq_PV[some],
                _inputs=(),
                _state_P=fused._state_P,
                _flags={},
            )
            check(part, z_theta, z_teacher, MixingConfig())
            check_draw(part, log_q(z_theta, z_teacher, part.alpha_P, MixingConfig()), uniform[some])

    def test_all_problems_at_full_size(self) -> None:
        names, theta, teacher = batch(151936, torch.float32)
        uniform = rand(1, len(names))
        fused = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=151936, uniform=uniform)
        check_alpha(names, fused.alpha_P, theta, teacher)
        check(fused, theta, teacher, MixingConfig())

    def test_cuda_graph_replays_on_new_inputs(self) -> None:
        theta, teacher = correlated(8, 32000, torch.bfloat16)
        uniform = rand(1, 8)
        mix_and_draw(theta, teacher, MixingConfig(), vocab_size=32000, uniform=uniform)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=32000, uniform=uniform)
        for seed in range(3):
            theta.copy_(correlated(8, 32000, torch.bfloat16, seed=10 + seed)[0])
            uniform.copy_(rand(seed, 8))
            graph.replay()
            direct = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=32000, uniform=uniform)
            assert torch.equal(captured.token_P, direct.token_P)
            assert torch.equal(captured.values_PR, direct.values_PR)

    def test_replays_equal_launches(self) -> None:
        """Alternates between two buffers, as an allocator would return them, with new contents each time."""
        from osd.kernels.draw_graph import ReplayedDraw

        draw, ones = ReplayedDraw(), torch.ones(8, device=DEVICE)
        seed, length = torch.arange(8, device=DEVICE), torch.ones(8, dtype=torch.int32, device=DEVICE)
        buffers = [correlated(8, 32000, torch.bfloat16, seed=seed) for seed in range(2)]
        given = dict(rows_theta=None, rows_teacher=None, temperature=ones, alpha=None, seed=seed, length=length)
        given |= {"vocab_size": 32000}
        earlier = []
        for step in range(8):
            theta, teacher = buffers[step % 2]
            for side, new in zip((theta, teacher), correlated(8, 32000, torch.bfloat16, seed=20 + step), strict=True):
                side.copy_(new)
            length.add_(1)
            direct = mix_and_draw(
                theta, teacher, MixingConfig(), vocab_size=32000, temperature=ones, uniform=uniform_of(seed, length)
            )
            earlier.append((draw(theta, teacher, MixingConfig(), **given), direct))
        assert draw.replayed == 6
        for ((token, bad_side), values), direct in earlier:
            assert torch.equal(token, direct.token_P)
            assert not bad_side.any()
            assert torch.equal(values, direct.values_PR)

    def test_replays_serve_reallocated_logits(self) -> None:
        """In serving every step allocates new logits, at the address of earlier ones unless a reference keeps them alive."""
        from osd.kernels.draw_graph import ReplayedDraw

        draw, ones = ReplayedDraw(), torch.ones(8, device=DEVICE)
        seed, length = torch.arange(8, device=DEVICE), torch.ones(8, dtype=torch.int32, device=DEVICE)
        given = dict(rows_theta=None, rows_teacher=None, temperature=ones, alpha=None, seed=seed, length=length)
        given |= {"vocab_size": 32000}
        before = None
        for step in range(40):
            logits = correlated(8, 32000, torch.bfloat16, seed=step)
            length.add_(1)
            (token, _), _ = draw(*logits, MixingConfig(), **given)
            uniform = uniform_of(seed, length)
            direct = mix_and_draw(*logits, MixingConfig(), vocab_size=32000, temperature=ones, uniform=uniform)
            assert torch.equal(token, direct.token_P)
            before = logits  # noqa: F841  # the engine keeps the logits of the last step alive
            del logits, direct
        assert draw.replayed > 20

    def test_result_is_deterministic_under_load(self) -> None:
        """A result that varies would show a race between the programs of a row."""
        theta, teacher = correlated(64, 151936, torch.bfloat16)
        uniform = rand(1, 64)
        first = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=151936, uniform=uniform)
        for _ in range(200):
            again = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=151936, uniform=uniform)
            assert torch.equal(again.values_PR, first.values_PR)
            assert torch.equal(again.token_P, first.token_P)

    def test_redrawn_rows_are_deterministic_for_any_number_of_programs(self, monkeypatch) -> None:
        theta, teacher = mistaken(151936)
        uniform = rand(0, 24)
        assert drawn_again(theta, teacher, uniform, monkeypatch)
        exact = mix(theta.double(), teacher.double(), MixingConfig()).alpha_B
        first = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=151936, uniform=uniform)
        close("alpha", first.alpha_P, exact, atol=5e-5)
        check(first, theta, teacher, MixingConfig())
        for spare in [24, 24 * 5, 512, 24 * 75] * 50:
            tuning = replace(Tuning(), spare=spare)
            again = mix_and_draw(theta, teacher, MixingConfig(), vocab_size=151936, uniform=uniform, tuning=tuning)
            assert torch.equal(again.values_PR, first.values_PR)
            assert torch.equal(again.token_P, first.token_P)

    def test_pool_survives_its_graphs(self) -> None:
        """Regression: after all graphs of a pool were dropped, no graph could be captured in it again."""
        pool, source = GraphPool(), torch.arange(4, device=DEVICE)
        results = []
        for _ in range(3):
            graph, double = pool.capture(lambda: source * 2)
            graph.replay()
            results.append(double)
            del graph
            source.add_(1)
        assert results[-1].tolist() == [4, 6, 8, 10]

    def test_draws_follow_q(self) -> None:
        """Chi-square of 60,000 draws over 40 ids: above 75 in one of 2,500 runs (39 degrees); about 1,000 for pi_theta."""
        theta, teacher = 2 * randn(1, 1, 40).to(DEVICE), 2 * randn(2, 1, 40).to(DEVICE)
        rows = torch.zeros(60000, dtype=torch.int64, device=DEVICE)
        fused = mix_and_draw(
            theta,
            teacher,
            MixingConfig(),
            vocab_size=40,
            rows_theta=rows,
            rows_teacher=rows,
            uniform=rand(5, 60000),
            tuning=tiled(16),
        )
        counts = torch.bincount(fused.token_P, minlength=40).cpu().double()
        q = log_q(theta, teacher, fused.alpha_P[:1], MixingConfig()).exp()[0].cpu()

        def statistic(p: Tensor) -> float:
            rare = p < 1e-4
            kept = torch.cat([counts[~rare], counts[rare].sum()[None]]), torch.cat([p[~rare], p[rare].sum()[None]]) + 1e-12
            return float(stats.chisquare(kept[0].numpy(), (kept[1] / kept[1].sum() * 60000).numpy()).statistic)

        assert statistic(q) < 75
        assert statistic(theta.double().softmax(-1)[0].cpu()) > 500


def correlated(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits of two models that mostly agree, with a few likely tokens."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    theta = 3 * torch.randn(rows, vocab, device=DEVICE, generator=g)
    theta[:, 7::1999] += 6 * torch.rand(theta[:, 7::1999].shape, device=DEVICE, generator=g)
    teacher = theta + torch.randn(rows, vocab, device=DEVICE, generator=g)
    return theta.to(dtype), teacher.to(dtype)
