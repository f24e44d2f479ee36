"""Scores of the arms of `osd compare`, and the verdict on q*.

Quality is accuracy where there are answers, else the teacher's mean log-probability. Distance is the mean KL(arm ‖ student)
per token. Mixing is worth it where the teacher is measurably better than the student, and q* is, too. It is also worth it where
q* is more than a tenth nearer to the teacher and its interval excludes a loss of more than a tenth of the teacher's lead:
nearness to the teacher ranked arms as training did (docs/evidence.md). Shares of lead and distance are not compared: a
completion is right if all of its tokens are, so half-way per token is far less than half-way in accuracy, and arms that are
further from the student trained no worse. Distance says which linear mixture q* is compared with.

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
SMALL = 0.1  # a smaller share of the teacher's lead counts as no loss, of the student's KL to the teacher as no nearness
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
    reached = from_student_A[mixed] <= max(from_student_A[i] for name, i in at.items() if on_line(name))
    found = {
        "teacher_lead": float(one["lead"][0]),
        "teacher_lead_interval": _interval(many["lead"]),
        "student_gain": float(one["gained"][0]),
        "student_gain_interval": _interval(many["gained"]),
        "over_linear": float(one["over_line"][0]),
        "over_linear_interval": _interval(many["over_line"]),
        "linear_compared": any(name.startswith("linear ") for name in names) and bool(reached),
        "nearer_share": _share(to_teacher_A[student] - to_teacher_A[mixed], to_teacher_A[student]),
        "nearer_share_interval": _interval(1 - resampled["kl_teacher"][:, mixed] / resampled["kl_teacher"][:, student]),
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


def _sign(interval: Sequence[float]) -> int:
    """Return 1 for an interval above zero, -1 for one below, else 0."""
    return int(interval[0] > 0) - int(interval[1] < 0)


def _worth_it(v: dict[str, Any]) -> str:
    """Return the outcome: yes, mixing, undecided, linear, no, no lead, no lead but q*, or too few."""
    if v["prompts_judged"] < FEWEST:
        return "too few"
    lead, gain, line = (_sign(v[f"{name}_interval"]) for name in ("teacher_lead", "student_gain", "over_linear"))
    if lead <= 0:
        return "no lead, but q*" if gain > 0 else "no lead"
    if gain < 0:
        return "no"
    if v["linear_compared"] and line < 0:
        return "linear"
    if gain > 0:
        return "yes" if line > 0 or not v["linear_compared"] else "mixing"
    no_loss = v["student_gain"] >= 0 and v["student_gain_interval"][0] >= -SMALL * v["teacher_lead"]
    return "mixing" if _nearer(v) and no_loss else "undecided"


def _nearer(v: dict[str, Any]) -> bool:
    """Return whether q* is measurably nearer to the teacher than the student is, by more than a small share."""
    return bool(v["nearer_share_interval"][0] > SMALL)


def _headline(v: dict[str, Any]) -> str:
    """Return the verdict in one sentence; every claim in it is a test of `_worth_it`."""
    gains, line = _sign(v["student_gain_interval"]) > 0, _sign(v["over_linear_interval"])
    why = "so is q*" if gains else f"q* is measurably nearer to it and loses at most {SMALL:.0%} of its lead"
    than_linear = "measurably better than" if line > 0 else "not measurably better or worse than"
    linear = f"{than_linear} linear mixtures at the same distance"
    teacher = "measurably worse" if _sign(v["teacher_lead_interval"]) < 0 else "not measurably better"
    return {
        "yes": "Worth it: q* samples measurably better than the student" + f", and {linear}" * v["linear_compared"],
        "mixing": f"Worth it to mix: the teacher is measurably better than the student, and {why}"
        + f"; q* is {linear}" * v["linear_compared"],
        "undecided": "Undecided: the teacher is measurably better than the student, but q* is not measurably better or worse",
        "linear": "Not worth it with q*: linear mixtures are measurably better at the same distance",
        "no": "Not worth it: q* samples measurably worse than the student",
        "no lead": f"The teacher is {teacher} than the student here",
        "no lead, but q*": f"The teacher is {teacher} than the student here, but q* is measurably better",
        "too few": f"Undecided: fewer than {FEWEST} prompts could be judged",
    }[v["worth_it"]]


def sentence(result: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict in words: a headline, and the figures behind it."""
    v, measure = result["verdict"], MEASURES[result["quality"]]
    lead = f"{v['teacher_lead']:+.3f} {measure} ({_between(v['teacher_lead_interval'])})"
    gained = f"{v['student_gain']:+.3f} over the student ({_between(v['student_gain_interval'])})"
    said = [f"The teacher's lead over the student is {lead} on {v['prompts_judged']} prompts."]
    if result["quality"] != "accuracy" and result["arms"][0]["accuracy"] == 0:
        said.insert(0, "No completion has the right answer, so the teacher's log-probability judges.")
    if v["worth_it"].startswith("no lead"):
        said.append(f"q* scores {gained}.")
    elif v["worth_it"] != "too few":
        sides = {1: "measurably above", 0: "not measurably above or below", -1: "measurably below"}
        low, high = v["nearer_share_interval"]
        said += [
            f"q* scores {gained}, and {v['over_linear']:+.3f} over the line through {_line(v)} at the same distance "
            f"({_between(v['over_linear_interval'])}): it is {sides[_sign(v['over_linear_interval'])]} that line.",
            f"KL(q* ‖ teacher) differs from the student's by {-v['nearer_share']:+.0%} (95 %: {-high:+.0%} to {-low:+.0%}), at "
            f"{v['distance_share']:.0%} of the teacher's distance from the student.",
        ]
    return _headline(v), " ".join([*said, UNTRAINED])


