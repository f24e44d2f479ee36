"""The engine's draws come from q*, computed independently; and the test sees the errors that we fear most.

The statistic is the largest of three chi-squares with 63 degrees of freedom over 20,480 draws (tests/exact.py), along the
orders in which the errors below move probability. Threshold 160: a correct engine passes it with probability 1 - 3e-10
each; measured 50 to 85. Measured with the planted errors: see each test's bound, at least three times the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from osd.core import MixingConfig
from osd.engine import mixture as engine_mixture
from osd.engine.alignment import Aligner
from osd.engine.backend import sampler
from osd.engine.engine import PairCompletion, PairEngine, PairPrompt
from tests.exact import log_probabilities, mixture, pit_chi_square, record_columns, solve
from tests.pairs import prompt_pairs

pytestmark = pytest.mark.gpu

THRESHOLD = 160.0
SEEN = 3 * THRESHOLD
COMPLETIONS, TOKENS = 128, 160


def plant(monkeypatch, mix) -> None:
    """Mix with this function, on a GPU too, where kernels would do it."""
    monkeypatch.setattr(engine_mixture, "mix", mix)
    monkeypatch.setattr(sampler, "use_kernels", lambda *args: False)


def sample(engine: PairEngine, prompts: Sequence[PairPrompt], **sampling) -> list[PairCompletion]:
    settings = dict(max_tokens=TOKENS, temperature=1.0, ignore_eos=True) | sampling
    return engine.generate(prompts, sampling=settings)


def worst_chi_square(ls: torch.Tensor, lt: torch.Tensor, completions: Sequence[PairCompletion]) -> float:
    logq = mixture(ls, lt, solve("kl_symmetry", ls, lt))
    tokens = [token for c in completions for token in c.token_ids]
    assert len(tokens) == COMPLETIONS * TOKENS
    return max(pit_chi_square(logq, tokens, order) for order in (lt - ls, ls, lt))


@pytest.fixture
def statistic(engine, models, record_property):
    """Sample (or take ``completions``) and compare with the q* of ``prompts``; in the report as well (``make test-gpu``)."""

    def statistic(prompts=None, completions=None) -> float:
        prompts = prompts or prompt_pairs(COMPLETIONS)
        completions = completions or sample(engine, prompts)
        found = worst_chi_square(*log_probabilities(models, prompts, completions), completions)
        record_property("chi_square", round(found, 1))
        return found

    return statistic


def test_draws_follow_q_star(statistic):
    assert statistic() < THRESHOLD


def test_seeded_draws_follow_q_star(engine, statistic):
    prompts = prompt_pairs(COMPLETIONS)
    settings = [dict(max_tokens=TOKENS, temperature=1.0, ignore_eos=True, seed=i) for i in range(COMPLETIONS)]
    completions = engine.generate(prompts, sampling=settings)
    assert statistic(prompts, completions) < THRESHOLD


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_swapped_prompt_is_seen(engine, statistic, side):
    prompts = prompt_pairs(COMPLETIONS)
    other = prompts[1:] + prompts[:1]
    wrong = [
        PairPrompt(
            teacher_token_ids=(o if side == "teacher" else p).teacher_token_ids,
            student_token_ids=(o if side == "student" else p).student_token_ids,
        )
        for p, o in zip(prompts, other, strict=True)
    ]
    completions = sample(engine, wrong)
    assert statistic(prompts, completions) > SEEN


def test_a_truncated_student_is_seen(engine, statistic, monkeypatch):
    """The earlier design cut the student to its 20 most likely tokens."""
    exact_mix = engine_mixture.mix

    def truncated(student, teacher, config, **kwargs):
        least = student.topk(20, dim=-1).values[:, -1:]
        return exact_mix(student.masked_fill(student < least, float("-inf")), teacher, config, **kwargs)

    plant(monkeypatch, truncated)
    assert statistic() > SEEN


def test_alpha_off_by_a_twentieth_is_seen(engine, statistic, monkeypatch):
    exact_mix = engine_mixture.mix

    def shifted(student, teacher, config, *, alpha_B=None, **kwargs):
        alpha_B = (exact_mix(student, teacher, config, **kwargs).alpha_B + 0.05).clamp(0, 1)
        return exact_mix(student, teacher, config, alpha_B=alpha_B, **kwargs)

    plant(monkeypatch, shifted)
    assert statistic() > SEEN


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
def test_a_shifted_alpha_is_seen_through_the_kernels(engine, statistic, monkeypatch):
    ours = engine._frontend.worker.sampler
    monkeypatch.setattr(ours, "mixing", MixingConfig(alpha_method="fixed", fixed_alpha=0.7))
    assert statistic() > SEEN
    assert ours._kernel_draw._draw.replayed > 100


def test_a_stale_alignment_of_rows_is_seen(engine, statistic, monkeypatch):
    """The planted error: rows paired as they were before one batch was reordered (the student's shifted by one place)."""
    exact_build = Aligner._build

    def stale(self, teacher_ids, student_ids, ready, *rest):
        alignment = exact_build(self, teacher_ids, student_ids, ready, *rest)
        if not len(ready) == len(teacher_ids) == len(student_ids):
            return alignment
        rows = torch.arange(len(student_ids), device=self.device) if alignment.student is None else alignment.student
        return replace(alignment, student=rows.roll(1))

    monkeypatch.setattr(Aligner, "_build", stale)
    assert statistic() > SEEN


@pytest.mark.parametrize(
    "config",
    [
        MixingConfig(alpha_method="kl_symmetry"),
        MixingConfig(alpha_method="ess_balance"),
        MixingConfig(alpha_method="entropy"),
        MixingConfig(alpha_method="reverse_kl_symmetry"),
        MixingConfig(alpha_method="fixed", fixed_alpha=0.3),
        MixingConfig(alpha_method="kl_symmetry", alpha_min=0.45, alpha_max=0.55),
        MixingConfig(alpha_method="fixed", fixed_alpha=0.3, mixture="linear"),
    ],
    ids=lambda c: f"{c.alpha_method}-{c.mixture}-{c.alpha_min}",
)
def test_the_record_is_what_the_definitions_say(engine, models, monkeypatch, record_property, config):
    """α, log q*, both policies' log-probabilities and both KLs of every token, for every method, against float64."""
    monkeypatch.setattr(engine._frontend.worker.sampler, "mixing", config)
    prompts = prompt_pairs(12)
    completions = sample(engine, prompts, max_tokens=40)
    ls, lt = log_probabilities(models, prompts, completions)
    if config.alpha_method == "fixed":
        alpha = torch.full((len(ls), 1), config.fixed_alpha, dtype=torch.float64)
    else:
        alpha = solve(config.alpha_method, ls, lt).clamp(config.alpha_min, config.alpha_max)
    logq = mixture(ls, lt, alpha)
    if config.mixture == "linear":
        logq = torch.logaddexp(ls + (1 - alpha).log(), lt + alpha.log())
    tokens = [t for c in completions for t in c.token_ids]
    for name, values in record_columns(ls, lt, alpha, logq, tokens).items():
        recorded = torch.cat([getattr(c.record, name) for c in completions]).double()
        record_property(f"{name}_error", f"{(recorded - values).abs().max():.1e}")
        torch.testing.assert_close(recorded, values, atol=2e-4, rtol=1e-3, msg=f"{name} differs")


def test_the_record_proves_itself(engine, record_property):
    """At an interior KL-symmetric α both KLs are the Chernoff information: the record carries its own check."""
    completions = sample(engine, prompt_pairs(32))
    gaps = torch.cat([c.record.chernoff_gap(engine.config.mixing) for c in completions])
    kl = torch.cat([c.record.kl_theta for c in completions])
    assert len(gaps) > 4000
    record_property("chernoff_gap", f"{gaps.max():.1e}")
    # An α known to 1e-5 leaves a gap of 1e-5 times the variance of log π_t/π_θ, which grows with the divergence.
    assert gaps.max() < 1e-3 * max(1.0, kl.max().item())
