"""Reference implementations of alpha, q and its diagnostics in float64, written from the definitions.

They share no code with osd.alpha, osd.mixing and osd.kernels.
Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from osd.core import MixingConfig

INF = float("inf")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_q(theta: Tensor, teacher: Tensor, alpha: Tensor, config: MixingConfig) -> Tensor:
    """Return log q by its definition, [B, V] float64."""
    p, t, a = theta.double().log_softmax(-1), teacher.double().log_softmax(-1), alpha.double()[:, None]
    if config.mixture == "linear":
        return ((1 - a) * p.exp() + a * t.exp()).log()
    shared = ((p > -INF) & (t > -INF)).any(-1, keepdim=True)
    between = ((1 - a) * p + a * t).log_softmax(-1)
    return torch.where(a == 1, t, torch.where((a == 0) | ~shared, p, between))


def kl(log_q_BV: Tensor, log_p_BV: Tensor) -> Tensor:
    return (log_q_BV.exp() * (log_q_BV - log_p_BV)).nan_to_num(nan=0.0, posinf=INF).sum(-1)


def ess(log_p_BV: Tensor, log_q_BV: Tensor) -> Tensor:
    return 1 / (2 * log_p_BV - log_q_BV).nan_to_num(nan=-INF, posinf=INF, neginf=-INF).exp().sum(-1)


def log_sum(v: np.ndarray) -> float:
    top = v.max()
    return float(top + np.log(np.exp(v - top).sum()))


class Exact:
    """Bisection for alpha on one row in float64.

    Log-ratios x are relative to the likeliest shared token, so rounding does not hide the solution of a peaked row or of
    nearly equal policies.
    """

    def __init__(self, theta: Tensor, teacher: Tensor) -> None:
        a, b = theta.double().numpy(), teacher.double().numpy()
        shared = np.isfinite(a) & np.isfinite(b)
        self.a = a[shared]
        gap = b[shared] - self.a
        self.x = gap - gap[np.argmax(self.a + b[shared])]
        self.log_pi = self.a - log_sum(self.a)
        self.norm_shared = self._log_mean_exp(self.x)  # log E_theta[e^x] on S
        self.norm = self.norm_shared + self._log_on(a, shared) - self._log_on(b, shared)

    @staticmethod
    def _log_on(z: np.ndarray, shared: np.ndarray) -> float:
        off = np.exp(z[~shared] - log_sum(z)).sum()
        return np.log1p(-off) if off < 0.5 else log_sum(z[shared]) - log_sum(z)

    def _log_mean_exp(self, y: np.ndarray) -> float:
        mean = (np.exp(self.log_pi) * np.expm1(np.minimum(y, 500))).sum()
        if y.max() < 500 and -0.5 < mean < 1e3:
            return float(np.log1p(mean))
        return log_sum(self.log_pi + y)

    def mean(self, alpha: float) -> float:
        log_q = self.log_pi + alpha * self.x
        return float((np.exp(log_q - log_sum(log_q)) * self.x).sum())

    def condition(self, method: str, alpha: float) -> float:
        if method == "kl_symmetry":
            return self.mean(alpha) - self.norm
        ratio = self.x - self.norm  # log pi_t / pi_theta
        return self._log_mean_exp(-alpha * ratio) - self._log_mean_exp((2 - alpha) * ratio)

    def solve(self, method: str) -> float:
        if not self.x.any() and (self.norm == 0 or method == "reverse_kl_symmetry"):
            return 0.5
        if method == "reverse_kl_symmetry":
            to_theta, to_teacher = self.mean(1.0) - self.norm_shared, self.norm_shared - self.mean(0.0)
            return to_theta / (to_theta + to_teacher)
        low, high = 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if self.condition(method, middle) > 0 else (middle, high)
        return (low + high) / 2


def sensitivity(theta: Tensor, teacher: Tensor, method: str) -> float:
    """Return the change of the exact solution when every logit changes by about its last bit."""
    g = torch.Generator().manual_seed(0)

    def moved(z: Tensor) -> Tensor:
        return z * (1 + 2.0**-23 * torch.randn(z.shape, generator=g, dtype=torch.float64))

    solutions = [Exact(moved(theta.double()), moved(teacher.double())).solve(method) for _ in range(3)]
    return max(abs(s - Exact(theta, teacher).solve(method)) for s in solutions)
