"""Draw the figures of optimal_sampling.md: `python -m theory.figures`, from the repository's root."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from osd.alpha import solve_alpha
from osd.core import MixingConfig
from theory.pairs import LOOK_AHEAD, NEARLY_LOST, RUNNING, Two, Vector, bisect, second_moment, swapped_tail

STUDENT, TEACHER, OURS, OTHER, GREY = "#0072B2", "#D55E00", "#000000", "#009E73", "#999999"
ALPHAS = np.linspace(0, 1, 201)
STYLE = {
    "figure.figsize": (9.2, 3.7),
    "figure.dpi": 110,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
}


def curve(objectives: Callable[[Vector], tuple[float, float]], family: Callable[[float], Vector]) -> Vector:
    """Return both objectives along a family, [points, 2], without infinite points."""
    points = np.array([objectives(family(weight)) for weight in ALPHAS])
    return points[np.isfinite(points).all(1)]


def balanced(objectives: Callable[[Vector], tuple[float, float]], family: Callable[[float], Vector]) -> float:
    return bisect(lambda weight: -np.subtract(*objectives(family(weight))[::-1]))


def chernoff(left: Axes, right: Axes) -> None:
    pair, best = RUNNING, RUNNING.chernoff()
    least, slopes = pair.psi(best), (pair.moment(0, 1), pair.moment(1, 1))
    crossing = slopes[1] / (slopes[1] - slopes[0])
    left.plot(ALPHAS, [pair.psi(alpha) for alpha in ALPHAS], color=OURS, label="log Z(α)")
    left.plot([0, crossing, 1], [0, crossing * slopes[0], 0], "--", color=GREY, lw=1.2, label="tangents at the ends")
    left.plot([best - 0.28, best + 0.28], [least] * 2, color=OTHER, lw=1.2)
    left.plot(best, least, "o", color=OTHER, label=f"Chernoff point, α* = {best:.4f}")
    left.plot(crossing, crossing * slopes[0], "s", color=GREY, ms=4, label="α of reverse_kl_symmetry")
    left.annotate("", (best, least), (best, 0), arrowprops={"arrowstyle": "<->", "color": OTHER, "lw": 1})
    left.text(best + 0.02, least / 2, "C", color=OTHER)
    left.set(xlabel="α, the teacher's weight", ylabel="nats", title="log Z and its minimum")
    left.legend(loc="lower left", fontsize=8)
    points = np.array([pair.forward(pair.q(alpha)) for alpha in ALPHAS])
    right.plot(ALPHAS, points[:, 0], color=STUDENT, label="D(q ‖ student)")
    right.plot(ALPHAS, points[:, 1], color=TEACHER, label="D(q ‖ teacher)")
    right.plot(ALPHAS, points.max(1), color=GREY, lw=5, alpha=0.35, zorder=0, label="the larger one")
    right.plot([0, best, best], [-least, -least, 0], ":", color=OTHER, lw=1.2)
    right.plot(best, -least, "o", color=OTHER, label=f"both equal C = {-least:.4f}")
    right.set(xlabel="α, the teacher's weight", ylabel="nats", title="Both divergences of q", xlim=(0, 1), ylim=(0, None))
    right.legend(loc="upper center")


def pareto(left: Axes, right: Axes) -> None:
    pair, cloud = RUNNING, np.random.default_rng(0).dirichlet(np.ones(3), 4000)
    families = (
        ("geometric", pair.q, OURS, "-"),
        ("linear", pair.linear, OTHER, "-"),
        ("root mean square", pair.quadratic, TEACHER, "--"),
    )
    for axes, objectives, size, names in (
        (left, pair.forward, 2.5, ("D(q ‖ student)", "D(q ‖ teacher)")),
        (right, pair.reverse, 1.6, ("D(student ‖ q)", "D(teacher ‖ q)")),
    ):
        points = np.array([objectives(q) for q in cloud])
        axes.scatter(points[:, 0], points[:, 1], s=2, color="#cccccc")
        axes.plot([0, size], [0, size], ":", color=GREY, lw=1)
        for name, family, color, dashes in families:
            axes.plot(*curve(objectives, family).T, dashes, color=color, label=name)
            axes.plot(*objectives(family(balanced(objectives, family))), "o", color=color, ms=5)
        axes.set(xlim=(-0.02, size), ylim=(-0.02, size), xlabel=names[0], ylabel=names[1], aspect="equal")
        axes.locator_params(nbins=6)
    left.set_title("D(q ‖ ·): the geometric family is the front")
    right.set_title("D(· ‖ q): the linear family is the front")
    left.legend(loc="upper right")


def ess(left: Axes, right: Axes) -> None:
    for seed, label in zip(range(3), ("random directions", None, None), strict=True):
        rows = []
        for scale in np.geomspace(0.02, 2, 30):
            pair = Two.near(seed, 6, scale)
            q = pair.q(pair.chernoff())
            rows.append((2 * pair.forward(q)[0], np.log(second_moment(pair.p, q)), np.log(second_moment(pair.r, q))))
        near = np.array(rows)
        left.loglog(near[:, 0], near[:, 1], color=STUDENT, lw=1.3, label=label and label + ": student")
        left.loglog(near[:, 0], near[:, 2], color=TEACHER, lw=1.3, label=label and label + ": teacher")
    tails = [swapped_tail(0.05, tau) for tau in np.geomspace(0.05, 1e-12, 40)[1:]]
    moments = [second_moment(pair.p, pair.q(0.5)) for pair in tails]
    left.loglog([-2 * pair.psi(0.5) for pair in tails], np.log(moments), color=OURS, label="Theorem 10.1, τ → 0")
    left.loglog([1e-5, 2], [1e-5, 2], ":", color=GREY, label="−log ESS = 2D")
    left.set(xlabel="2D(q*‖π)", ylabel="−log ESS", xlim=(1e-5, 2), title="First-order relation and counterexample")
    left.legend(loc="upper left", fontsize=8)
    pair = NEARLY_LOST
    inside = ALPHAS[1:-1]
    shares = np.array([[1 / moment for moment in pair.second_moments(pair.q(alpha))] for alpha in inside])
    right.plot(inside, shares[:, 0], color=STUDENT, label="ESS for the student")
    right.plot(inside, shares[:, 1], color=TEACHER, label="ESS for the teacher")
    for alpha, name, color in ((pair.chernoff(), "KL balance", OURS), (pair.ess_balance(), "ESS balance", OTHER)):
        right.axvline(alpha, color=color, lw=1.2, ls="--")
        right.text(alpha + 0.015, 1.06, f"{name}\nα = {alpha:.3f}", color=color, fontsize=8.5)
    right.axhline(np.exp(2 * pair.psi(pair.chernoff())), color=GREY, lw=1, ls=":", label="promised at KL balance, $e^{-2C}$")
    right.set(xlabel="α, the teacher's weight", ylabel="effective share of samples", ylim=(0, 1.2), xlim=(0, 1))
    right.set_title("A token of 1% that the teacher nearly excludes")
    right.legend(loc="center right", bbox_to_anchor=(1, 0.42))


def solver(left: Axes, right: Axes) -> None:
    for size, color in ((1, STUDENT), (3, OTHER), (10, TEACHER)):
        pair = Two.near(0, 4, size)
        width, exact, alpha = float(np.ptp(pair.gap)), pair.chernoff(), 0.0
        errors = [abs(alpha - exact)]
        while errors[-1] > 1e-14 and len(errors) < 9:
            alpha -= pair.moment(alpha, 1) / pair.moment(alpha, 2)
            errors.append(abs(alpha - exact))
        shown = [max(error, 1e-17) for error in errors]
        left.semilogy(shown, "o-", color=color, ms=4, label=f"R = {width:.1f}")
        bounds = [(np.expm1(width * e) - width * e) / width if width * e <= 1 else np.nan for e in errors[:-1]]
        left.semilogy(range(1, len(errors)), [max(bound, 1e-17) for bound in bounds], "--", color=color, lw=1)
    left.set(xlabel="Newton steps", ylabel="|α − α*|", title="Quadratic convergence (Theorem 12.2)", ylim=(3e-18, 1))
    left.legend()
    scales = np.geomspace(1e-5, 1, 21)
    direct, ours, expansion = np.array([float32_errors(scale) for scale in scales]).T
    right.loglog(scales, direct, "o-", color=TEACHER, ms=3, label="equation evaluated directly, float32")
    right.loglog(scales, ours, "o-", color=STUDENT, ms=3, label="solve_alpha, float32")
    right.loglog(scales, expansion, "--", color=OURS, label="expansion (Theorem 13), float64")
    right.loglog(scales, 3e-8 / scales**2, ":", color=GREY, lw=1, label="∝ ε⁻²")
    right.set(xlabel="ε, distance of the policies", ylabel="|α − α*|", title="Near policies, 1,000 tokens", ylim=(1e-17, 1))
    right.legend(loc="lower right", fontsize=8)


def float32_errors(scale: float) -> tuple[float, float, float]:
    """Return the errors of α of the directly evaluated equation and of osd's solver (both float32), and of the expansion."""
    generator = torch.Generator().manual_seed(0)
    theta = 3 * torch.randn(1, 1000, generator=generator)
    teacher = theta + scale * torch.randn(1, 1000, generator=generator).exp()
    logp, logr = theta.log_softmax(-1), teacher.log_softmax(-1)
    naive = bisect(lambda a: float((torch.lerp(logp, logr, a).softmax(-1) * (logr - logp)).sum()))
    pair = Two(*(z.double().softmax(-1)[0].numpy() for z in (theta, teacher)))
    gap = (teacher.double() - theta.double())[0].numpy()
    w = pair.q(0.5)
    x = gap - w @ gap  # in these relative coordinates float64 is precise enough for a reference
    k0 = np.log1p(w @ (np.expm1(x / 2) - x / 2)) - np.log1p(w @ (np.expm1(-x / 2) + x / 2))

    def slope(alpha: float) -> float:
        tilt = w * np.expm1((alpha - 0.5) * x)
        return float(tilt @ x / (1 + tilt.sum()) - k0)

    exact = bisect(slope)
    guess = 0.5 + float(w @ x**3 / (w @ x**2)) / 24
    return abs(naive - exact), abs(float(solve_alpha(theta, teacher, MixingConfig())) - exact), abs(guess - exact)


