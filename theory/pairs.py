"""Pairs of policies over one finite vocabulary in float64, with the notation of optimal_sampling.md: p student, r teacher.

Written from the definitions. Shares no code with osd. The examples quoted in the document are at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Vector = np.ndarray


def kl(a: Vector, b: Vector) -> float:
    """Return KL(a || b) in nats, inf if a has mass outside the support of b."""
    on = a > 0
    with np.errstate(divide="ignore"):
        return float((a[on] * np.log(a[on] / b[on])).sum())


def second_moment(pi: Vector, q: Vector) -> float:
    """Return E_q[(pi/q)^2] = sum pi^2/q = 1/ESS, inf if pi has mass outside the support of q."""
    on = pi > 0
    with np.errstate(divide="ignore"):
        return float((pi[on] ** 2 / q[on]).sum())


def bisect(increasing: Callable[[float], float]) -> float:
    """Return the root of an increasing function, clamped to [0, 1]."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Two:
    """Pair of the student's distribution p and the teacher's distribution r."""

    p: Vector
    r: Vector

    @classmethod
    def of(cls, p: Sequence[float], r: Sequence[float]) -> Two:
        return cls(np.array(p, dtype=float), np.array(r, dtype=float))

    @classmethod
    def random(cls, seed: int | Sequence[int], size: int, concentration: float = 0.7) -> Two:
        """Draw a pair with equal supports, neither flat nor one-hot."""
        draws = np.random.default_rng(seed).dirichlet(np.full(size, concentration), 2) + 1e-9
        return cls(*(draws / draws.sum(1, keepdims=True)))

    @classmethod
    def near(cls, seed: int, size: int, scale: float) -> Two:
        """Make a pair with r ∝ p e^(scale g), where the seed fixes p and a skewed g."""
        rng = np.random.default_rng(seed)
        p, g = rng.dirichlet(np.ones(size)), rng.exponential(size=size)
        r = p * np.exp(scale * g)
        return cls(p, r / r.sum())

    @cached_property
    def shared(self) -> Vector:
        """Mask of the tokens in S, the shared support."""
        return (self.p > 0) & (self.r > 0)

    @cached_property
    def gap(self) -> Vector:
        """Log-ratio ℓ = log r - log p on S."""
        return np.log(self.r[self.shared]) - np.log(self.p[self.shared])

    def _log_weights(self, alpha: float) -> Vector:
        return np.log(self.p[self.shared]) + alpha * self.gap

    def psi(self, alpha: float) -> float:
        """Return log Z(α) for any real α, -inf if S is empty."""
        return float(np.logaddexp.reduce(self._log_weights(alpha))) if self.shared.any() else -np.inf

    def q(self, alpha: float) -> Vector:
        """Return the geometric mixture q_α."""
        q = np.zeros_like(self.p)
        q[self.shared] = np.exp(self._log_weights(alpha) - self.psi(alpha))
        return q

    def moment(self, alpha: float, order: int) -> float:
        """Return the mean of ℓ under q_α (order 1), or its central moment of that order."""
        q = self.q(alpha)[self.shared]
        mean = float(q @ self.gap)
        return mean if order == 1 else float(q @ (self.gap - mean) ** order)

    def chernoff(self) -> float:
        """Return α*, the minimiser of log Z over [0, 1]."""
        return bisect(lambda alpha: self.moment(alpha, 1))

    def ess_balance(self) -> float:
        """Return the α at which the second moments of q_α are equal (for equal supports)."""
        return bisect(lambda alpha: self.psi(-alpha) - self.psi(2 - alpha))

    def linear(self, weight: float) -> Vector:
        """Return the linear mixture."""
        return (1 - weight) * self.p + weight * self.r

    def quadratic(self, weight: float) -> Vector:
        """Return the root-mean-square mixture."""
        q = np.sqrt((1 - weight) * self.p**2 + weight * self.r**2)
        return q / q.sum()

    def forward(self, q: Vector) -> tuple[float, float]:
        """Return (KL(q||p), KL(q||r))."""
        return kl(q, self.p), kl(q, self.r)

    def reverse(self, q: Vector) -> tuple[float, float]:
        """Return (KL(p||q), KL(r||q))."""
        return kl(self.p, q), kl(self.r, q)

    def second_moments(self, q: Vector) -> tuple[float, float]:
        """Return (sum p^2/q, sum r^2/q)."""
        return second_moment(self.p, q), second_moment(self.r, q)


@dataclass(frozen=True)
class Tree:
    """Pair of policies over sequences of a fixed length, given by the pair of next-token policies after each prefix."""

    length: int
    after: Callable[[tuple[int, ...]], Two]

    def joint(self, alpha: Callable[[Two], float]) -> tuple[Two, Vector]:
        """Return (P, R) over all sequences, and Q, which draws each token from q at alpha(pair)."""
        rows = list(self._walk((), np.ones(3), alpha))
        p, r, q = np.array(rows).T
        return Two(p, r), q

    def _walk(self, prefix: tuple[int, ...], weights: Vector, alpha: Callable[[Two], float]) -> Iterator[Vector]:
        if len(prefix) == self.length:
            yield weights
            return
        pair = self.after(prefix)
        for token, step in enumerate(np.stack([pair.p, pair.r, pair.q(alpha(pair))], 1)):
            yield from self._walk((*prefix, token), weights * step, alpha)


# Running example: both policies accept its second token.
RUNNING = Two.of([0.80, 0.19, 0.01], [0.10, 0.30, 0.60])
# The teacher gives almost no probability to a token of 1%: KL changes little, ESS a lot.
NEARLY_LOST = Two.of([0.69, 0.30, 0.01], [0.30, 0.70 - 1e-8, 1e-8])
# Each side has a token that the other does not have; then only the student has one.
BOTH_LOSE = Two.of([0.6, 0.3, 0.1, 0.0], [0.3, 0.6, 0.0, 0.1])
ONE_LOSES = Two.of([0.90, 0.09, 0.01], [0.30, 0.70, 0.00])
# No interior balance: on the teacher's whole support the teacher is likelier than the student.
AT_THE_END = Two.of([0.2, 0.1, 0.7], [0.6, 0.4, 0.0])

_HALF = Two.of([0.5, 0.5], [0.5, 0.5])
_APART = Two.of([0.99, 0.01], [0.01, 0.99])
# The first token determines whether the policies agree on the second.
LOOK_AHEAD = Tree(2, lambda prefix: _APART if prefix == (1,) else _HALF)
# The second token swaps the roles of the first, so the two tokens have different α.
MIRRORED = Tree(2, lambda prefix: Two.of([0.5, 0.5], [0.999, 0.001]) if prefix else Two.of([0.999, 0.001], [0.5, 0.5]))


def swapped_tail(eta: float, tau: float) -> Two:
    """Make a pair in which each side has a token of probability eta to which the other gives only tau."""
    return Two.of([1 - eta - tau, eta, tau], [1 - eta - tau, tau, eta])