def _line(v: dict[str, Any]) -> str:
    return (
        "student, linear mixtures and teacher"
        if v["linear_compared"]
        else "the other arms (no linear mixture at this distance)"
    )


def scoring(result: dict[str, Any]) -> str:
    """Return how completions were judged, and the rule of the verdict."""
    how = result["settings"]["answer_match"]
    judged = (
        f"A completion is right if its answer matches the reference (answer_match={how})."
        if result["quality"] == "accuracy"
        else "No completion could be called right, so quality is the mean of log π_t per token, with the teacher's prompt."
    )
    return (
        f"{judged} Mixing is worth it if the teacher is better than the student and q* is, too; or if q* is more than "
        f"{SMALL:.0%} nearer to the teacher, scores no less than the student, and loses at most {SMALL:.0%} of the teacher's "
        "lead. q* itself is worth it if it is better than the student and than linear mixtures at the same distance. All by "
        "95 % intervals over prompts."
    )


def what_would_change(result: dict[str, Any]) -> str:
    """Return what would give another verdict."""
    return f"Another verdict would need {_change(result['verdict'])}."


def _change(v: dict[str, Any]) -> str:
    gain, line = _sign(v["student_gain_interval"]), _sign(v["over_linear_interval"])
    other_alpha = "other values of alpha_method, alpha_min or alpha_max"
    match v["worth_it"]:
        case "yes":
            undrawn = "linear mixtures at its distance (linear_weights)"
            linear = "a linear mixture that is as good at the same distance" if v["linear_compared"] else undrawn
            return f"{linear}, or an interval that reaches zero on other prompts"
        case "mixing":
            over_linear = v["linear_compared"] and line == 0
            zeros = ["the student"] * (gain == 0) + ["linear mixtures at the same distance"] * over_linear
            return f"more prompts (limit): the interval of q* over {' and over '.join(zeros)} contains zero"
        case "undecided":
            below = f", or, as q* is measurably below the line through {_line(v)}, {other_alpha}" * (line < 0)
            return f"{_prompts_to_decide(v)}{below}"
        case "linear":
            return other_alpha
        case "no":
            at = f"at {v['distance_share']:.0%} of this one's distance q* samples measurably worse"
            return f"another teacher, another prompt for it, or {other_alpha}: {at}"
        case "too few":
            return f"at least {FEWEST} prompts, better 100"
    more = ", or more prompts: the interval of its lead contains zero" * (_sign(v["teacher_lead_interval"]) == 0)
    return f"a teacher that is better here (a larger one, or one that reads the answer){more}"


def _prompts_to_decide(v: dict[str, Any]) -> str:
    """Return how many prompts would decide if the estimates stayed and intervals shrank with the root of the prompts."""
    gain, (low, high) = v["student_gain"], v["student_gain_interval"]
    width, enough = (high - gain, -gain) if gain < 0 else (gain - low, gain + _nearer(v) * SMALL * v["teacher_lead"])
    if not enough > 0:
        return "a q* that differs from the student: their scores are the same"
    prompts = v["prompts_judged"] * max(width / enough, 1) ** 2
    rounded = math.ceil(prompts / (step := 10 ** max(math.floor(math.log10(prompts)) - 1, 0))) * step
    return f"about {rounded} prompts (limit) if q* stays at {gain:+.3f} over the student"


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
