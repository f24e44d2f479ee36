"""Statistics of a data set in words: a headline sentence, and for each number what it means and whether it is odd.

The limits are explained in docs/reading.md. Total variation is at most √(KL/2) (Pinsker), also for means over tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from osd.data import grading
from osd.data.statistics import Tally

AGREE = 0.001  # nats per token: q* and the student differ in at most 2 % of their mass
FAR = 0.5  # nats per token: q* and the student may differ in half of their mass
FEW_EFFECTIVE = 0.5  # effective sample size, as a share
FINISHED = 0.9  # share of completions that end by themselves
AT_A_BOUND = 0.5  # share of tokens with α near 0 or 1
UNEQUAL = 0.1  # relative difference of the two divergences


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One number of the page.

    Attributes:
        value, name: the number and its label.
        meaning: what it says, in one line.
        odd: what is unusual about it; "" if it is normal; None if there is no normal range.
    """

    value: str
    name: str
    meaning: str
    odd: str | None = None


def statistics_in_words(result: Tally) -> list[Statistic]:
    """Return the numbers of a data set, each with its meaning."""
    theta, teacher = _mean(result, "kl_theta"), _mean(result, "kl_teacher")
    ended, whole = result.finish_reasons["stop"], result.completions
    return [
        *_right(result),
        Statistic(
            value=f"{ended / whole:.0%}",
            name="ended by themselves",
            meaning=f"{ended:,} of {whole:,} ({_interval(ended, whole)}); the others were cut at the length limit.",
            odd=_if(ended < FINISHED * whole, "Many are cut: raise max_completion_length, or filter by finish reason."),
        ),
        Statistic(
            value=f"{theta:.3f}",
            name="mean KL(q* ‖ student), nats per token",
            meaning=f"Distance of the data from the student; total variation is at most {_variation(theta):.0%}.",
            odd=_if(theta > FAR, "Far: much of this text is out of the student's reach. Lower alpha_max.")
            or _if(theta < AGREE, "Near: both models agree nearly everywhere. Is the teacher's prompt different?"),
        ),
        Statistic(
            value=f"{teacher:.3f}",
            name="mean KL(q* ‖ teacher)",
            meaning="KL symmetry makes it equal to the distance from the student.",
            odd=_if(
                abs(teacher - theta) > max(UNEQUAL * theta, AGREE),
                "Not equal: another α method, another mixture, or α at a bound.",
            ),
        ),
        Statistic(
            value=f"{_mean(result, 'alpha'):.3f}",
            name="mean α",
            meaning=f"The teacher's weight. It is within 1/40 of 0 or 1 for {_at_a_bound(result):.0%} of the tokens.",
            odd=_if(_at_a_bound(result) > AT_A_BOUND, "At a bound: most tokens come from one model alone."),
        ),
        *(_effective(result, side) for side in ("theta", "teacher")),
        Statistic(
            value=f"{_mean(result, 'accepted'):.2f}",
            name="acceptance of the student's drafts",
            meaning="Mean of min(1, π_θ/q*): the share that num_speculative_tokens would keep.",
        ),
        Statistic(
            value=f"{math.exp(-_mean(result, 'logp_theta')):.2f}",
            name="perplexity to the student",
            meaning="How surprising the text is to the student: 1 is certain.",
        ),
        Statistic(
            value=f"{math.exp(-_mean(result, 'logp_teacher')):.2f}",
            name="perplexity to the teacher",
            meaning="The same for the teacher, with its own prompt.",
        ),
        Statistic(
            value=f"{result.tokens / whole:,.0f}",
            name="tokens each, on average",
            meaning=f"From {min(result.lengths):,} to {max(result.lengths):,}; {result.tokens:,} in all.",
        ),
    ]


def headline(result: Tally) -> tuple[str, str]:
    """Return what a data set is worth in one sentence, and which of its statistics are odd."""
    ended, far = result.finish_reasons["stop"], _mean(result, "kl_theta")
    what = (
        f"{result.right:,} of {result.scored:,} completions are right"
        if result.scored
        else f"{ended:,} of {result.completions:,} completions ended by themselves"
    )
    if far > FAR:
        reach = "and much of their text is out of the student's reach"
    elif far < AGREE:
        reach = "and the student would have written them as likely: there is little to learn"
    else:
        reach = "and the student could have written them"
    odd = [f"{statistic.value} {statistic.name}" for statistic in statistics_in_words(result) if statistic.odd]
    marks = f"Odd: {'; '.join(odd)}. The numbers below say why." if odd else "No number is odd."
    return f"{what}, {reach} (KL {far:.3f} nats per token).", marks


def _mean(result: Tally, name: str) -> float:
    return result.sums[name] / result.tokens


def _if(condition: bool, text: str) -> str:
    return text if condition else ""


def _variation(kl: float) -> float:
    return min(1.0, math.sqrt(max(kl, 0.0) / 2))


def _at_a_bound(result: Tally) -> float:
    counts = result.histograms["alpha"]
    return float((counts[0] + counts[-1]) / max(counts.sum(), 1))


def _interval(part: int, whole: int) -> str:
    low, high = grading.wilson(part, whole)
    return f"95 %: {low:.1%} to {high:.1%}"


def _right(result: Tally) -> list[Statistic]:
    if not result.scored:
        return []
    return [
        Statistic(
            value=f"{result.right / result.scored:.0%}",
            name="right",
            meaning=f"{result.right:,} of {result.scored:,} ({_interval(result.right, result.scored)}), by answer_match.",
            odd=_if(not result.right, "None: does answer_match fit the answers?") or None,
        )
    ]


def _effective(result: Tally, side: str) -> Statistic:
    share, name = _mean(result, f"ess_{side}"), "student" if side == "theta" else side
    return Statistic(
        value=f"{share:.2f}",
        name=f"mean effective sample size against the {name}",
        meaning=f"1 if q* covers the {name}; near 0 if importance weights towards it would explode.",
        odd=_if(share < FEW_EFFECTIVE, "Low: importance correction would keep less than half of the samples."),
    )
