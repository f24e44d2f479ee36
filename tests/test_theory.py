"""Numerical checks of every theorem in theory/optimal_sampling.md, and of every number quoted there.

p is the student's distribution and r the teacher's. Both are float64, from the definitions in theory/pairs.py, except where a
theorem is about osd's solver and mixture. `says` compares a computed number with the sentence that quotes it.
"""

from __future__ import annotations

import itertools
import re
import types
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize

from osd.alpha import _root, solve_alpha
from osd.core import MixingConfig
from osd.engine.speculation import expected_tokens, residual
from osd.log_partition import Curve
from osd.mixing import Mixture, mix
from theory.pairs import (
    AT_THE_END,
    BOTH_LOSE,
    LOOK_AHEAD,
    MIRRORED,
    NEARLY_LOST,
    ONE_LOSES,
    RUNNING,
    Tree,
    Two,
    Vector,
    bisect,
    kl,
    second_moment,
    swapped_tail,
)

Objectives = Callable[[Vector], tuple[float, float]]
Family = Callable[[float], Vector]

FOLDER = Path(__file__).parent.parent / "theory"
TEXT = (FOLDER / "optimal_sampling.md").read_text()
HEADING = re.compile(r"^### Theorem (\d+)\. (.+)$", re.MULTILINE)
ALPHAS = np.linspace(0, 1, 21)
PAIRS = [RUNNING, NEARLY_LOST, *(Two.random(seed, size) for seed, size in enumerate([2, 3, 3, 5, 20, 200]))]
OVERLAPPING = [BOTH_LOSE, ONE_LOSES, AT_THE_END]


def flat(text: str) -> str:
    return " ".join(text.split())


def says(quote: str, *values: float) -> None:
    """Assert that the document contains the quote, and that the last numbers of the quote equal the values, rounded.

    Line breaks are ignored.
    """
    assert flat(quote) in flat(TEXT), f"the document does not say {quote!r}"
    numbers = re.findall(r"\d+\.\d+", quote)[-len(values) :] if values else []
    assert len(numbers) == len(values)
    for number, value in zip(numbers, values, strict=True):
        assert f"{value:.{len(number.partition('.')[2])}f}" == number, f"{quote!r}, computed {value}"


def random_q(seed: int, on: Vector, count: int) -> Vector:
    """Draw distributions with support `on`, from flat to peaked."""
    rng = np.random.default_rng(seed)
    q = np.zeros((count, len(on)))
    for row, concentration in zip(q, 10 ** rng.uniform(-1, 1, count), strict=True):
        row[on] = rng.dirichlet(np.full(on.sum(), concentration))
    return q


def near_family(pair: Two, seed: int, count: int) -> Iterator[Vector]:
    """Yield small perturbations of members of the geometric family at random α."""
    rng = np.random.default_rng(seed)
    for alpha, size in zip(rng.uniform(0, 1, count), 10 ** rng.uniform(-4, -0.5, count), strict=True):
        q = pair.q(alpha) * np.exp(size * rng.normal(size=len(pair.p)))
        yield q / q.sum()


def logits(*pairs: Two) -> tuple[torch.Tensor, torch.Tensor]:
    with np.errstate(divide="ignore"):
        return (
            torch.tensor(np.log(np.stack([pair.p for pair in pairs]))),
            torch.tensor(np.log(np.stack([pair.r for pair in pairs]))),
        )


def osd_alpha(pair: Two, method: str = "kl_symmetry", **bounds: float) -> float:
    return float(solve_alpha(*logits(pair), MixingConfig(alpha_method=method, **bounds)))


def osd_mix(pair: Two, **bounds: float) -> Mixture:
    return mix(*logits(pair), MixingConfig(**bounds))


def dominates(a: tuple[float, float], b: tuple[float, float], slack: float = 0.0) -> bool:
    """Return True if a is better than b by more than `slack` in one objective, and not worse in the other."""
    return a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] - slack or a[1] < b[1] - slack)


def test_theorems_and_tests_match() -> None:
    def slug(title: str) -> str:
        ascii_only = unicodedata.normalize("NFKD", title.replace("–", " ")).encode("ascii", "ignore").decode()
        return "_".join(re.findall(r"[a-z0-9]+", ascii_only.lower()))

    headings = {f"test_theorem_{int(number):02d}_{slug(title)}" for number, title in HEADING.findall(TEXT)}
    tests = {name.partition("__")[0] for name in globals() if name.startswith("test_theorem_")}
    assert tests == headings
    assert [int(number) for number, _ in HEADING.findall(TEXT)] == list(range(1, len(headings) + 1))


def test_theorem_01_two_weights_one_sampler() -> None:
    for pair in PAIRS[:5]:
        on = np.ones(len(pair.p), dtype=bool)
        least = np.sqrt(pair.p**2 + pair.r**2).sum() ** 2
        assert 2 < least < 4
        assert sum(pair.second_moments(pair.quadratic(0.5))) == pytest.approx(least)
        for q in random_q(0, on, 300):
            moments = pair.second_moments(q)
            assert min(moments) > 1
            assert sum(moments) >= least * (1 - 1e-12)
        assert second_moment(pair.p, pair.p) == pytest.approx(1)
        for alpha in ALPHAS:
            q = pair.q(alpha)
            constant = (pair.p / q) ** (1 - alpha) * (pair.r / q) ** alpha
            assert constant == pytest.approx(np.exp(pair.psi(alpha)))
            assert alpha in (0, 1) or constant.max() < 1
    assert max(BOTH_LOSE.p / BOTH_LOSE.linear(0.5).clip(1e-300)) <= 2  # "weights that never exceed 2"
    assert second_moment(BOTH_LOSE.p, BOTH_LOSE.q(0.5)) == np.inf  # part 2
    assert np.sqrt(RUNNING.p**2 + RUNNING.p**2).sum() ** 2 == pytest.approx(2)
    disjoint = Two.of([0.3, 0.7, 0, 0], [0, 0, 0.6, 0.4])
    assert sum(disjoint.second_moments(disjoint.quadratic(0.5))) == pytest.approx(4)