def sequence(left: Axes, right: Axes) -> None:
    joint, q = LOOK_AHEAD.joint(lambda pair: pair.chernoff() if np.ptp(pair.gap) else 0.5)
    best = joint.q(joint.chernoff())
    left.plot(*curve(joint.forward, joint.q).T, color=OURS, label="sequence-level geometric family")
    left.plot([0, 2], [0, 2], ":", color=GREY, lw=1)
    left.plot(*joint.forward(best), "o", color=OURS, label=f"G, {joint.forward(best)[0]:.3f}")
    left.plot(*joint.forward(q), "D", color=TEACHER, label=f"Q, token by token, {joint.forward(q)[0]:.3f}")
    left.annotate("", joint.forward(best), joint.forward(q), arrowprops={"arrowstyle": "->", "color": GREY, "shrinkB": 6})
    left.set(xlabel="D(· ‖ P), the student", ylabel="D(· ‖ R), the teacher", xlim=(-0.02, 2), ylim=(-0.02, 2), aspect="equal")
    left.locator_params(nbins=5)
    left.set_title("Q is balanced, but not on the front")
    left.legend(loc="upper right")
    lengths = np.arange(33)
    for moment, color, name in zip(
        RUNNING.second_moments(RUNNING.q(RUNNING.chernoff())), (STUDENT, TEACHER), ("student", "teacher"), strict=True
    ):
        right.semilogy(lengths, moment**-lengths, "o-", color=color, ms=3, label=f"reweighted to the {name}")
    right.axhline(0.01, color=GREY, lw=1, ls=":")
    right.text(32, 0.02, "1 sample in 100", color=GREY, ha="right", fontsize=8.5)
    right.set(xlabel="tokens in the prefix", ylabel="effective share of samples", title="Weights of prefixes (Theorem 17)")
    right.legend(loc="lower left")


FIGURES = (chernoff, pareto, ess, solver, sequence)


def main(folder: Path) -> None:
    with plt.rc_context(STYLE):
        for draw in FIGURES:
            figure, (left, right) = plt.subplots(1, 2)
            draw(left, right)
            figure.tight_layout(w_pad=2.5)
            figure.savefig(folder / f"{draw.__name__}.png", metadata={"Software": None})
            plt.close(figure)


def cli(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "figures")
    main(parser.parse_args(arguments).output)


if __name__ == "__main__":
    cli()
