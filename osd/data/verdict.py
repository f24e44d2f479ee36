"""Scores of the arms of `osd compare`, and the verdict on q*.

Quality is accuracy where there are answers, else the teacher's mean log-probability: it says whether the teacher is better. If
it is, the teacher's log-probability per token judges the arms between student and teacher, and accuracy beside it. Accuracy
alone cannot: a completion is right if all of its tokens are, so half-way per token is far less than half-way in accuracy.
Distance is the mean KL(arm ‖ student) per token. It is no price by itself (docs/evidence.md: arms that are further away trained
no worse); it says which linear mixture q* is compared with.

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
    one = {key: values[None] for key, values in estimates.items()}
    # Each of two measures has its chance to differ by luck.
    measures = sorted({"logp_teacher", quality})
    compared = {measure: (_differences(at, one, measure), _differences(at, resampled, measure)) for measure in measures}

    def of(measure: str, name: str, level: float = 0.05 / len(measures)) -> dict[str, Any]:
        value, many = (found[name] for found in compared[measure])
        return {"value": float(value[0]), "interval": _interval(many, level)}

    lead = of(quality, "lead", 0.05)
    far_A, ratings_A = estimates["kl_theta"], estimates["logp_teacher"]
    student, teacher, mixed = (at[name] for name in ("student", "teacher", "q*"))
    found = {
        "teacher_lead": lead["value"],
        "teacher_lead_interval": lead["interval"],
        "over_student": {measure: of(measure, "over_student") for measure in measures},
        "over_linear": {measure: of(measure, "over_line") for measure in measures},
        "linear_drawn": any(name.startswith("linear ") for name in names),
        "gain_share": _share(ratings_A[mixed] - ratings_A[student], ratings_A[teacher] - ratings_A[student]),
        "distance_share": _share(far_A[mixed], far_A[teacher]),
        "prompts_judged": judged,
    }
    return {**found, "worth_it": _worth_it(found, quality)}


def _differences(at: dict[str, int], figures: dict[str, np.ndarray], measure: str) -> dict[str, np.ndarray]:
    """Return the teacher's lead, and q*'s height over the student and over the line, of R sets of figures."""
    worth_RA, far_RA = figures[measure], figures["kl_theta"]
    student, teacher, mixed = (at[name] for name in ("student", "teacher", "q*"))
    ends = [i for name, i in at.items() if on_line(name)]
    line_R = []
    for worth, far in zip(worth_RA, far_RA, strict=True):
        order = sorted(ends, key=lambda i: far[i])
        line_R.append(np.interp(far[mixed], far[order], worth[order]))
    return {
        "lead": worth_RA[:, teacher] - worth_RA[:, student],
        "over_student": worth_RA[:, mixed] - worth_RA[:, student],
        "over_line": worth_RA[:, mixed] - np.array(line_R),
    }


def on_line(arm: str) -> bool:
    """Return whether an arm is one of those that q* is compared with at its own distance."""
    return arm in ("student", "teacher") or arm.startswith("linear ")


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _worth_it(v: dict[str, Any], quality: str) -> str:
    """Return the outcome: a key of `HEADLINES`."""
    if v["prompts_judged"] < FEWEST:
        return "too few"
    if not v["teacher_lead_interval"][0] > 0:
        return "no lead, but q*" if v["over_student"][quality]["interval"][0] > 0 else "no lead"
    better = _better(v["over_student"])
    if better is not True:
        return "undecided" if better is None else "no"
    if not v["linear_drawn"]:
        return "yes"
    return {True: "yes", None: "mixing", False: "linear"}[_better(v["over_linear"])]


def _better(by_measure: dict[str, dict[str, Any]]) -> bool | None:
    """Return whether q* is better: False if any measure is measurably lower, True if one is higher, else None."""
    intervals = [of["interval"] for of in by_measure.values()]
    if any(high < 0 for _, high in intervals):
        return False
    return True if any(low > 0 for low, _ in intervals) else None


HEADLINES = {
    "yes": "Worth it: q* samples better than the student alone, and better than linear mixtures at the same distance",
    "mixing": "Worth it to mix, undecided how: q* samples better than the student alone, but not measurably better than "
    "linear mixtures at the same distance",
    "linear": "Worth it to mix, but not with q*: linear mixtures are measurably better at the same distance",
    "no": "Not worth it: q* samples worse than the student alone",
    "undecided": "Undecided: q* is not measurably better than the student alone",
    "no lead": "The teacher is not measurably better than the student here",
    "no lead, but q*": "The teacher is not measurably better than the student here, but q* is",
    "too few": f"Undecided: fewer than {FEWEST} prompts could be judged",
}


def sentence(result: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict in words: a headline, and the figures behind it."""
    v, quality = result["verdict"], result["quality"]
    lead = f"{v['teacher_lead']:+.3f} {MEASURES[quality]} ({_between(v['teacher_lead_interval'])})"
    said = [f"The teacher's lead over the student is {lead} on {result['prompts']} prompts."]
    if quality != "accuracy" and result["arms"][0]["accuracy"] == 0:
        said.insert(0, "No completion has the right answer, so the teacher's log-probability judges.")
    if v["worth_it"] == "too few":
        said.append("Give more prompts (100 are read by default).")
    elif v["worth_it"].startswith("no lead"):
        said.append(f"q* scores {_in_words({quality: v['over_student'][quality]})} over the student.")
        if v["worth_it"] == "no lead":
            said.append("There is nothing to gain here, or there are too few prompts to see it.")
    else:
        line = "student, linear mixtures and teacher" if v["linear_drawn"] else "student and teacher (no mixture was drawn)"
        said += [
            f"q* scores {_in_words(v['over_student'])} over the student.",
            f"It has {v['gain_share']:.0%} of the teacher's lead in log π_t at {v['distance_share']:.0%} of its distance.",
            f"Over the line through {line} at the same distance, it scores {_in_words(v['over_linear'])}.",
        ]
    headline = HEADLINES[v["worth_it"]]
    if v["worth_it"] == "yes" and not v["linear_drawn"]:
        headline = headline.partition(",")[0]
    return headline, " ".join([*said, UNTRAINED])