def test_theorem_02_the_curve_log_z() -> None:
    step = 1e-4
    for pair in [*PAIRS, *OVERLAPPING]:
        spread = np.ptp(pair.gap)
        assert pair.psi(0) == pytest.approx(np.log(pair.p[pair.shared].sum()))
        assert pair.psi(1) == pytest.approx(np.log(pair.r[pair.shared].sum()))
        for alpha in (-0.4, 0.1, 0.5, 0.8, 1.7):
            at = [pair.psi(alpha + k * step) for k in (-1, 0, 1)]
            assert (at[2] - at[0]) / (2 * step) == pytest.approx(pair.moment(alpha, 1), abs=1e-5)
            variances = [pair.moment(alpha + k * step, 2) for k in (-1, 0, 1)]
            assert (pair.moment(alpha + step, 1) - pair.moment(alpha - step, 1)) / (2 * step) == pytest.approx(
                variances[1], rel=1e-4
            )
            third = pair.moment(alpha, 3)
            assert (variances[2] - variances[0]) / (2 * step) == pytest.approx(third, rel=1e-3, abs=1e-5)
            assert 0 < variances[1] <= spread**2 / 4 * (1 + 1e-12)
            assert abs(third) <= spread * variances[1]
            to_p, to_r = pair.forward(pair.q(alpha))
            assert to_p == pytest.approx(alpha * pair.moment(alpha, 1) - pair.psi(alpha))
            assert to_r == pytest.approx(-(1 - alpha) * pair.moment(alpha, 1) - pair.psi(alpha))
            assert not 0 < alpha < 1 or pair.psi(alpha) < 0
            for q in random_q(1, pair.shared, 5):
                mean = float(q[pair.shared] @ pair.gap)
                rest = kl(q, pair.q(alpha)) - pair.psi(alpha)
                assert pair.forward(q) == pytest.approx((rest + alpha * mean, rest - (1 - alpha) * mean))
        points = np.array([pair.forward(pair.q(alpha)) for alpha in ALPHAS])
        assert (np.diff(points[:, 0]) > 0).all()
        assert (np.diff(points[:, 1]) < 0).all()


def test_theorem_03_the_pareto_front__no_q_dominates_a_member() -> None:
    for pair in [*PAIRS[:5], *OVERLAPPING]:
        front = [pair.forward(pair.q(alpha)) for alpha in ALPHAS]
        anywhere = random_q(2, pair.p + pair.r > 0, 300)
        for q in itertools.chain(random_q(3, pair.shared, 1000), anywhere, near_family(pair, 4, 300)):
            point_q = pair.forward(q)
            assert not any(dominates(point_q, point, 1e-12) for point in front)
            assert point_q[0] > 0  # so no q dominates p


def test_theorem_03_the_pareto_front__other_q_are_dominated_with_the_margin() -> None:
    inside = 0
    for pair in [*PAIRS[:5], *OVERLAPPING]:
        for q in itertools.chain(random_q(5, pair.shared, 40), near_family(pair, 6, 40)):
            mean = float(q[pair.shared] @ pair.gap)
            alpha = bisect(lambda a, pair=pair, mean=mean: pair.moment(a, 1) - mean)  # 0 or 1 without a root
            best, point, margin = pair.forward(pair.q(alpha)), pair.forward(q), kl(q, pair.q(alpha))
            assert dominates(best, point) or margin < 1e-10
            if pair.moment(0, 1) < mean < pair.moment(1, 1):
                inside += 1
                assert np.subtract(point, best) == pytest.approx([margin, margin], rel=1e-6, abs=1e-10)
    assert inside > 300


def test_theorem_03_the_pareto_front__slope_and_lost_support() -> None:
    for pair in PAIRS:
        for alpha in (0.2, 0.5, 0.9):
            (x0, y0), (x1, y1) = (pair.forward(pair.q(alpha + d)) for d in (-1e-5, 1e-5))
            assert (y1 - y0) / (x1 - x0) == pytest.approx(-(1 - alpha) / alpha, rel=1e-3)
    # p dominates every q with mass outside S.
    q = BOTH_LOSE.linear(0.3)
    assert BOTH_LOSE.forward(q) == (np.inf, np.inf)
    assert dominates(BOTH_LOSE.forward(BOTH_LOSE.p), (0.1, np.inf))
    assert dominates(BOTH_LOSE.forward(BOTH_LOSE.q(0)), (-np.log(0.9) + 1e-9, np.inf))


@pytest.mark.parametrize("family", ["linear", "quadratic"])
def test_theorem_04_other_directions_other_families(family: str) -> None:
    """Both inclusions: no q dominates a member of the family, and for every q a member is at least as good."""
    for pair in [*PAIRS[:5], *OVERLAPPING]:
        objectives = pair.reverse if family == "linear" else pair.second_moments
        member = getattr(pair, family)

        def as_good(q: Vector, objectives: Objectives = objectives, member: Family = member) -> tuple[float, float]:
            """Return the objectives of the member that equals q in the first objective, or is better by one bit.

            If every member is better there, returns the objectives of r.
            """
            weight = bisect(lambda w: objectives(member(w))[0] - objectives(q)[0])
            return objectives(member(max(weight - 4e-16, 0)))

        members = np.array([objectives(member(weight)) for weight in np.linspace(0, 1, 101)])
        for q in random_q(7, pair.p + pair.r > 0, 40):
            point = objectives(q)
            assert not any(dominates(point, (x, y), 1e-12) for x, y in members)
            assert (np.array(as_good(q)) <= np.array(point) * (1 + 1e-9) + 1e-12).all()
        # Another member dominates the geometric one (with two tokens all families are the same line).
        assert len(pair.p) == 2 or dominates(as_good(pair.q(0.5)), objectives(pair.q(0.5)), 1e-6)
        for weight in (0.2, 0.7):  # the member is the unique minimiser of the weighted sum
            least = np.array([1 - weight, weight]) @ objectives(member(weight))
            for q in random_q(8, pair.p + pair.r > 0, 100):
                assert np.array([1 - weight, weight]) @ objectives(0.9 * member(weight) + 0.1 * q) > least


def test_theorem_04_other_directions_other_families__table() -> None:
    pair = RUNNING
    linear = pair.linear(bisect(lambda w: np.subtract(*pair.reverse(pair.linear(w)))))
    quadratic = pair.quadratic(bisect(lambda w: np.subtract(*pair.second_moments(pair.quadratic(w)))))
    rows = {
        "| geometric, $q^{\\ast}$ | (0.420, 0.413, 0.167) | **0.521** | 0.528 | 2.396 |": pair.q(pair.chernoff()),
        "| linear | (0.469, 0.242, 0.289) | 0.781 | **0.348** | 1.638 |": linear,
        "| root mean square | (0.467, 0.200, 0.333) | 0.928 | 0.386 | **1.552** |": quadratic,
    }
    for row, q in rows.items():
        says(row, *q, max(pair.forward(q)), max(pair.reverse(q)), max(pair.second_moments(q)))


