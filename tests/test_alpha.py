"""Comparison of alpha with a float64 bisection on the same inputs (tests.definitions.Exact, no shared code).

The tolerance is 1e-4 everywhere. Float32 inputs of size 60 are known only to 4e-6. In a few problems the solution changes
by more than 1e-4 when every logit changes by its last bit. There the tolerance grows by twice that change (`sensitivity`).
Policies that agree to better than 1e-36 have no defined root in float32; the result must be 1/2.
"""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osd import alpha as alpha_module
from osd import log_partition as log_partition_module
from osd.alpha import entropy, solve_alpha
from osd.core import MixingConfig
from tests.definitions import INF, Exact, randn, sensitivity

CURVE_METHODS = ("kl_symmetry", "ess_balance", "reverse_kl_symmetry")
TOLERANCE = 1e-4


def assert_exact(theta: Tensor, teacher: Tensor, method: str, rows: range | None = None) -> None:
    alpha = solve_alpha(theta, teacher, MixingConfig(alpha_method=method))
    assert alpha.dtype == torch.float32
    for i in rows or range(len(theta)):
        expected = Exact(theta[i], teacher[i]).solve(method)
        error = abs(float(alpha[i]) - expected)
        if not error <= TOLERANCE:
            assert error <= TOLERANCE + 2 * sensitivity(theta[i], teacher[i], method), (i, float(alpha[i]), expected)


def peaked(seed: int, rows: int, vocab: int, gap: float, at: int) -> Tensor:
    z = randn(seed, rows, vocab)
    z[:, at] += gap
    return z


def masked(seed: int, rows: int, vocab: int, share: float) -> Tensor:
    z = 3 * randn(seed, rows, vocab)
    z[torch.rand(rows, vocab, generator=torch.Generator().manual_seed(seed)) < share] = -INF
    z[:, 0] = 1.0
    return z