CHANGES = {
    "yes": "a linear mixture that is as good at the same distance, or an interval that reaches zero on other prompts.",
    "mixing": "more prompts: the interval of q* over the linear mixtures still contains zero.",
    "linear": "other values of alpha_method, alpha_min or alpha_max.",
    "no": "another teacher or another prompt for it: half-way to this one, answers get worse.",
    "undecided": "more prompts or samples (limit, num_samples): the interval of q* over the student contains zero.",
    "no lead": "a teacher that is better here: a larger one, or one that reads the answer; or more prompts.",
    "no lead, but q*": "a teacher that is better here: a larger one, or one that reads the answer; or more prompts.",
    "too few": f"at least {FEWEST} prompts, better 100.",
}


def scoring(result: dict[str, Any]) -> str:
    """Return how completions were judged, and the rule of the verdict."""
    how = result["settings"]["answer_match"]
    judged = (
        f"A completion is right if its answer matches the reference (answer_match={how}). If the teacher leads in accuracy, "
        "two measures compare the other arms: accuracy, and mean log π_t per token with the teacher's prompt."
        if result["quality"] == "accuracy"
        else "No completion could be called right, so quality is the mean of log π_t per token, with the teacher's prompt."
    )
    return (
        f"{judged} q* is worth it if it is measurably better than the student, and than linear mixtures at the same distance: "
        "higher in one measure and lower in none, by 95 % intervals over prompts."
    )


def what_would_change(result: dict[str, Any]) -> str:
    """Return what would give another verdict."""
    return "Another verdict would need " + CHANGES[result["verdict"]["worth_it"]]


def linear_at_same_distance(result: dict[str, Any]) -> float:
    """Return the quality of the line through student, linear mixtures and teacher at the distance of q*."""
    [mixed] = [row for row in result["arms"] if row["arm"] == "q*"]
    return float(mixed[result["quality"]]) - float(result["verdict"]["over_linear"][result["quality"]]["value"])


def _in_words(by_measure: dict[str, dict[str, Any]]) -> str:
    return " and ".join(f"{of['value']:+.3f} {MEASURES[name]} ({_between(of['interval'])})" for name, of in by_measure.items())


def _between(interval: Sequence[float]) -> str:
    return f"95 %: {interval[0]:+.3f} to {interval[1]:+.3f}"


def _interval(values: np.ndarray, level: float = 0.05) -> list[float]:
    """Return the interval that leaves out `level` of the values, half on each side; NaN where none is finite."""
    known = values[np.isfinite(values)]
    return [float(np.quantile(known, q)) for q in (level / 2, 1 - level / 2)] if len(known) else [math.nan, math.nan]