def test_theorem_05_existence_and_uniqueness_of_alpha() -> None:
    for pair in PAIRS:
        assert pair.moment(0, 1) == pytest.approx(-kl(pair.p, pair.r))
        assert pair.moment(1, 1) == pytest.approx(kl(pair.r, pair.p))
        assert 0 < pair.chernoff() < 1
        for low, high in ((0, 1), (0, 0.3), (0.6, 0.9), (0.45, 0.55)):
            clamped = min(max(pair.chernoff(), low), high)
            assert osd_alpha(pair, alpha_min=low, alpha_max=high) == pytest.approx(clamped, abs=3e-5)
            for alpha in np.linspace(low, high, 41):
                if abs(alpha - clamped) > 1e-6:
                    assert pair.psi(alpha) > pair.psi(clamped)
                    assert max(pair.forward(pair.q(alpha))) > max(pair.forward(pair.q(clamped)))
    for pair in (BOTH_LOSE, ONE_LOSES):
        assert osd_alpha(pair) == pytest.approx(pair.chernoff(), abs=3e-5)


def test_theorem_05_existence_and_uniqueness_of_alpha__degenerate() -> None:
    identical = Two.of([0.7, 0.2, 0.1], [0.7, 0.2, 0.1])
    assert [identical.psi(alpha) for alpha in ALPHAS] == pytest.approx([0] * len(ALPHAS))
    assert osd_alpha(identical) == 0.5
    alike_on_s = Two.of([0.4, 0.2, 0.4, 0], [0.4, 0.2, 0, 0.4])  # ℓ = 0 on S, policies not identical
    assert osd_alpha(alike_on_s) == pytest.approx(0.5)
    for p, r, end in (([0.2, 0.1, 0.7], [0.6, 0.3, 0.1], 0), ([0.6, 0.3, 0.1], [0.2, 0.1, 0.7], 1)):
        pair = Two.of([*p[:2], p[2], 0], [*r[:2], 0, r[2]])  # ℓ = ± log 3 on S
        assert np.ptp(pair.gap) == pytest.approx(0)
        assert pair.q(0.1) == pytest.approx(pair.q(0.9))
        assert osd_alpha(pair) == end == round(pair.chernoff())
    disjoint = Two.of([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5])
    assert disjoint.psi(0.5) == -np.inf
    mixed = osd_mix(disjoint, alpha_min=0.2)
    assert float(mixed.alpha_B) == pytest.approx(0.2)
    assert mixed.logq_BV[0].exp().tolist() == pytest.approx([0.5, 0.5, 0, 0])


def test_theorem_05_existence_and_uniqueness_of_alpha__at_an_end() -> None:
    pair = AT_THE_END
    assert pair.moment(0, 1) > 0
    assert pair.chernoff() == pytest.approx(0, abs=1e-12)
    says("$q_0=(0.667,0.333,0)$", *pair.q(0)[:2])
    says("with divergences 1.204 and 0.009", *pair.forward(pair.q(0)))
    mixed = osd_mix(pair)
    assert float(mixed.alpha_B) == 0
    assert mixed.logq_BV[0].exp().tolist() == pytest.approx(pair.p)
    assert (float(mixed.kl_theta_B), float(mixed.kl_teacher_B)) == (0, np.inf)


def test_theorem_06_the_chernoff_point() -> None:
    for pair in [*PAIRS, BOTH_LOSE, ONE_LOSES]:
        information = -optimize.minimize_scalar(pair.psi, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).fun
        q = pair.q(pair.chernoff())
        assert q[pair.shared] @ pair.gap == pytest.approx(0, abs=1e-10)
        assert pair.forward(q) == pytest.approx((information, information))
        assert information > 0
        mixed = osd_mix(pair)
        assert float(mixed.kl_theta_B) == pytest.approx(information, rel=1e-3)
        assert float(mixed.kl_teacher_B) == pytest.approx(information, rel=1e-3)
        for alpha in (pair.chernoff() - 0.1, pair.chernoff() + 0.1):
            assert np.subtract(*pair.forward(pair.q(alpha))) == pytest.approx(pair.moment(alpha, 1))
            assert abs(pair.moment(alpha, 1)) > 1e-3
    alpha = RUNNING.chernoff()
    says("they cross at $\\alpha^{\\ast}=0.5606$ and $C=0.5207$", alpha, -RUNNING.psi(alpha))


def test_theorem_07_minimax__for_every_q() -> None:
    for pair in [*PAIRS[:6], *OVERLAPPING]:
        best = pair.q(pair.chernoff())
        value = -pair.psi(pair.chernoff())
        assert max(pair.forward(best)) == pytest.approx(value)
        for q in itertools.chain(random_q(9, pair.shared, 500), near_family(pair, 10, 300)):
            assert max(pair.forward(q)) >= value + kl(q, best) - 1e-10


def test_theorem_07_minimax__numerically() -> None:
    """A general optimiser finds q* and C without using the geometric family."""
    for pair in (RUNNING, ONE_LOSES, AT_THE_END, Two.random(3, 4)):
        support = np.flatnonzero(pair.shared)

        def spread(z: Vector, pair: Two = pair, support: Vector = support) -> Vector:
            q = np.zeros(len(pair.p))
            q[support] = np.exp(z - np.logaddexp.reduce(z))
            return q

        found = optimize.minimize(
            lambda z, pair=pair, spread=spread: max(pair.forward(spread(z))),
            np.zeros(len(support)),
            method="Nelder-Mead",
            options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000, "maxfev": 8000},
        )
        assert found.fun == pytest.approx(-pair.psi(pair.chernoff()), abs=1e-6)
        assert spread(found.x) == pytest.approx(pair.q(pair.chernoff()), abs=1e-3)


