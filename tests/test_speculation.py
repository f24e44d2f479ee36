"""The mathematics of speculation on two language models that are tables: the joint of the first three tokens, by chi-square.

64 cells, so 63 degrees of freedom; threshold 160: a correct cycle passes it with probability 1 - 3e-10. Measured: 40 to 85.
The planted errors must give at least three times the threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy import stats

from osd.core import TOKEN_ORIGINS
from osd.engine import speculation
from osd.engine.mixture import draw, uniform
from osd.engine.speculation import ACCEPT, CORRECT, DRAFT, Layout, Verdict, stream
from tests.exact import mixture, solve

VOCAB, TOKENS, SEQUENCES = 4, 3, 60_000
THRESHOLD, SEEN = 160.0, 480.0
TEMPERATURE = 0.7

# S sequences, L tokens that each may have, N positions, V vocabulary.


@dataclass(frozen=True)
class Tables:
    """log π_θ and log π_t by the last two tokens (VOCAB: none), tempered, and log q*; float64 [V + 1, V + 1, V]."""

    theta: torch.Tensor
    teacher: torch.Tensor
    target: torch.Tensor
    raw_theta: torch.Tensor

    @classmethod
    def random(cls) -> Tables:
        rng = torch.Generator().manual_seed(3)
        raw = [torch.randn(VOCAB + 1, VOCAB + 1, VOCAB, generator=rng, dtype=torch.float64) * 1.2 for _ in range(2)]
        theta, teacher = (side.div(TEMPERATURE).log_softmax(-1).view(-1, VOCAB) for side in raw)
        target = mixture(theta, teacher, solve("kl_symmetry", theta, teacher))
        return cls(*(table.view(raw[0].shape) for table in (theta, teacher, target)), raw[0].log_softmax(-1))

    def joint(self) -> torch.Tensor:
        """The probability of each of the first three tokens under q*, [V, V, V]."""
        first, second, third = self.target[VOCAB, VOCAB], self.target[VOCAB, :VOCAB], self.target[:VOCAB, :VOCAB]
        return (first[:, None, None] + second[:, :, None] + third).exp()


TABLES = Tables.random()


def at(table: torch.Tensor, tokens_SL: torch.Tensor, length_N: torch.Tensor, row_N: torch.Tensor) -> torch.Tensor:
    """Return the rows of a table for sequences of that length, [N, V]."""
    last = [torch.where(length_N >= n, tokens_SL[row_N, (length_N - n).clamp(min=0)], VOCAB) for n in (2, 1)]
    return table[last[0], last[1]]


def cycle(
    tokens_SL: torch.Tensor,
    length_S: torch.Tensor,
    drafts: list[int],
    seed_S: torch.Tensor,
    *,
    drafted_from: torch.Tensor = TABLES.theta,
    claimed: torch.Tensor = TABLES.theta,
    weighed: torch.Tensor = TABLES.target,
    shift: int = 0,
    bonus: torch.Tensor = TABLES.target,
    residual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = speculation.residual,
) -> Verdict:
    """Run one cycle and append its tokens. The last six arguments plant errors."""
    layout, count = Layout.of(drafts, torch.device("cpu")), len(drafts)
    row_S, written = torch.arange(count), tokens_SL.clone()
    for place in range(layout.width):  # beyond a sequence's drafts it writes what nobody reads
        logp = at(drafted_from, written, length_S + place, row_S)
        written[row_S, length_S + place] = draw(logp, uniform(stream(seed_S, DRAFT), length_S + place))[0]
    row_N, length_N = layout.request_N, length_S[layout.request_N] + layout.place_N
    draft_N = written[row_N, length_N]
    read_N = (length_N - shift).clamp(min=0)
    theta_NV = at(claimed, written, length_N, row_N)
    is_bonus = (layout.place_N == layout.drafts_B[row_N])[:, None]
    weighed_NV = torch.where(is_bonus, at(bonus, written, read_N, row_N), at(weighed, written, read_N, row_N))
    target_NV = torch.where(is_bonus, at(bonus, written, read_N, row_N), at(TABLES.target, written, read_N, row_N))
    of_draft = [logp.gather(-1, draft_N[:, None])[:, 0] for logp in (weighed_NV, theta_NV)]
    accepted_N = speculation.accept(*of_draft, uniform(stream(seed_S[row_N], ACCEPT), length_N))

    def correct(final_S: torch.Tensor) -> torch.Tensor:
        weights = residual(target_NV[final_S], theta_NV[final_S])
        numbers = uniform(stream(seed_S[row_N[final_S]], CORRECT), length_N[final_S])
        return speculation.inverse_cdf(weights.cumsum(-1), numbers)

    verdict = speculation.verify(layout, draft_N=draft_N, accepted_N=accepted_N, correct=correct)
    kept = verdict.kept_N
    tokens_SL[row_N[kept], length_N[kept]] = verdict.token_N[kept]
    length_S += verdict.kept_B
    return verdict


def complete(drafts: Callable[[int], list[int]], **planted) -> torch.Tensor:
    """Sample until every sequence has its first tokens; ``drafts`` gives the number of drafts of each at the n-th cycle."""
    sequences = len(drafts(0))
    tokens_SL = torch.zeros(sequences, 4 * TOKENS + 12, dtype=torch.int64)
    length_S, seed_S = torch.zeros(sequences, dtype=torch.int64), torch.arange(sequences) * 7919
    for n in range(TOKENS):
        cycle(tokens_SL, length_S, drafts(n), seed_S, **planted)
    return tokens_SL[:, :TOKENS]


def always(k: int, sequences: int = SEQUENCES) -> Callable[[int], list[int]]:
    return lambda n: [k] * sequences


def ragged(n: int) -> list[int]:
    return [(row * 31 + n * 7) % 5 for row in range(SEQUENCES)]


def chi_square(tokens_SL: torch.Tensor) -> float:
    cells = (tokens_SL * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1).bincount(minlength=VOCAB**3)
    return float(stats.chisquare(cells.double(), TABLES.joint().view(-1) * len(tokens_SL)).statistic)


@pytest.mark.parametrize("drafts", [always(0), always(1), always(3), always(5), ragged], ids=["0", "1", "3", "5", "ragged"])
def test_the_first_three_tokens_follow_q_star_jointly(drafts, record_property):
    found = chi_square(complete(drafts))
    record_property("chi_square", round(found, 1))
    assert found < THRESHOLD


PLANTED = {
    "the residual is q* itself": dict(residual=lambda target, theta: target.exp()),
    "the teacher in the place of q* in the acceptance": dict(weighed=TABLES.teacher),
    "π_θ without its temperature": dict(claimed=TABLES.raw_theta),
    "drafts without their temperature": dict(drafted_from=TABLES.raw_theta),
    "off by one position": dict(shift=1),
    "the bonus token without the student's logits": dict(bonus=TABLES.teacher),
}


@pytest.mark.parametrize("error", PLANTED)
@pytest.mark.parametrize("k", [1, 2])
def test_planted_errors_are_seen(error, k, record_property):
    found = chi_square(complete(always(k), **PLANTED[error]))
    record_property("chi_square", round(found, 1))
    assert found > SEEN


def test_a_seed_gives_the_same_completion_however_the_cycles_fall():
    expected = complete(always(1, 2000))
    for drafts in (always(0, 2000), always(4, 2000), lambda n: ragged(n)[:2000]):
        assert torch.equal(complete(drafts), expected)


def test_acceptance_is_one_minus_the_total_variation():
    """Over first positions, whose context is the same in every sequence: a binomial mean within five standard errors."""
    tokens_SL, length_S = torch.zeros(SEQUENCES, 12, dtype=torch.int64), torch.zeros(SEQUENCES, dtype=torch.int64)
    verdict = cycle(tokens_SL, length_S, [3] * SEQUENCES, torch.arange(SEQUENCES))
    accepted = (verdict.origin_N[::4] == speculation.ACCEPTED).double().mean().item()
    p, q = TABLES.theta[VOCAB, VOCAB].exp(), TABLES.target[VOCAB, VOCAB].exp()
    expected = float(torch.minimum(p, q).sum())
    assert expected == pytest.approx(1 - 0.5 * float((p - q).abs().sum()))
    assert abs(accepted - expected) < 5 * (expected * (1 - expected) / SEQUENCES) ** 0.5


def test_verify_keeps_drafts_up_to_the_first_that_is_refused():
    layout = Layout.of([0, 2, 3, 1], torch.device("cpu"))
    draft_N = torch.arange(10, 20)
    accepted = [True, True, False, True, True, True, True, True, False, True]
    verdict = speculation.verify(
        layout, draft_N=draft_N, accepted_N=torch.tensor(accepted), correct=lambda final_B: 100 + final_B
    )
    assert verdict.kept_B.tolist() == [1, 2, 4, 1]
    assert verdict.final_B.tolist() == [0, 2, 7, 8]
    rows = [row[:kept] for row, kept in zip(verdict.token_BW.tolist(), verdict.kept_B.tolist(), strict=True)]
    assert rows == [[10], [11, 102], [14, 15, 16, 17], [108]]
    kept = [TOKEN_ORIGINS[i] for i in verdict.origin_N[verdict.kept_N].tolist()]
    assert kept == ["drawn", "accepted", "corrected", "accepted", "accepted", "accepted", "bonus", "corrected"]


def test_equal_policies_leave_no_residual_and_a_refusal_by_rounding_draws_from_the_target():
    logp = torch.tensor([[0.1, 0.2, 0.7]]).log()
    assert torch.equal(speculation.residual(logp, logp), logp.double().softmax(-1))
    token = functools.partial(speculation.draw_residual, logp, logp, None)
    assert [int(token(torch.tensor([u], dtype=torch.float64))) for u in (0.05, 0.25, 0.95)] == [0, 1, 2]


def test_nothing_is_accepted_where_a_policy_is_not_a_distribution():
    nan, one = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert not speculation.accept(nan, one, torch.zeros(1, dtype=torch.float64))
    assert not speculation.accept(one, nan, torch.zeros(1, dtype=torch.float64))