def near(seed: int, vocab: int, scale: float, *, peak: float = 0.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    theta = 3 * randn(seed, 3, vocab)
    theta[:, 0] += peak
    return theta, theta + scale * randn(seed + 1, 3, vocab) + shift


def one_shared(vocab: int) -> tuple[Tensor, Tensor]:
    theta, teacher = randn(35, 3, vocab), randn(36, 3, vocab)
    theta[:, 2::2], teacher[:, 1::2] = -INF, -INF
    return theta, teacher


def near_but(change: Callable[[Tensor, Tensor], None], vocab: int) -> tuple[Tensor, Tensor]:
    theta, teacher = near(50, vocab, 1e-3)
    change(theta, teacher)
    return theta, teacher


def lost_to_minus_infinity(theta: Tensor, teacher: Tensor) -> None:
    theta[:, 0] -= 10
    teacher[:, 0] = -INF


def masked_by_a_finite_number(theta: Tensor, teacher: Tensor) -> None:
    teacher[:, 0] = -1e4


def one_rare_token_apart(theta: Tensor, teacher: Tensor) -> None:
    theta[:, 0] = -15
    teacher[:, 0] = -9


def problems(vocab: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = {
        "random": (2 * randn(1, 3, vocab), 2 * randn(2, 3, vocab)),
        "scattered": (10 * randn(3, 3, vocab), 10 * randn(4, 3, vocab)),
        "peaked alike": (peaked(5, 3, vocab, 20, 0), peaked(6, 3, vocab, 18, 0)),
        "one-hot alike": (peaked(7, 3, vocab, 60, 0), peaked(8, 3, vocab, 55, 0)),
        "one-hot apart": (peaked(9, 3, vocab, 60, 0), peaked(10, 3, vocab, 45, 1)),
        "one-hot 1e4 apart": (peaked(11, 3, vocab, 1e4, 0), peaked(12, 3, vocab, 1.3e4, 1)),
        "log-probabilities": (randn(13, 3, vocab).log_softmax(-1), (4 * randn(14, 3, vocab)).log_softmax(-1)),
        "finite mask": near_but(masked_by_a_finite_number, vocab),
        "near but for one rare token": near_but(one_rare_token_apart, vocab),
    }
    for scale in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        found[f"near {scale}"] = near(20, vocab, scale)
        found[f"near {scale}, peaked"] = near(22, vocab, scale, peak=25)
        found[f"near {scale}, shifted"] = near(24, vocab, scale, shift=-8.5)
    if vocab > 3:
        found["masked"] = (masked(30, 3, vocab, 0.3), masked(31, 3, vocab, 0.3))
        found["masked alike"] = (masked(30, 3, vocab, 0.9), masked(30, 3, vocab, 0.9) + randn(32, 3, vocab))
        found["few tokens shared"] = (masked(33, 3, vocab, 0.9), masked(34, 3, vocab, 0.9))
        found["one token shared"] = one_shared(vocab)
        found["near, one token lost"] = near_but(lost_to_minus_infinity, vocab)
    return found


@pytest.mark.parametrize("method", CURVE_METHODS)
@pytest.mark.parametrize("vocab", [2, 3, 50, 4000])
def test_alpha_is_the_root(method: str, vocab: int) -> None:
    for name, (theta, teacher) in problems(vocab).items():
        try:
            assert_exact(theta, teacher, method, rows=range(1 if vocab == 4000 else 3))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("method", CURVE_METHODS)
def test_alpha_is_the_root_in_bfloat16(method: str) -> None:
    for name, (theta, teacher) in problems(300).items():
        if "1e4" not in name:
            assert_exact(theta.bfloat16(), teacher.bfloat16(), method)


@pytest.mark.parametrize("method", CURVE_METHODS)
def test_alpha_is_the_root_without_value_dependent_control_flow(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the branch used during CUDA graph capture: no decision depends on values, and the number of steps is fixed."""
    for module in (alpha_module, log_partition_module):
        monkeypatch.setattr(module, "blind", lambda values: True)
    for theta, teacher in problems(50).values():
        assert_exact(theta, teacher, method)


def test_alpha_is_the_root_at_full_size() -> None:
    theta = 3 * randn(40, 64, 152064)
    teacher = theta + randn(41, 64, 1) * randn(42, 64, 152064)
    assert_exact(theta, teacher, "kl_symmetry", rows=range(0, 64, 21))
    for scale in (1e-1, 1e-6):
        theta, teacher = near(43, 152064, scale)
        assert_exact(theta[:1], teacher[:1], "kl_symmetry")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([2, 3, 5, 20, 300]),
    size=st.floats(-0.5, 1.5),
    noise=st.floats(-6, 1),
    peak=st.floats(0, 40),
    shift=st.floats(-20, 20),
    tail=st.sampled_from([1.0, 30.0, 1000.0]),
    mask=st.sampled_from(["none", "theta", "teacher", "both"]),
    bfloat=st.booleans(),
    method=st.sampled_from(CURVE_METHODS),
)
def test_alpha_is_the_root_of_random_problems(
    seed: int,
    vocab: int,
    size: float,
    noise: float,
    peak: float,
    shift: float,
    tail: float,
    mask: str,
    bfloat: bool,
    method: str,
) -> None:
    theta = 10**size * randn(seed, 2, vocab)
    theta[:, 0] += peak
    heavy = torch.where(randn(seed + 1, 2, vocab) > 1.5, tail, 1.0)
    teacher = theta + 10**noise * heavy * randn(seed + 2, 2, vocab) + shift
    for side, z in (("theta", theta), ("teacher", teacher)):
        if mask in (side, "both"):
            z[:, 1:][randn(seed + len(side), 2, vocab - 1) > 0.8] = -INF
    if bfloat:
        theta, teacher = theta.bfloat16(), teacher.bfloat16()
    assert_exact(theta, teacher, method)


@pytest.mark.parametrize("method", [*CURVE_METHODS, "entropy"])
def test_identical_policies_give_one_half(method: str) -> None:
    config = MixingConfig(alpha_method=method)
    for z in (randn(1, 4, 100), peaked(2, 4, 100, 1e4, 3), masked(3, 4, 100, 0.5), torch.zeros(4, 100)):
        assert solve_alpha(z, z.clone(), config).tolist() == [0.5] * 4
    # The off-peak mass is below the range of float32, so the two distributions are equal.
    assert solve_alpha(peaked(4, 4, 9, 1e4, 0), peaked(5, 4, 9, 2e4, 0), config).tolist() == [0.5] * 4


@pytest.mark.parametrize("method", [*CURVE_METHODS, "entropy"])
@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_swapping_the_policies_mirrors_alpha(method: str, scale: float) -> None:
    theta, teacher = near(7, 500, scale)
    config = MixingConfig(alpha_method=method)
    there, back = solve_alpha(theta, teacher, config), solve_alpha(teacher, theta, config)
    torch.testing.assert_close(there, 1 - back, atol=2e-5, rtol=0)
    assert scale < 1 or (there - 0.5).abs().max() > 1e-3  # alpha is not always one half


@pytest.mark.parametrize("method", [*CURVE_METHODS, "entropy"])
def test_alpha_stays_within_its_bounds(method: str) -> None:
    theta, teacher = 3 * randn(1, 60, 20), 3 * randn(2, 60, 20)
    free = solve_alpha(theta, teacher, MixingConfig(alpha_method=method))
    config = MixingConfig(alpha_method=method, alpha_min=0.45, alpha_max=0.5)
    bound = solve_alpha(theta, teacher, config)
    torch.testing.assert_close(bound, free.clamp(0.45, 0.5), atol=2e-5, rtol=0)
    assert (free < 0.45).any()
    assert (free > 0.5).any()
    pinned = MixingConfig(alpha_method=method, alpha_min=0.3, alpha_max=0.3)
    assert torch.equal(solve_alpha(theta, teacher, pinned), torch.full((60,), 0.3))


def test_clamped_alpha_minimises_log_z_within_the_bounds() -> None:
    """The solution of kl_symmetry minimises a convex function, also if the root lies outside the bounds."""
    theta, teacher = 3 * randn(1, 40, 20), 3 * randn(2, 40, 20)
    config = MixingConfig(alpha_min=0.55, alpha_max=0.8)
    alpha = solve_alpha(theta, teacher, config).double()
    grid = torch.linspace(0.55, 0.8, 251, dtype=torch.float64)
    log_theta, log_teacher = theta.double().log_softmax(-1), teacher.double().log_softmax(-1)

    def log_z(a: Tensor) -> Tensor:
        return torch.logsumexp(torch.lerp(log_theta, log_teacher, a), -1)

    best = torch.stack([log_z(a) for a in grid]).min(0).values
    assert (log_z(alpha[:, None]) <= best + 1e-7).all()


def test_entropy_method_gives_the_students_share_of_the_entropy() -> None:
    theta, teacher = 3 * randn(1, 8, 200), randn(2, 8, 200)
    theta[0] = peaked(3, 1, 200, 30, 4)[0]  # entropy 1e-11; a formula with 1 - p would round it to 0
    teacher[0] = peaked(4, 1, 200, 29, 4)[0]
    theta[1] = masked(5, 1, 200, 0.5)[0]

    def exact(z: Tensor) -> Tensor:
        y = z.double() - z.double().amax(-1, keepdim=True)
        p = y.exp()
        peak = y == 0
        rest = p.masked_fill(peak, 0).sum(-1)
        weighted = (p * y).nan_to_num(0).sum(-1)
        return torch.log1p(rest) - weighted / (1 + rest)

    torch.testing.assert_close(entropy(theta), exact(theta), rtol=2e-6, atol=0)
    expected = exact(theta) / (exact(theta) + exact(teacher))
    alpha = solve_alpha(theta, teacher, MixingConfig(alpha_method="entropy"))
    torch.testing.assert_close(alpha.double(), expected, rtol=0, atol=1e-5)


def test_fixed_method_gives_fixed_alpha() -> None:
    config = MixingConfig(alpha_method="fixed", fixed_alpha=0.3)
    assert torch.equal(solve_alpha(randn(1, 3, 9), randn(2, 3, 9), config), torch.full((3,), 0.3))


@pytest.mark.parametrize("method", CURVE_METHODS)
def test_disjoint_supports_give_the_lower_bound(method: str) -> None:
    theta, teacher = randn(1, 2, 10), randn(2, 2, 10)
    theta[0, 5:], teacher[0, :5] = -INF, -INF
    alpha = solve_alpha(theta, teacher, MixingConfig(alpha_method=method, alpha_min=0.2))
    assert alpha[0] == pytest.approx(0.2)
    assert abs(float(alpha[1]) - Exact(theta[1], teacher[1]).solve(method)) < TOLERANCE


@pytest.mark.parametrize("method", [*CURVE_METHODS, "entropy"])
def test_rows_do_not_affect_each_other(method: str) -> None:
    """The result of a row must not depend on its batch, nor on rows with NaN, +inf or all -inf on either side."""
    rows = [pair for pair in problems(50).values() if pair[0].abs().nan_to_num(0, 0, 0).max() < 1e3]
    theta, teacher = torch.cat([a for a, _ in rows]), torch.cat([b for _, b in rows])
    config = MixingConfig(alpha_method=method)
    together = solve_alpha(theta, teacher, config)
    order = torch.randperm(len(theta), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(solve_alpha(theta[order], teacher[order], config), together[order], atol=2e-5, rtol=0)
    alone = torch.cat([solve_alpha(theta[i : i + 1], teacher[i : i + 1], config) for i in range(len(theta))])
    torch.testing.assert_close(alone, together, atol=2e-5, rtol=0)

    spoilt_theta, spoilt_teacher = theta.clone(), teacher.clone()
    spoilt_theta[0, 3], spoilt_theta[4], spoilt_teacher[8, 0], spoilt_teacher[12, 7] = float("nan"), -INF, INF, float("nan")
    spoilt = solve_alpha(spoilt_theta, spoilt_teacher, config)
    bad = torch.zeros(len(theta), dtype=torch.bool)
    bad[[0, 4, 8, 12]] = True
    assert spoilt[bad].isnan().all()
    torch.testing.assert_close(spoilt[~bad], together[~bad], atol=2e-5, rtol=0)


def test_inputs_are_unchanged_and_results_survive_the_next_call() -> None:
    theta, teacher = randn(1, 4, 100), randn(2, 4, 100)
    before = theta.clone(), teacher.clone()
    config = MixingConfig()
    first = solve_alpha(theta, teacher, config)
    kept = first.clone()
    solve_alpha(teacher, theta, config)
    assert torch.equal(first, kept)
    assert torch.equal(theta, before[0])
    assert torch.equal(teacher, before[1])


def test_threads_inference_mode_and_gradients_share_the_workspace_safely() -> None:
    config = MixingConfig()
    theta, teacher = randn(1, 8, 3000), randn(2, 8, 3000)
    expected = solve_alpha(theta, teacher, config)
    results: list[Tensor] = []

    def work() -> None:
        for i in range(20):
            with torch.inference_mode(i % 2 == 0):
                results.append(solve_alpha(theta.clone().requires_grad_(i % 4 == 3), teacher, config).clone())

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 40
    for result in results:
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_wrong_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"student logits \(2, 5\) and teacher logits \(2, 6\).*shared vocabulary"):
        solve_alpha(torch.zeros(2, 5), torch.zeros(2, 6), MixingConfig())
    with pytest.raises(ValueError, match=r"\[B, V\]"):
        solve_alpha(torch.zeros(5), torch.zeros(5), MixingConfig())


@pytest.mark.parametrize("planted", [0.0, 2e-4])
def test_planted_error_fails_the_comparison(planted: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power: the comparison fails if the root of the solver is shifted by twice the tolerance."""
    solver = alpha_module._root
    monkeypatch.setattr(alpha_module, "_root", lambda *args: solver(*args) + planted)
    theta, teacher = problems(4000)["random"]
    if planted:
        with pytest.raises(AssertionError):
            assert_exact(theta, teacher, "kl_symmetry")
    else:
        assert_exact(theta, teacher, "kl_symmetry")
