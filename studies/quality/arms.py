"""Arms of the study: how completions are sampled and what is trained on them, and a check that an arm sampled as it says.

All arms go through OSDTrainer and differ in the options below alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from osd import OSDTrainer
from osd.core import MIXING_OPTIONS, MixingConfig, TokenRecord

STUDENT, Q, SFT = "student", "q*", "sft"  # the baseline, the default, the floor
FIXED = {"alpha_method": "fixed"}
# Options of OSDConfig.
ARMS: dict[str, dict[str, Any]] = {
    STUDENT: {**FIXED, "fixed_alpha": 0.0},
    "teacher": {**FIXED, "fixed_alpha": 1.0},
    "fixed 0.5": {**FIXED, "fixed_alpha": 0.5},
    "linear 0.1": {**FIXED, "fixed_alpha": 0.1, "mixture": "linear"},
    "linear 0.5": {**FIXED, "fixed_alpha": 0.5, "mixture": "linear"},
    Q: {},
    "ess_balance": {"alpha_method": "ess_balance"},
    "q* annealed": {"alpha_schedule": "linear", "alpha_max_end": 0.0},
    "q* prefix": {"importance_correction": "prefix"},
    SFT: {**FIXED, "fixed_alpha": 1.0},
}
LOSSES = {"forward": 0.0, "reverse": 1.0}  # OSDConfig.beta
TOLERANCE = 0.02  # nats; the record is float32, and α is solved to about 1e-4
MISSED = 0.01  # share of tokens at which rounding may be larger: log-probabilities that differ by tens of nats


class SampleTrainer(OSDTrainer):
    """Plain supervised fine-tuning on the sampled completions: cross-entropy, without the teacher's distribution."""

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_BTH = self._get_last_hidden_state(
            unwrapped_student,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )
        logp_BTV = unwrapped_student.get_output_embeddings()(hidden_BTH).float().log_softmax(-1)
        logp_BT = logp_BTV.gather(-1, inputs["completion_ids"][..., None])[..., 0]
        kept_BT = inputs["loss_mask"] != 0
        loss = -logp_BT[kept_BT].sum() / num_items_in_batch
        entropy = -(logp_BTV.exp() * logp_BTV).sum(-1)[kept_BT].sum().detach()
        return loss, entropy, kept_BT.sum()


def trainer_class(arm: str) -> type[OSDTrainer]:
    return SampleTrainer if arm == SFT else OSDTrainer


def mixing_at(arm: str, step: int, steps: int) -> MixingConfig:
    """Return the mixing that an arm must sample with before optimizer step `step` (from 0), without OSDConfig's help."""
    mixing = MixingConfig(**{name: value for name, value in ARMS[arm].items() if name in MIXING_OPTIONS})
    end = ARMS[arm].get("alpha_max_end")
    return mixing if end is None else dataclasses.replace(mixing, alpha_max=1 + (end - 1) * step / steps)


def check_sampled_as(mixing: MixingConfig, records: Sequence[TokenRecord]) -> None:
    """Check every token's record against the equations of a mixing.

    Raises:
        RuntimeError: tokens that were drawn from another mixture, or with another α.
    """
    of = {name: torch.cat([getattr(r, name) for r in records]).double() for name in _COLUMNS}
    alpha_N = of["alpha"]
    excess_N = {
        "α outside its bounds": torch.maximum(mixing.alpha_min - alpha_N, alpha_N - mixing.alpha_max) - 1e-5,
        "log q of another mixture": _mixture_error(mixing.mixture, of) - TOLERANCE,
    }
    if mixing.alpha_method == "fixed":
        excess_N["α that differs from fixed_alpha"] = (alpha_N - mixing.fixed_alpha).abs() - 1e-5
    if mixing.alpha_method == "kl_symmetry":
        excess_N["unequal KLs"] = _imbalance(mixing, alpha_N, of["kl_teacher"] - of["kl_theta"]) - TOLERANCE
    if mixing.alpha_method == "ess_balance":
        excess_N["unequal sample sizes"] = _imbalance(mixing, alpha_N, (of["ess_theta"] / of["ess_teacher"]).log()) - TOLERANCE
    for what, excess in excess_N.items():
        if (wrong := int((excess > 0).sum())) > MISSED * len(alpha_N):
            raise RuntimeError(f"{wrong} of {len(alpha_N)} tokens were not sampled as {mixing}: {what}")


_COLUMNS = ("alpha", "logq", "logp_theta", "logp_teacher", "kl_theta", "kl_teacher", "ess_theta", "ess_teacher")


def _mixture_error(mixture: str, of: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the distance in nats of every token's log q from its equation, [N]."""
    alpha_N, theta_N, teacher_N = of["alpha"], of["logp_theta"], of["logp_teacher"]
    if mixture == "linear":
        expected_N = torch.logaddexp((1 - alpha_N).log() + theta_N, alpha_N.log() + teacher_N)
    else:
        # log q = (1-α) log π_θ + α log π_t - log Z, and the mean of that over q gives -log Z = (1-α) KL_θ + α KL_t.
        both = ((theta_N, of["kl_theta"], 1 - alpha_N), (teacher_N, of["kl_teacher"], alpha_N))
        # α = 0 and 1 leave out a policy whose log π or KL may be infinite.
        expected_N = sum(torch.where(weight_N > 0, weight_N * (logp_N + kl_N), 0.0) for logp_N, kl_N, weight_N in both)
    return (of["logq"] - expected_N).abs()


def _imbalance(mixing: MixingConfig, alpha_N: torch.Tensor, balance_N: torch.Tensor) -> torch.Tensor:
    """Return how far α is from the zero of a condition that falls in α, [N]; at a bound the zero may lie beyond it."""
    at_min_N, at_max_N = alpha_N < mixing.alpha_min + 1e-3, alpha_N > mixing.alpha_max - 1e-3
    return torch.maximum(torch.where(at_max_N, 0.0, balance_N), torch.where(at_min_N, 0.0, -balance_N))
