"""Write the figures of docs/reading.md from the mathematics, by `osd.mixing.mix`: `python docs/make_figures.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from osd.core import MixingConfig  # noqa: E402
from osd.mixing import Mixture, mix  # noqa: E402
from osd.report.charts import FOURTH, STUDENT, TEACHER, THIRD, svg  # noqa: E402

FOLDER = ROOT / "docs" / "figures"
GREY = "#7a7f87"  # legible on a light and on a dark page


def one_token(student: float, teachers: torch.Tensor) -> Mixture:
    """Mix two-token policies: the student gives the first token `student`, the teacher each of `teachers`, [B]."""
    student_B2 = torch.tensor([[student, 1 - student]]).expand(len(teachers), 2)
    teacher_B2 = torch.stack([teachers, 1 - teachers], dim=1)
    return mix(student_B2.log(), teacher_B2.log(), MixingConfig())


def random_pairs(size: int = 2000, count: int = 60) -> tuple[torch.Tensor, Mixture]:
    """Mix policies over a random vocabulary whose logits differ more and more.

    Returns:
        the acceptance of the student's drafts, Σ min(q*, π_θ), [B], and the mixtures.
    """
    chance = torch.Generator().manual_seed(0)
    theta_BV = 3 * torch.randn(1, size, generator=chance).expand(count, size)
    shift_BV = torch.randn(1, size, generator=chance) * torch.linspace(0.02, 4, count)[:, None]
    mixture = mix(theta_BV, theta_BV + shift_BV, MixingConfig())
    accepted_B = torch.minimum(mixture.logq_BV.exp(), theta_BV.softmax(dim=-1)).sum(dim=-1)
    return accepted_B, mixture


def alpha(axes: Any) -> None:
    """Draw α and q* of one token against the teacher's probability of it."""
    teacher_B = torch.linspace(0.001, 0.999, 400)
    mixture = one_token(0.1, teacher_B)
    axes.axhline(0.1, color=STUDENT, label="student: 0.1")
    axes.plot(teacher_B, teacher_B, color=TEACHER, label="teacher")
    axes.plot(teacher_B, mixture.logq_BV[:, 0].exp(), color=FOURTH, label="q*")
    axes.plot(teacher_B, mixture.alpha_B, color=THIRD, linestyle=(0, (3, 2)), label="α")
    axes.set_xlabel("the teacher's probability of the token")
    axes.set_ylim(0, 1)
    axes.legend(ncols=2)


def distances(axes: Any) -> None:
    """Draw acceptance and effective sample size against the KL of a token."""
    accepted_B, mixture = random_pairs()
    kl_B = mixture.kl_theta_B
    axes.plot(kl_B, accepted_B, color=STUDENT, label="acceptance, 1 − TV")
    axes.plot(kl_B, mixture.ess_theta_B, color=TEACHER, label="ESS against the student")
    axes.plot(kl_B, 1 - (kl_B / 2).sqrt(), color=THIRD, linestyle=(0, (3, 2)), label="1 − √(KL/2)")
    axes.set_xlabel("KL(q* ‖ student), nats")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend()


FIGURES: dict[str, Callable[[Any], None]] = {"alpha": alpha, "distances": distances}


def main() -> None:
    """Write every figure."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        text = svg(draw, width=5.4, height=3.2).replace("currentColor", GREY)
        (FOLDER / f"{name}.svg").write_text(text.replace("<svg ", '<svg width="540" height="320" ', 1))


if __name__ == "__main__":
    main()
