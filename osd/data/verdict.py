"""Scores of the arms of `osd compare`, and the verdict on q*.

Quality is accuracy where there are answers, else the teacher's mean log-probability. Distance is the mean KL(arm ‖ student) per
token. Mixing is worth it where the teacher is better and q* is not worse than the student. Shares of lead and distance are not
compared: a completion is right if all of its tokens are, so half-way per token is far less than half-way in accuracy, and arms
that are further from the student trained no worse (docs/evidence.md). Distance says which linear mixture q* is compared with.

A arms, P prompts, S sums. Intervals are 95 %: Wilson's for shares, else bootstraps over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from osd.data.grading import wilson
from osd.data.samples import Sample

RESAMPLES = 2000
FEWEST = 10  # prompts; a bootstrap over fewer has intervals that are far too narrow
SUMS = ("tokens", "logp_theta", "logp_teacher", "kl_theta", "kl_teacher", "alpha", "finished", "correct", "scored", "samples")
UNTRAINED = (
    "No student was trained: this compares what the arms sample now, not students trained on it. "
    "Only training shows whether the teacher's samples alone would do as well."
)
MEASURES = {"accuracy": "accuracy", "logp_teacher": "log π_t per token"}
Marks = Sequence[bool | None]  # of each sample: right, wrong, or None without a reference answer


def score(drawn: dict[str, list[Sample]], marks: dict[str, Marks]) -> dict[str, Any]:
    """Return the table of all arms, and the verdict.

    Args:
        drawn: the samples of every arm, of the same prompts in the same order.
        marks: which of them are right.
    """
    sums_APS = np.stack([_sums(samples, marks[name]) for name, samples in drawn.items()])
    names, total = list(drawn), sums_APS.sum(axis=1)
    quality = "accuracy" if total[:, SUMS.index("correct")].any() else "logp_teacher"  # no right answer: no arm stands out
    estimates, resampled = _figures(total), _resampled(sums_APS, quality)
    table = [
        {
            "arm": name,
            **{key: float(values[a]) for key, values in estimates.items()},
            "accuracy_interval": _share_interval(sums_APS[a], "correct", "scored"),
            "finished_interval": _share_interval(sums_APS[a], "finished", "samples"),
            **{f"{key}_interval": _interval(resampled[key][:, a]) for key in ("logp_teacher", "kl_theta")},
        }
        for a, name in enumerate(names)
    ]
    return {
        "prompts": sums_APS.shape[1],
        "samples": len(next(iter(drawn.values()))),
        "quality": quality,
        "arms": table,
        "verdict": _verdict(names, estimates, resampled, quality, _judged(sums_APS, quality)),
        "trained": False,
    }


def _sums(samples: Sequence[Sample], marks: Marks) -> np.ndarray:
    """Sum over each prompt's samples: [P, S], prompts in their order."""
    by_prompt: dict[str, np.ndarray] = {}
    for sample, mark in zip(samples, marks, strict=True):
        by_prompt.setdefault(sample["id"], np.zeros(len(SUMS)))
        by_prompt[sample["id"]] += [
            sample["num_tokens"],
            *(sum(sample[name]) for name in ("logp_theta", "logp_teacher", "kl_theta", "kl_teacher", "alpha")),
            sample["finish_reason"] == "stop",
            mark is True,
            mark is not None,
            1,
        ]
    return np.stack(list(by_prompt.values()))