def test_theorem_08_bounds() -> None:
    for pair in PAIRS:
        there, back = kl(pair.p, pair.r), kl(pair.r, pair.p)
        information = -pair.psi(pair.chernoff())
        assert -pair.psi(0.5) <= information + 1e-12
        assert information < there * back / (there + back)
        crossing = back / (there + back)
        assert osd_alpha(pair, "reverse_kl_symmetry") == pytest.approx(crossing, abs=1e-4)
        assert np.subtract(*pair.reverse(pair.q(crossing))) == pytest.approx(0, abs=1e-9)
    for pair in [*PAIRS, *OVERLAPPING]:
        bound = np.sqrt(-pair.psi(pair.chernoff()) / 2)
        q = pair.q(pair.chernoff())
        assert max(abs(q - pair.p).sum(), abs(q - pair.r).sum()) / 2 <= bound
        assert abs(pair.p - pair.r).sum() / 2 <= 2 * bound
    there, back = kl(RUNNING.p, RUNNING.r), kl(RUNNING.r, RUNNING.p)
    values = -RUNNING.psi(0.5), -RUNNING.psi(RUNNING.chernoff()), there * back / (there + back)
    says("$0.5124\\le C=0.5207\\le0.9343$", *values)


def test_theorem_09_ess_and_kl_for_near_policies__exact() -> None:
    for pair in PAIRS:
        for alpha in (0.1, 0.5, 0.8):
            log_theta, log_teacher = np.log(pair.second_moments(pair.q(alpha)))
            assert log_theta == pytest.approx(pair.psi(alpha) + pair.psi(-alpha))
            assert log_teacher == pytest.approx(pair.psi(alpha) + pair.psi(2 - alpha))
            assert log_theta > kl(pair.p, pair.q(alpha))
        balance = pair.ess_balance()
        assert 0 < balance < 1
        assert np.subtract(*pair.second_moments(pair.q(balance))) == pytest.approx(0, abs=1e-7)
        assert osd_alpha(pair, "ess_balance") == pytest.approx(balance, abs=1e-4)


def test_theorem_09_ess_and_kl_for_near_policies__orders() -> None:
    """Each error divided by its order in ε converges to a non-zero constant, so the order is exact."""
    for seed in range(3):
        settled = []
        for scale in (0.1, 0.05):
            pair = Two.near(seed, 6, scale)
            alpha, q = 0.3, pair.q(0.3)
            log_ess = -np.log(second_moment(pair.p, q))
            distance, third = kl(q, pair.p), pair.moment(0, 3)
            assert -log_ess / (2 * distance) == pytest.approx(1, abs=scale)
            ratio = pair.moment(0.5, 3) / pair.moment(0.5, 2)
            mirror = pair.q(1 - alpha)  # exchanged roles: -ℓ under r
            to_teacher = np.log(second_moment(pair.r, mirror)) - 2 * kl(mirror, pair.r)
            settled.append(
                (
                    (-log_ess - 2 * distance) / (alpha**3 * third),
                    (-log_ess - 2 * distance + 2 / 3 * alpha**3 * third) / scale**4,
                    (pair.chernoff() - 0.5) / ratio * 24,
                    (pair.ess_balance() - 0.5) / ratio * 8,
                    (pair.chernoff() - 0.5 - ratio / 24) / scale**3,
                    (pair.ess_balance() - 0.5 - ratio / 8) / scale**3,
                    to_teacher / (alpha**3 * -pair.moment(1, 3)),
                )
            )
        assert settled[0] == pytest.approx(settled[1], rel=0.15)
        assert (settled[1][0], settled[1][-1]) == pytest.approx((-2 / 3, -2 / 3), rel=0.1)
        assert settled[1][2:4] == pytest.approx((1, 1), abs=0.02)


def test_theorem_10_failure_of_the_ess_relation() -> None:
    for eta, tau in itertools.product((0.3, 0.05, 0.01), (1e-4, 1e-9, 1e-14)):
        pair = swapped_tail(eta, tau)
        assert pair.chernoff() == pytest.approx(0.5)
        assert pair.ess_balance() == pytest.approx(0.5)
        share = [1 / moment for moment in pair.second_moments(pair.q(0.5))]
        assert share[0] == pytest.approx(share[1])
        assert share[0] <= np.sqrt(tau) * eta**-1.5 / (1 - eta - tau)
        assert -pair.psi(0.5) <= -np.log(1 - eta - tau)
    pair = swapped_tail(0.05, 1e-9)
    information = -pair.psi(0.5)
    says("promises an ESS of 0.903", np.exp(-2 * information))
    says("with $C=0.0513$; the ESS of either side is 0.0030", information, 1 / pair.second_moments(pair.q(0.5))[0])

    pair = NEARLY_LOST
    for row, alpha in (
        ("| KL balance | 0.486 | 0.0908 | 0.0908 | 0.116 | 0.857 |", pair.chernoff()),
        ("| ESS balance | 0.262 | 0.0312 | 0.1909 | 0.731 | 0.731 |", pair.ess_balance()),
    ):
        q = pair.q(alpha)
        says(row, alpha, *pair.forward(q), *(1 / moment for moment in pair.second_moments(q)))
    says("should have $\\mathrm{ESS}=0.834$", np.exp(2 * pair.psi(pair.chernoff())))
    assert osd_alpha(pair) == pytest.approx(pair.chernoff(), abs=1e-4)
    assert osd_alpha(pair, "ess_balance") == pytest.approx(pair.ess_balance(), abs=1e-4)


def test_theorem_10_failure_of_the_ess_relation__lost_support() -> None:
    for alpha in (0.01, 0.5, 0.99):
        assert BOTH_LOSE.second_moments(BOTH_LOSE.q(alpha)) == (np.inf, np.inf)
        theta, teacher = ONE_LOSES.second_moments(ONE_LOSES.q(alpha))
        assert theta == np.inf
        assert teacher < np.inf
    mixed = osd_mix(BOTH_LOSE)
    assert float(mixed.ess_theta_B) == float(mixed.ess_teacher_B) == 0
    assert BOTH_LOSE.chernoff() == pytest.approx(0.5)
    says("$\\alpha^{\\ast}=\\frac12$ and $C=0.1643$", -BOTH_LOSE.psi(0.5))
    says("KL balance is at $\\alpha^{\\ast}=0.533$", ONE_LOSES.chernoff())