def _figures(sums_AS: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures of every arm, [A] each. Means per token weigh every token alike."""
    sums = dict(zip(SUMS, np.moveaxis(sums_AS, -1, 0), strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = {n: sums[n] / sums["tokens"] for n in ("logp_theta", "logp_teacher", "kl_theta", "kl_teacher", "alpha")}
        return {
            **means,
            "perplexity_student": np.exp(-means["logp_theta"]),
            "perplexity_teacher": np.exp(-means["logp_teacher"]),
            "accuracy": sums["correct"] / sums["scored"],
            "length": sums["tokens"] / sums["samples"],
            "finished": sums["finished"] / sums["samples"],
        }


def _resampled(sums_APS: np.ndarray, quality: str) -> dict[str, np.ndarray]:
    """Return the figures of bootstrap resamples over prompts, [RESAMPLES, A] each.

    Two made-up prompts with a random mark per arm join each resample when accuracy judges. Without them, arms that agree on
    every prompt would have an interval of no width (Agresti and Caffo's "plus four" for differences of proportions).
    """
    chance = np.random.default_rng(0)
    arms, prompts = sums_APS.shape[:2]
    totals = np.stack([sums_APS[:, chance.integers(prompts, size=prompts)].sum(axis=1) for _ in range(RESAMPLES)])
    if quality == "accuracy":
        totals[..., SUMS.index("correct")] += chance.binomial(2, 0.5, size=(RESAMPLES, arms))
        totals[..., SUMS.index("scored")] += 2
    return _figures(totals)


def _share_interval(sums_PS: np.ndarray, part: str, whole: str) -> list[float]:
    """Return Wilson's interval of a share. Samples of one prompt count for less where they agree.

    Without variance to estimate that from, a prompt counts once.
    """
    parts, wholes = (sums_PS[:, SUMS.index(name)] for name in (part, whole))
    used = wholes > 0
    prompts, total = int(used.sum()), float(wholes.sum())
    if not total:
        return [math.nan, math.nan]
    share = parts.sum() / total
    between = ((parts - share * wholes) ** 2).sum() / total**2  # variance of the share over prompts
    effective = share * (1 - share) / between if between else prompts
    return wilson(share * (n := min(max(effective, prompts), total)), n)


def _judged(sums_APS: np.ndarray, quality: str) -> int:
    """Return the number of prompts that the quality rests on."""
    return int((sums_APS[0, :, SUMS.index("scored" if quality == "accuracy" else "tokens")] > 0).sum())


def _verdict(
    names: list[str], estimates: dict[str, np.ndarray], resampled: dict[str, np.ndarray], quality: str, judged: int
) -> dict[str, Any]:
    """Compare q* with the student, and with the line through student, linear mixtures and teacher."""
    at = {name: i for i, name in enumerate(names)}
    one, many = (_differences(at, figures, quality) for figures in ({k: v[None] for k, v in estimates.items()}, resampled))
    student, teacher, mixed = (at[name] for name in ("student", "teacher", "q*"))
    to_teacher_A, from_student_A = estimates["kl_teacher"], estimates["kl_theta"]
    found = {
        "teacher_lead": float(one["lead"][0]),
        "teacher_lead_interval": _interval(many["lead"]),
        "student_gain": float(one["gained"][0]),
        "student_gain_interval": _interval(many["gained"]),
        "over_linear": float(one["over_line"][0]),
        "over_linear_interval": _interval(many["over_line"]),
        "linear_drawn": any(name.startswith("linear ") for name in names),
        "nearer_share": _share(to_teacher_A[student] - to_teacher_A[mixed], to_teacher_A[student]),
        "distance_share": _share(from_student_A[mixed], from_student_A[teacher]),
        "prompts_judged": judged,
    }
    return {**found, "worth_it": _worth_it(found)}


def _differences(at: dict[str, int], figures: dict[str, np.ndarray], quality: str) -> dict[str, np.ndarray]:
    """Return the teacher's lead, and q*'s height over the student and over the line, of R sets of figures."""
    worth_RA, far_RA = figures[quality], figures["kl_theta"]
    student, teacher, mixed = (at[name] for name in ("student", "teacher", "q*"))
    ends = [i for name, i in at.items() if on_line(name)]
    line_R = []
    for worth, far in zip(worth_RA, far_RA, strict=True):
        order = sorted(ends, key=lambda i: far[i])
        line_R.append(np.interp(far[mixed], far[order], worth[order]))
    return {
        "lead": worth_RA[:, teacher] - worth_RA[:, student],
        "gained": worth_RA[:, mixed] - worth_RA[:, student],
        "over_line": worth_RA[:, mixed] - np.array(line_R),
    }


def on_line(arm: str) -> bool:
    """Return whether an arm is one of those that q* is compared with at its own distance."""
    return arm in ("student", "teacher") or arm.startswith("linear ")


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _worth_it(v: dict[str, Any]) -> str:
    """Return the outcome: a key of `HEADLINES`."""
    if v["prompts_judged"] < FEWEST:
        return "too few"
    gains, loses = v["student_gain_interval"][0] > 0, v["student_gain_interval"][1] < 0
    if not v["teacher_lead_interval"][0] > 0:
        return "no lead, but q*" if gains else "no lead"
    if loses:
        return "no"
    if v["linear_drawn"] and v["over_linear_interval"][1] < 0:
        return "linear"
    return "yes" if gains and (not v["linear_drawn"] or v["over_linear_interval"][0] > 0) else "mixing"


HEADLINES = {
    "yes": "Worth it: q* samples better than the student alone, and better than linear mixtures at the same distance",
    "mixing": "Worth it to mix, undecided how: the teacher is better, and half-way to it q* samples not measurably worse than "
    "the student alone; it is not measurably better than linear mixtures at the same distance",
    "linear": "Worth it to mix, but not with q*: linear mixtures are measurably better at the same distance",
    "no": "Not worth it: q* samples worse than the student alone",
    "no lead": "The teacher is not measurably better than the student here",
    "no lead, but q*": "The teacher is not measurably better than the student here, but q* is",
    "too few": f"Undecided: fewer than {FEWEST} prompts could be judged",
}


def sentence(result: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict in words: a headline, and the figures behind it."""
    v, measure = result["verdict"], MEASURES[result["quality"]]
    lead = f"{v['teacher_lead']:+.3f} {measure} ({_between(v['teacher_lead_interval'])})"
    gained = f"{v['student_gain']:+.3f} over the student ({_between(v['student_gain_interval'])})"
    said = [f"The teacher's lead over the student is {lead} on {result['prompts']} prompts."]
    if result["quality"] != "accuracy" and result["arms"][0]["accuracy"] == 0:
        said.insert(0, "No completion has the right answer, so the teacher's log-probability judges.")
    if v["worth_it"] == "too few":
        said.append("Give more prompts (100 are read by default).")
    elif v["worth_it"].startswith("no lead"):
        said.append(f"q* scores {gained}.")
        if v["worth_it"] == "no lead":
            said.append("There is nothing to gain here, or there are too few prompts to see it.")
    else:
        line = "student, linear mixtures and teacher" if v["linear_drawn"] else "student and teacher (no mixture was drawn)"
        said += [
            f"q* scores {gained}, and {v['over_linear']:+.3f} over the line through {line} at the same distance "
            f"({_between(v['over_linear_interval'])}).",
            f"KL(q* ‖ teacher) is {v['nearer_share']:.0%} below the student's, at {v['distance_share']:.0%} of the teacher's "
            "distance from the student.",
        ]
    headline = HEADLINES[v["worth_it"]]
    if not v["linear_drawn"]:  # what comes last is about linear mixtures
        headline = headline.partition({"yes": ",", "mixing": ";"}.get(v["worth_it"], "\n"))[0]
    return headline, " ".join([*said, UNTRAINED])


CHANGES = {
    "yes": "a linear mixture that is as good at the same distance, or an interval that reaches zero on other prompts.",
    "mixing": "more prompts or samples (limit, num_samples): an interval of q*, over the student or over the linear mixtures, "
    "still contains zero.",
    "linear": "other values of alpha_method, alpha_min or alpha_max.",
    "no": "another teacher, or another prompt for it: half-way to this one, samples get worse.",
    "no lead": "a teacher that is better here: a larger one, or one that reads the answer; or more prompts.",
    "no lead, but q*": "a teacher that is better here: a larger one, or one that reads the answer; or more prompts.",
    "too few": f"at least {FEWEST} prompts, better 100.",
}


def scoring(result: dict[str, Any]) -> str:
    """Return how completions were judged, and the rule of the verdict."""
    how = result["settings"]["answer_match"]
    judged = (
        f"A completion is right if its answer matches the reference (answer_match={how})."
        if result["quality"] == "accuracy"
        else "No completion could be called right, so quality is the mean of log π_t per token, with the teacher's prompt."
    )
    return (
        f"{judged} Mixing is worth it if the teacher is better than the student and q* is not worse; q* itself, if it is also "
        "better than the student and than linear mixtures at the same distance. All by 95 % intervals over prompts."
    )


def what_would_change(result: dict[str, Any]) -> str:
    """Return what would give another verdict."""
    return "Another verdict would need " + CHANGES[result["verdict"]["worth_it"]]


def linear_at_same_distance(result: dict[str, Any]) -> float:
    """Return the quality of the line through student, linear mixtures and teacher at the distance of q*."""
    [mixed] = [row for row in result["arms"] if row["arm"] == "q*"]
    return float(mixed[result["quality"]]) - float(result["verdict"]["over_linear"])


def _between(interval: Sequence[float]) -> str:
    return f"95 %: {interval[0]:+.3f} to {interval[1]:+.3f}"


def _interval(values: np.ndarray) -> list[float]:
    """Return the 95 % interval of values, as many left out on each side; NaN where none is finite."""
    known = values[np.isfinite(values)]
    return [float(np.quantile(known, q)) for q in (0.025, 0.975)] if len(known) else [math.nan, math.nan]