def test_theorem_11_cramer_rao_and_its_finite_version() -> None:
    for pair in PAIRS:
        alpha, step = 0.4, 1e-5
        q = pair.q(alpha)
        score = (np.log(pair.q(alpha + step)) - np.log(pair.q(alpha - step))) / (2 * step)
        information = pair.moment(alpha, 2)
        assert q @ score**2 == pytest.approx(information, rel=1e-5)
        # The mean of ℓ is efficient: slope^2 / information is its variance.
        slope = (pair.moment(alpha + step, 1) - pair.moment(alpha - step, 1)) / (2 * step)
        assert slope**2 / information == pytest.approx(information, rel=1e-4)
        small = 1e-2 / np.ptp(pair.gap)
        assert kl(q, pair.q(alpha + small)) == pytest.approx(information * small**2 / 2, rel=1e-2)
        rng = np.random.default_rng(11)
        for f in [*rng.normal(size=(50, len(q))), pair.p / q]:
            bias = (pair.p - q) @ f
            bound = (q @ f**2 - (q @ f) ** 2) * (second_moment(pair.p, q) - 1)
            assert bias**2 <= bound * (1 + 1e-9)
        assert bias**2 == pytest.approx(bound)  # f = p/q, the last one
        better = pair.p**2 / q - pair.p**2 < pair.p - pair.p**2
        assert better.any()
        assert not better.all()


def test_theorem_11_cramer_rao_and_its_finite_version__numbers() -> None:
    pair = RUNNING
    most = optimize.minimize_scalar(lambda a: -pair.moment(a, 2), bounds=(0, 1), method="bounded").x
    says("largest at $\\alpha=0.795$, not at $\\alpha^{\\ast}=0.561$", most, pair.chernoff())
    samplers = pair.p, pair.r, pair.q(pair.chernoff())
    second, first = ([pair.p[i] ** 2 / q[i] - pair.p[i] ** 2 for q in samplers] for i in (1, 0))
    says("of the second token is 0.154 from the student, 0.084 from the teacher and 0.051", *second)
    says("that of the first token 0.160, 5.760 and 0.885", *first)


class Rows:
    """Pairs as float64 rows [B, V] with the inputs of `_root`. Keeps every evaluated α."""

    def __init__(self, theta: torch.Tensor, teacher: torch.Tensor) -> None:
        self.theta, self.gap = theta.log_softmax(-1), teacher.log_softmax(-1) - theta.log_softmax(-1)
        half = (theta + teacher).div(2).softmax(-1)
        self.centred = self.gap - (half * self.gap).sum(-1, keepdim=True)
        self.second, self.third = (half * self.centred**2).sum(-1), (half * self.centred**3).sum(-1)
        self.spread_B = self.centred.abs().amax(-1)
        self.seen: list[torch.Tensor] = []

    def condition(self, curve: Curve | None, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(alpha)
        q = (self.theta + alpha[:, None] * self.gap).softmax(-1)
        mean = (q * self.gap).sum(-1)
        return mean, (q * (self.gap - mean[:, None]) ** 2).sum(-1)

    def exact(self) -> torch.Tensor:
        low, high = torch.zeros_like(self.second), torch.ones_like(self.second)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.condition(None, middle)[0] < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.seen.clear()
        return (low + high) / 2


def solver_problems() -> Iterator[Rows]:
    """Yield 7,000 pairs: logits with standard deviation up to 10, differences with 1e-3 to 10, some heavy-tailed."""
    rng = np.random.default_rng(12)
    for vocab, near in itertools.product((2, 3, 5, 20), (0.0, 0.5, 2.0)):
        count = 584 if vocab < 20 else 582
        scale = 10 ** rng.uniform(-1, 1, (count, 1))
        theta = scale * rng.normal(size=(count, vocab))
        noise = scale * 10 ** -rng.uniform(0, near, (count, 1)) * rng.normal(size=(count, vocab))
        if near == 2:
            noise *= 1 + 9 * (rng.uniform(size=noise.shape) < 0.1)
        yield Rows(torch.tensor(theta), torch.tensor(theta + noise if near else noise))


def test_theorem_12_the_solver_converges() -> None:
    rows = most = 0
    for problem in solver_problems():
        exact = problem.exact()
        start = 0.5 + (problem.third / problem.second / 24).clamp(-0.4, 0.4)
        for low, high in ((0.0, 1.0), (0.2, 0.45)):
            problem.seen.clear()
            config = MixingConfig(alpha_min=low, alpha_max=high)
            alpha = _root(problem.condition, types.SimpleNamespace(spread_B=problem.spread_B), start, config, 50)
            assert (alpha - exact.clamp(low, high)).abs().max() < 1.35e-5
            most = max(most, len(problem.seen))
        rows += len(exact)
    says("runs 7,000 pairs of policies")
    assert 6990 <= rows <= 7010
    assert most <= 16
    says("no row takes more than 16 (10 when this was written)")


def test_theorem_12_the_solver_converges__from_the_worst_start() -> None:
    """The solver converges from either end, wherever the root is."""
    for problem in solver_problems():
        exact = problem.exact()
        for start in (0.0, 1.0):
            problem.seen.clear()
            given = torch.full_like(exact, start)
            alpha = _root(problem.condition, types.SimpleNamespace(spread_B=problem.spread_B), given, MixingConfig(), 400)
            assert (alpha - exact).abs().max() < 1.35e-5
            assert len(problem.seen) <= 50


def test_theorem_12_the_solver_converges__rate_and_stopping() -> None:
    checked = stopped = 0
    for problem in solver_problems():
        exact, width = problem.exact(), problem.gap.amax(-1) - problem.gap.amin(-1)
        for offset in (-0.3, -0.03, 0.003, 0.1):
            alpha = exact + offset
            value, slope = problem.condition(None, alpha)
            x, step = width * abs(offset), value / slope
            error = width * (alpha - step - exact).abs()
            assert (error <= torch.expm1(x) - x + 1e-9).all()
            near = x <= 1
            assert (error[near] <= 0.72 * x[near] ** 2 + 1e-9).all()
            checked += int(near.sum())
            y = (width * step.abs()).clamp(max=0.999)
            assert (error <= y / (1 - y) + torch.log1p(-y) + 1e-9)[width * step.abs() < 1].all()
            rule = (problem.spread_B * step.abs() < 0.1) & (problem.spread_B * step**2 < 1e-5)
            assert (error[rule] / width[rule] < 1.35e-5).all()
            stopped += int(rule.sum())
            assert (problem.spread_B >= width / 2 - 1e-12).all()
    assert checked > 1000
    assert stopped > 1000


def two_tokens(share: float, size: float) -> Two:
    """Make a pair for which ℓ minus its mean under q at 1/2 takes the values size and -share * size."""
    w, x = np.array([share, 1.0]), np.array([size, -share * size])
    p, r = w * np.exp(-x / 2), w * np.exp(x / 2)
    return Two(p / p.sum(), r / r.sum())


def expansion_error(pair: Two) -> tuple[float, float]:
    """Return (error of the expansion, s)."""
    guess = 0.5 + pair.moment(0.5, 3) / pair.moment(0.5, 2) / 24
    return abs(pair.chernoff() - guess), float(abs(pair.gap - pair.moment(0.5, 1)).max())


def test_theorem_13_the_expansion_about_one_half() -> None:
    for seed, scale in itertools.product(range(40), (0.2, 0.1, 0.02)):
        pair = Two.near(seed, 4, scale)
        pair = Two.near(seed, 4, scale * min(1, 0.22 / expansion_error(pair)[1]))
        error, size = expansion_error(pair)
        assert size <= 0.25
        assert error <= size**3 / 240 + 1e-12
    for size in (0.25, 0.05):
        worst = max(expansion_error(two_tokens(share, size))[0] for share in np.linspace(0.02, 1, 99))
        says("the largest error found is $0.00109 s^3$", worst / size**3)
        assert worst <= size**3 / 240
    says("the search $1.7\\cdot10^{-5}$", max(expansion_error(two_tokens(x, 0.25))[0] for x in (0.4, 0.5, 0.6)) * 1e5)
    size, grow = 0.25, np.exp(0.25) * 1.125**2
    bracket = 2.39 * 1.125 * grow / 1920 + 1 / 1152 + 2 * size**2 * grow / (6 * 24**3)
    says("is $0.00404\\lt\\frac1{240}$", np.exp(size) * bracket)


def test_theorem_13_the_expansion_about_one_half__bounds_on_cumulants() -> None:
    """Checks the lemma of the proof on random variables of mean 0 with |X| <= 1, including nearly extreme ones."""
    rng, most = np.random.default_rng(13), np.zeros(2)
    for _ in range(4000):
        size = rng.integers(2, 5)
        w, x = rng.dirichlet(np.full(size, rng.choice([0.3, 1.0]))), rng.normal(size=size)
        x = x - w @ x
        m = [w @ (x / abs(x).max()) ** k for k in range(6)]
        v, fourth, fifth = m[2], m[4] - 3 * m[2] ** 2, m[5] - 10 * m[2] * m[3]
        assert abs(m[3]) <= v * (1 - v) + 1e-12
        assert abs(fourth) <= 2 * v
        assert abs(fifth) <= 2.39 * v
        most = np.maximum(most, [abs(fourth) / v, abs(fifth) / v])
    assert most[0] > 1.5
    assert most[1] > 1.5


def test_theorem_14_conditioning() -> None:
    rng = np.random.default_rng(14)
    h = rng.normal(size=6)
    for scale in (1e-1, 1e-2, 1e-3):
        pair = Two.near(0, 6, scale)
        roots = []
        for tau in (-1e-2 * scale, 1e-2 * scale):
            moved = pair.r * np.exp(tau * h)
            roots.append(Two(pair.p, moved / moved.sum()).chernoff())
        assert abs(roots[1] - roots[0]) / (2e-2 * scale) < abs(h).max()  # bounded, whatever the scale
        eta = pair.moment(0.5, 2) / 100
        shift = bisect(lambda a, pair=pair, eta=eta: pair.moment(a, 1) + eta) - pair.chernoff()
        variances = [pair.moment(alpha, 2) for alpha in ALPHAS]
        assert eta / max(variances) * 0.999 <= abs(shift) <= eta / min(variances) * 1.001
        assert pair.moment(0.5, 2) / scale**2 == pytest.approx(Two.near(0, 6, 1e-4).moment(0.5, 2) / 1e-8, rel=0.2)


def test_theorem_14_conditioning__in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = 3 * torch.randn(1, 1000, generator=generator)
    teacher = theta + 1e-4 * torch.randn(1, 1000, generator=generator).exp()

    def direct(logp: torch.Tensor, logr: torch.Tensor) -> float:
        def f(alpha: float) -> float:
            return float((torch.lerp(logp, logr, alpha).softmax(-1) * (logr - logp)).sum())

        return bisect(f)

    exact = direct(theta.double().log_softmax(-1), teacher.double().log_softmax(-1))
    assert abs(direct(theta.log_softmax(-1), teacher.log_softmax(-1)) - exact) > 0.01
    assert abs(float(solve_alpha(theta, teacher, MixingConfig())) - exact) < 1e-5
    says("the direct evaluation is off by more than 0.01, and `solve_alpha` by less than $10^{-5}$")
    # The identity that the solver uses instead.
    pair = Two.near(1, 5, 0.3)
    w = pair.q(0.5)
    x = pair.gap - w @ pair.gap
    left = pair.psi(0.7) - pair.psi(0.5) - 0.2 * (w @ pair.gap)
    assert left == pytest.approx(np.log1p(w @ (np.expm1(0.2 * x) - 0.2 * x)))


def random_tree(seed: int) -> Tree:
    return Tree(3, lambda prefix: Two.random((seed, *prefix), 3))


def balanced(pair: Two) -> float:
    return 0.5 if (pair.p == pair.r).all() else pair.chernoff()


def reached(tree: Tree) -> Iterator[tuple[float, Two]]:
    """Yield the probability under Q of every prefix, and the pair after it."""
    level: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(tree.length):
        following = []
        for prefix, weight in level:
            pair = tree.after(prefix)
            yield weight, pair
            following += [((*prefix, token), weight * share) for token, share in enumerate(pair.q(balanced(pair)))]
        level = following


def test_theorem_15_balance_along_a_sequence() -> None:
    for tree in (random_tree(1), random_tree(2), LOOK_AHEAD, MIRRORED):
        joint, q = tree.joint(balanced)
        assert q.sum() == pytest.approx(1)
        total = sum(weight * -pair.psi(balanced(pair)) for weight, pair in reached(tree))
        assert joint.forward(q) == pytest.approx((total, total))
        gap = np.log(joint.r / joint.p)
        assert q @ gap == pytest.approx(0, abs=1e-9)
        assert q @ gap**2 == pytest.approx(sum(weight * pair.moment(balanced(pair), 2) for weight, pair in reached(tree)))
        assert abs(q - joint.p).sum() / 2 <= np.sqrt(total / 2)

        _, clamped = tree.joint(lambda pair: min(balanced(pair), 0.4))
        assert np.subtract(*joint.forward(clamped)) == pytest.approx(clamped @ gap)
        assert clamped @ gap < -1e-3  # clamping towards the student makes Q closer to it


def test_theorem_15_balance_along_a_sequence__with_the_solver() -> None:
    for seed in range(3):
        joint, q = random_tree(seed).joint(osd_alpha)
        to_student, to_teacher = joint.forward(q)
        assert to_student == pytest.approx(to_teacher, abs=1e-3)


def test_theorem_16_limits_of_balance_along_a_sequence() -> None:
    for tree in (random_tree(1), random_tree(2), LOOK_AHEAD, MIRRORED):
        joint, q = tree.joint(balanced)
        alpha = joint.chernoff()
        excess = kl(q, joint.q(alpha))
        assert excess > 1e-3
        assert joint.forward(q)[0] == pytest.approx(-joint.psi(alpha) + excess)
        assert dominates(joint.forward(joint.q(alpha)), joint.forward(q))
        # Look-ahead: the distribution of the first token under G is q_α times the sum over continuations.
        width = len(tree.after(()).p)
        first = tree.after(()).q(alpha) * (joint.p ** (1 - alpha) * joint.r**alpha / 1).reshape(width, -1).sum(1)
        first /= tree.after(()).p ** (1 - alpha) * tree.after(()).r ** alpha
        assert joint.q(alpha).reshape(width, -1).sum(1) == pytest.approx(first / first.sum())
    alike = Tree(3, lambda prefix: RUNNING)
    joint, q = alike.joint(balanced)
    assert joint.q(joint.chernoff()) == pytest.approx(q, rel=1e-6)
    assert joint.chernoff() == pytest.approx(RUNNING.chernoff())


def test_theorem_16_limits_of_balance_along_a_sequence__examples() -> None:
    joint, q = LOOK_AHEAD.joint(balanced)
    g = joint.q(joint.chernoff())
    says("$D(Q\\Vert P)=D(Q\\Vert R)=0.807$", joint.forward(q)[0])
    says("takes it with probability 0.166, at 0.512", g.reshape(2, 2)[1].sum(), joint.forward(g)[0])
    joint, q = MIRRORED.joint(balanced)
    g = joint.q(joint.chernoff())
    assert joint.chernoff() == pytest.approx(0.5)
    says("the $\\alpha$ of the two tokens are 0.682 and 0.318", MIRRORED.after(()).chernoff(), MIRRORED.after((0,)).chernoff())
    says("divergences of $Q$ are 0.735; those of $G$ are 0.632", joint.forward(q)[1], joint.forward(g)[1])


def test_theorem_17_weights_of_prefixes() -> None:
    for tree in (random_tree(4), random_tree(5)):
        moments, shares = [1.0], []
        for length in range(1, 4):
            cut = Tree(length, tree.after)
            joint, q = cut.joint(balanced)
            assert (joint.p / q) @ q == pytest.approx(1)
            moments.append(second_moment(joint.p, q))
            assert moments[-1] >= moments[-2]
            assert moments[-1] >= np.exp(kl(joint.p, q))
        shares = [1 / second_moment(pair.p, pair.q(balanced(pair))) for _, pair in reached(tree)]
        assert moments[-1] >= max(shares) ** -3
        # The recursion, for the second token.
        first = tree.after(())
        w = first.p / first.q(balanced(first))
        after = [tree.after((token,)) for token in range(3)]
        inner = np.array([second_moment(pair.p, pair.q(balanced(pair))) for pair in after])
        assert first.q(balanced(first)) @ (w**2 * inner) == pytest.approx(moments[2])
    lossy, q = Tree(2, lambda prefix: BOTH_LOSE).joint(balanced)
    assert lossy.p[q > 0].sum() == pytest.approx(0.9**2)  # E_Q W_2
    share = 1 / second_moment(RUNNING.p, RUNNING.q(RUNNING.chernoff()))
    says("$\\mathrm{ESS}_\\theta=0.620$", share)
    says("after 8 tokens 2.2%", 100 * share**8)
    says("after 16 tokens 0.05%", 100 * share**16)
    joint, q = Tree(4, lambda prefix: RUNNING).joint(balanced)
    assert 1 / second_moment(joint.p, q) == pytest.approx(share**4)


def test_theorem_18_two_prompts() -> None:
    rng = np.random.default_rng(18)
    policies, weight = rng.dirichlet(np.ones(4), 3), np.array([0.5, 0.3, 0.2])
    average = weight @ policies
    entropy = [-(row @ np.log(row)) for row in (average, *policies)]
    information = entropy[0] - weight @ entropy[1:]
    geometric = np.exp(weight @ np.log(policies))
    cost = -np.log(geometric.sum())
    assert sum(weight * [kl(row, average) for row in policies]) == pytest.approx(information)
    assert sum(weight * [kl(geometric / geometric.sum(), row) for row in policies]) == pytest.approx(cost)
    for s in rng.dirichlet(np.ones(4), 2000):
        assert sum(weight * [kl(row, s) for row in policies]) > information
        assert sum(weight * [kl(s, row) for row in policies]) > cost
    assert min(-Two(average, row).psi(0.5) for row in policies) > 0
    pair = Two.of([0.5, 0.5], [0.9, 0.1])
    alpha = pair.chernoff()
    says("$I=0.368$", kl(pair.r, pair.p))
    says("it remains at $C=0.112$, with $\\alpha^{\\ast}=0.458$", -pair.psi(alpha), alpha)


def cycle_law(tree: Tree, target: Callable[[tuple[int, ...]], Vector], prefix: tuple[int, ...], drafts: int) -> dict:
    """Return the probability of every run of tokens that a cycle at a prefix can keep, by its definition."""
    law: dict[tuple[int, ...], float] = {}

    def decide(kept: tuple[int, ...], weight: float) -> None:
        pair, q = tree.after(prefix + kept), target(prefix + kept)
        left = np.maximum(q - pair.p, 0)
        for token, p in enumerate(pair.p):
            accepted = weight * p * min(1.0, q[token] / p) if p else 0.0
            if len(kept) < drafts:
                decide((*kept, token), accepted) if accepted else None
            else:
                law[(*kept, token)] = law.get((*kept, token), 0.0) + accepted
        refused = weight * (1 - np.minimum(pair.p, q).sum())
        if left.sum():
            for token, share in enumerate(left / left.sum()):
                law[(*kept, token)] = law.get((*kept, token), 0.0) + refused * share

    decide((), 1.0)
    return law


def completions_by_cycles(tree: Tree, weigh: Callable[[Two], float], drafts: int, length: int) -> Vector:
    """Return the law of the first `length` tokens of completions that are made cycle by cycle, over all of them."""

    def target(prefix: tuple[int, ...]) -> Vector:
        return tree.after(prefix).q(weigh(tree.after(prefix)))

    law: dict[tuple[int, ...], float] = {(): 1.0}
    while any(len(prefix) < length for prefix in law):
        after: dict[tuple[int, ...], float] = {}
        for prefix, weight in law.items():
            runs = cycle_law(tree, target, prefix, drafts) if len(prefix) < length else {(): 1.0}
            for run, share in runs.items():
                whole = (prefix + run)[:length]
                after[whole] = after.get(whole, 0.0) + weight * share
        law = after
    return np.array([law.get(tokens, 0.0) for tokens in itertools.product(range(3), repeat=length)])


def independent(acceptance: float, drafts: int) -> float:
    return sum(acceptance**n for n in range(drafts + 1))


def test_theorem_19_speculation_is_exact() -> None:
    for pair in [*PAIRS, *OVERLAPPING]:
        alpha = pair.chernoff()
        q = pair.q(alpha)
        a = np.minimum(pair.p, q).sum()
        assert a == pytest.approx(1 - np.abs(q - pair.p).sum() / 2)
        assert a == pytest.approx(q @ np.minimum(1, np.divide(pair.p, q, out=np.zeros_like(q), where=q > 0)))
        if 0.01 < alpha < 0.99:
            assert a >= 1 - np.sqrt(-pair.psi(alpha) / 2)
        with np.errstate(divide="ignore"):
            left = residual(torch.tensor(np.log(q))[None], torch.tensor(np.log(pair.p))[None])[0].numpy()
        assert np.minimum(pair.p, q) + (1 - a) * left / left.sum() == pytest.approx(q)  # the code's residual
    tree = random_tree(6)
    for drafts in (0, 1, 2, 3):
        for weigh in (balanced, lambda pair: 0.3):
            _, expected = tree.joint(weigh)
            assert completions_by_cycles(tree, weigh, drafts, 3) == pytest.approx(expected)
    says("$a=0.620$, and the bound is 0.490", *(running_acceptance(), 1 - np.sqrt(-RUNNING.psi(RUNNING.chernoff()) / 2)))


def running_acceptance() -> float:
    return float(np.minimum(RUNNING.p, RUNNING.q(RUNNING.chernoff())).sum())


def test_theorem_20_tokens_of_a_cycle() -> None:
    constant = Tree(3, lambda prefix: RUNNING)
    for drafts in range(5):
        law = cycle_law(constant, lambda prefix: RUNNING.q(RUNNING.chernoff()), (), drafts)
        assert sum(law.values()) == pytest.approx(1)
        mean = sum(len(run) * weight for run, weight in law.items())
        assert mean == pytest.approx(independent(running_acceptance(), drafts))
        assert mean == pytest.approx(expected_tokens(running_acceptance(), drafts))
    tree = random_tree(7)
    laws = [cycle_law(tree, lambda prefix: tree.after(prefix).q(0.5), (), drafts) for drafts in range(4)]
    means = [sum(len(run) * weight for run, weight in law.items()) for law in laws]
    assert means[0] == pytest.approx(1)
    assert (np.diff(means) > 0).all()
    assert (np.diff(means, 2) <= 1e-12).all()
    says("four drafts give 4.10 tokens a cycle", independent(0.9, 4))
    says("the others $a=0.8$, 4.18", (independent(1.0, 4) + independent(0.8, 4)) / 2)


def test_theorem_21_break_even() -> None:
    def time(a: float, c: float, k: int) -> float:
        return (1 + (k + 1) * c) / independent(a, k)

    for a, c in itertools.product(np.linspace(0.05, 0.99, 20), np.geomspace(0.01, 3, 20)):
        times = [time(a, c, k) for k in range(40)]
        down = np.diff(times) < 0
        assert not (np.diff(down.astype(int)) > 0).any()  # once up, never down again
        rule = [a ** (k + 1) * (1 + (k + 1) * c) > c * independent(a, k) for k in range(39)]
        assert all(d == r for d, r, step in zip(down, rule, np.diff(times), strict=True) if abs(step) > 1e-12)
        assert (min(times[1:]) < times[0]) == (a > c / (1 + c))
        assert all((t < 1) == (c < (independent(a, k) - 1) / (k + 1)) for k, t in enumerate(times))

    def best(a: float, c: float) -> tuple[int, float]:
        return min(((k, time(a, c, k)) for k in range(40)), key=lambda item: item[1])

    def limit(a: float) -> tuple[int, float]:
        return max(((k, (independent(a, k) - 1) / (k + 1)) for k in range(40)), key=lambda item: item[1])

    assert (best(0.9, 0.1)[0], best(0.7, 0.1)[0], limit(0.9)[0], limit(0.7)[0]) == (10, 4, 4, 2)
    says("is 10 at $a=0.9$, with $T=0.306$", best(0.9, 0.1)[1])
    says("and 4 at $a=0.7$, with $T=0.541$", best(0.7, 0.1)[1])
    says("up to $c=0.619$, with $k=4$", limit(0.9)[1])
    says("up to $c=0.397$, with $k=2$", limit(0.7)[1])


def test_figures_are_committed_and_drawn_by_the_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from theory import figures

    shown = set(re.findall(r"!\[.+?\]\(figures/(.+?)\)", TEXT))
    committed = {path.name: path.stat().st_size for path in (FOLDER / "figures").iterdir()}
    assert shown == set(committed)
    assert max(committed.values()) <= 150_000
    figures.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == shown
