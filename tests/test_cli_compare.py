"""`osd compare`: the arms, the figures of their tokens, and the verdict."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from osd import cli
from osd.core import RECORD_FIELDS
from osd.data import comparison, verdict
from osd.data.comparison import compare, sentence
from osd.data.generate import NothingUsable
from osd.data.settings import CompareConfig
from tests.fake_pair import FakePair
from tests.tiny import tiny_engine_kwargs

ROWS = [{"question": f"w{i} w{i + 1}", "answer": f"w{i % 7 + 20}"} for i in range(7, 23)]


def config(tmp_path, rows=ROWS, **given):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(
        model_name_or_path="student",
        teacher_model_name_or_path="teacher",
        prompt_column="question",
        privileged_template="{prompt} {answer}",
        max_completion_length=8,
        input=str(path),
        output=str(tmp_path / "out"),
    )
    return CompareConfig(**{**settings, **given})


# -- the verdict, on figures made up for it -----------------------------------------------------------------------------


def made_up(worth, far, *, prompts=400, accuracy=True, noise=0.3, seed=0):
    """Scores of samples of one token each whose arms have these means; the arms share each prompt's luck."""
    chance = np.random.default_rng(seed)
    luck, spread = chance.random(prompts), chance.normal(0, noise, prompts)
    return comparison._scores(made_samples(worth, far, luck, spread, accuracy=accuracy))


def made_samples(worth, far, luck, spread, *, accuracy=True):
    return {
        name: [
            {
                "id": f"row{i}",
                "num_tokens": 1,
                "logp_theta": [-1.0],
                "logp_teacher": [worth[name] + spread[i]],
                "kl_theta": [far[name]],
                "kl_teacher": [TO_TEACHER[name]],
                "alpha": [0.5],
                "finish_reason": "stop",
                "answer": "42" if accuracy else None,
                "completion": "42" if luck[i] < worth[name] else "41",
            }
            for i in range(len(luck))
        ]
        for name in worth
    }


TO_TEACHER = {"student": 0.4, "linear 0.25": 0.35, "linear 0.5": 0.3, "linear 0.75": 0.3, "q*": 0.3, "teacher": 0.0}
FAR = {"student": 0.0, "linear 0.5": 0.5, "q*": 0.2, "teacher": 1.0}
NEAR = FAR | {"linear 0.5": 0.2}
HEADLINES = {
    "yes": "Worth it: q*",
    "mixing": "Worth it to mix: the teacher",
    "undecided": "Undecided: the teacher",
    "linear": "Not worth it with q*: linear",
    "no": "Not worth it: q* samples measurably worse",
    "no lead": "The teacher is ",
    "no lead, but q*": "The teacher is not measurably better than the student here, but q* is measurably better",
    "too few": "Undecided: fewer than 10 prompts",
}


@pytest.mark.parametrize(
    ("expected", "worth", "far"),
    [
        ("yes", {"student": 0.2, "linear 0.5": 0.5, "q*": 0.6, "teacher": 0.8}, FAR),
        ("yes", {"student": 0.2, "linear 0.5": 0.5, "q*": 0.9, "teacher": 0.8}, FAR),
        ("yes", {"student": 0.2, "q*": 0.6, "teacher": 0.8}, FAR),
        ("yes", {"student": 0.2, "q*": 0.25, "teacher": 0.9}, FAR),  # below the line, on which no linear mixture is
        ("mixing", {"student": 0.0, "q*": 0.0, "teacher": 0.6}, FAR),
        ("mixing", {"student": 0.0, "linear 0.5": 0.0, "q*": 0.0, "teacher": 0.6}, FAR),  # half-way, no answer is right yet
        ("mixing", {"student": 0.2, "linear 0.5": 0.6, "q*": 0.6, "teacher": 0.8}, NEAR),
        ("mixing", {"student": 0.5, "linear 0.5": 0.2, "q*": 0.5, "teacher": 0.8}, NEAR),  # above the line, not the student
        ("undecided", {"student": 0.5, "linear 0.5": 0.5, "q*": 0.497, "teacher": 0.8}, NEAR),
        ("undecided", {"student": 0.5, "q*": 0.497, "teacher": 0.8}, FAR),
        ("linear", {"student": 0.2, "linear 0.5": 0.8, "q*": 0.6, "teacher": 0.8}, NEAR),
        ("linear", {"student": 0.2, "linear 0.5": 0.78, "q*": 0.3, "teacher": 0.8}, FAR | {"linear 0.5": 0.4}),
        ("no", {"student": 0.4, "linear 0.5": 0.5, "q*": 0.2, "teacher": 0.8}, FAR),
        ("no lead", {"student": 0.5, "linear 0.5": 0.5, "q*": 0.5, "teacher": 0.5}, FAR),
        ("no lead", {"student": 0.6, "linear 0.5": 0.5, "q*": 0.5, "teacher": 0.4}, FAR),
        ("yes", {"student": 0.2, "linear 0.5": 0.5, "q*": 0.9, "teacher": 0.8}, FAR | {"q*": 1.4}),  # further than any mixture
        ("no lead, but q*", {"student": 0.5, "linear 0.5": 0.5, "q*": 0.8, "teacher": 0.5}, FAR),
    ],
)
def test_the_verdict(expected, worth, far):
    result = made_up(worth, {name: far[name] for name in worth})
    assert result["quality"] == "accuracy"
    assert result["verdict"]["worth_it"] == expected
    headline, reasons = sentence(result)
    assert headline.startswith(HEADLINES[expected])
    assert ("linear mixtures" in headline) is (result["verdict"]["linear_compared"] and expected in ("yes", "mixing", "linear"))
    assert "400 prompts" in reasons
    assert "No student was trained" in reasons


def test_the_verdict_on_the_teachers_log_probability():
    worth = {"student": -2.0, "linear 0.5": -1.2, "q*": -1.4, "teacher": -1.0}
    assert made_up(worth, NEAR, accuracy=False)["verdict"]["worth_it"] == "linear"
    assert made_up(worth | {"linear 0.5": -1.7}, NEAR, accuracy=False)["verdict"]["worth_it"] == "yes"


def test_further_arms_do_not_change_the_verdict(tmp_path):
    wide = comparison.Arm(name="fixed 0.9", alpha=0.9)
    one, more = (compare(config(tmp_path, answer_column="answer"), FakePair, further) for further in ((), [wide]))
    assert [row["arm"] for row in more["arms"]] == [*(row["arm"] for row in one["arms"]), "fixed 0.9"]
    assert more["arms"][:-1] == one["arms"]
    assert more["verdict"] == one["verdict"]


def test_few_prompts_decide_nothing():
    worth = {"student": 0.0, "linear 0.5": 0.0, "q*": 1.0, "teacher": 1.0}
    result = made_up(worth, FAR, prompts=9)
    assert result["verdict"]["worth_it"] == "too few"
    assert sentence(result)[0].startswith(HEADLINES["too few"])
    assert made_up(worth, FAR, prompts=40)["verdict"]["worth_it"] == "yes"


def test_equal_arms_rarely_win():
    """Of 40 comparisons in which q* equals three mixtures, a verdict for or against q* is a false alarm."""
    worth = {"student": 0.2, **{f"linear {w}": 0.6 for w in (0.25, 0.5, 0.75)}, "q*": 0.6, "teacher": 0.8}
    far = dict.fromkeys(worth, 0.2) | {"student": 0.0, "teacher": 1.0}
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(40):
        drawn = luckless(worth, far, rng, prompts=100)
        false += comparison._scores(drawn)["verdict"]["worth_it"] in ("linear", "yes")
    assert false <= 6  # 5 % of 40 are 2; more than 6 is a chance of 4e-3


def luckless(worth, far, rng, prompts):
    """Samples as of `made_up`, each arm with luck of its own."""
    arms = {name: made_samples({name: worth[name]}, far, rng.random(prompts), rng.normal(0, 0.3, prompts)) for name in worth}
    return {name: samples[name] for name, samples in arms.items()}


def test_no_right_answer_of_eight_has_a_wilson_interval():
    result = made_up({"student": 0.0, "linear 0.5": 0.5, "q*": 0.5, "teacher": 1.0}, FAR, prompts=8)
    [student, *_, teacher] = result["arms"]
    low, high = student["accuracy_interval"]
    assert (low, high) == pytest.approx((0, 0.3244), abs=1e-3)
    assert teacher["accuracy_interval"] == pytest.approx([1 - 0.3244, 1], abs=1e-3)
    assert teacher["finished_interval"] == pytest.approx([1 - 0.3244, 1], abs=1e-3)


def test_equal_samples_of_a_prompt_count_once():
    """Four equal samples of each of 25 prompts say as much as one of each; four independent ones say more."""

    def width(agree):
        rng = np.random.default_rng(0)
        right = np.repeat(rng.random((25, 1)), 4, axis=1) if agree else rng.random((25, 4))
        sums = np.zeros((25, len(verdict.SUMS)))
        sums[:, verdict.SUMS.index("correct")], sums[:, verdict.SUMS.index("scored")] = (right < 0.5).sum(axis=1), 4
        low, high = verdict._share_interval(sums, "correct", "scored")
        return high - low

    assert width(agree=True) == pytest.approx(0.36, abs=0.02)
    assert width(agree=False) < 0.25


def test_the_shares_are_those_of_the_table():
    worth = {"student": 0.2, "linear 0.5": 0.4, "q*": 0.6, "teacher": 0.8}
    result = made_up(worth, FAR)
    got = {row["arm"]: row for row in result["arms"]}
    verdict = result["verdict"]
    assert verdict["student_gain"] == pytest.approx(got["q*"]["accuracy"] - got["student"]["accuracy"])
    assert verdict["nearer_share"] == pytest.approx(0.25)
    assert verdict["distance_share"] == pytest.approx(0.2)
    on_the_line = got["student"]["accuracy"] + 0.4 * (got["linear 0.5"]["accuracy"] - got["student"]["accuracy"])
    assert verdict["over_linear"] == pytest.approx(got["q*"]["accuracy"] - on_the_line)


def test_intervals_cover_the_true_accuracy():
    """Of 60 made-up comparisons, 95 % intervals should hold the true accuracy in 57; fewer than 51 is a chance of 1e-3."""
    worth = {"student": 0.3, "linear 0.5": 0.4, "q*": 0.5, "teacher": 0.6}
    held = 0
    for seed in range(60):
        row = next(row for row in made_up(worth, FAR, prompts=100, seed=seed)["arms"] if row["arm"] == "q*")
        held += row["accuracy_interval"][0] <= 0.5 <= row["accuracy_interval"][1]
    assert 51 <= held <= 60


@pytest.mark.parametrize("worth", [-1.0, 0.0])
def test_without_right_answers_the_teacher_judges(worth):
    arms = dict.fromkeys(FAR, worth) | {"teacher": worth + 0.5, "q*": worth + 0.4}
    for accuracy in (True, False):  # no answer right tells nobody apart, and neither do no answers
        result = made_up({name: min(value, 0.0) - 1 for name, value in arms.items()}, FAR, accuracy=accuracy)
        assert result["quality"] == "logp_teacher"
        assert ("No completion has the right answer" in sentence(result)[1]) is accuracy


# -- the run, without models --------------------------------------------------------------------------------------------


def test_the_files_and_their_figures(tmp_path):
    settings = config(tmp_path, num_samples=2, answer_column="answer")
    result = compare(settings, FakePair)
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["arm"] for row in written["arms"]] == ["student", "linear 0.25", "linear 0.5", "linear 0.75", "q*", "teacher"]
    assert (written["prompts"], written["samples"], written["rejected"]) == (len(ROWS), 2 * len(ROWS), [])
    assert written["config_hash"] == result["config_hash"]
    for row in written["arms"]:
        data = pd.read_parquet(tmp_path / "out" / f"completions-{comparison.file_name(row['arm'])}.parquet")
        every = {name: np.concatenate(data[name]) for name in RECORD_FIELDS}
        for name in ("alpha", "kl_theta", "kl_teacher", "logp_theta", "logp_teacher"):
            assert row[name] == pytest.approx(every[name].mean(), rel=1e-5)
        assert row["perplexity_student"] == pytest.approx(math.exp(-every["logp_theta"].mean()), rel=1e-5)
        assert row["perplexity_teacher"] == pytest.approx(math.exp(-every["logp_teacher"].mean()), rel=1e-5)
        assert row["length"] == data["num_tokens"].mean()
        assert row["finished"] == (data["finish_reason"] == "stop").mean()
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "compare.html").read_text()
    for row in written["arms"]:
        assert page.count(row["arm"]) >= 2
    assert sentence(result)[0] in page
    for text in ("Another verdict would need", "linear mixtures at the distance of q*", "student reads", "teacher reads"):
        assert text in page, text
    assert first_teacher_prompt(tmp_path / "out") in page
    assert not re.search(
        r'(?:src|href)="|url\((?!#)|@import|https?://(?!www\.w3\.org)', page.replace("xlink:href", "").replace('href="#', "")
    )


def first_teacher_prompt(folder):
    [first, *_] = pd.read_parquet(folder / "completions-student.parquet")["teacher_prompt"]
    return html.escape(first)


def test_the_linear_row_lies_on_the_line_through_the_other_arms():
    result = made_up({"student": 0.2, "linear 0.5": 0.5, "q*": 0.6, "teacher": 0.8}, FAR)
    low, high = (next(row for row in result["arms"] if row["arm"] == name) for name in ("student", "linear 0.5"))
    expected = low["accuracy"] + (high["accuracy"] - low["accuracy"]) * 0.2 / 0.5  # q* is at 0.2, the two at 0 and 0.5
    assert verdict.linear_at_same_distance(result) == pytest.approx(expected)


# Every claim that the headline, the side of the line and the change may make, and when it is true of the numbers.
LEAD, GAIN, LINE = "teacher_lead_interval", "student_gain_interval", "over_linear_interval"
CLAIMS = {
    r"teacher is measurably better than the student": lambda v: v[LEAD][0] > 0,
    r"teacher is not measurably better than the student here": lambda v: v[LEAD][0] <= 0 <= v[LEAD][1],
    r"teacher is measurably worse than the student here": lambda v: v[LEAD][1] < 0,
    r"and so is q\*|(samples|but q\* is) measurably better": lambda v: v[GAIN][0] > 0,
    r"samples measurably worse": lambda v: v[GAIN][1] < 0,
    r"but q\* is not measurably better or worse(?! than)": lambda v: v[GAIN][0] <= 0 <= v[GAIN][1],
    r"q\* is measurably nearer to it": lambda v: v["nearer_share_interval"][0] > 0.1,
    r"loses at most 10% of its lead": lambda v: v[GAIN][0] >= -0.1 * v["teacher_lead"] and v["student_gain"] >= 0,
    r"(and|q\* is) measurably better than linear mixtures at the same": lambda v: v["linear_compared"] and v[LINE][0] > 0,
    r"not measurably better or worse than linear": lambda v: v["linear_compared"] and v[LINE][0] <= 0 <= v[LINE][1],
    r"linear mixtures are measurably better": lambda v: v["linear_compared"] and v[LINE][1] < 0,
    r"it is measurably above": lambda v: v[LINE][0] > 0,
    r"it is not measurably above or below": lambda v: v[LINE][0] <= 0 <= v[LINE][1],
    r"is measurably below the line|it is measurably below": lambda v: v[LINE][1] < 0,
    r"(over|and over) the student (and over linear .*)?contains zero": lambda v: v[GAIN][0] <= 0 <= v[GAIN][1],
    r"over linear mixtures at the same distance contains zero": lambda v: (
        v["linear_compared"] and v[LINE][0] <= 0 <= v[LINE][1]
    ),
    r"interval of its lead contains zero": lambda v: v[LEAD][0] <= 0 <= v[LEAD][1],
    r"(?<!no )linear mixtures? (that|at the|are)|student, linear mixtures": lambda v: v["linear_compared"],
    r"linear mixtures at its|no linear mixture": lambda v: not v["linear_compared"],
    r"Worth it to mix": lambda v: v[LEAD][0] > 0 and v["student_gain"] >= 0 and v[GAIN][0] >= -0.1 * v["teacher_lead"],
    r"Not worth it with": lambda v: v[LINE][1] < 0,
    r"Worth it: q": lambda v: v[LEAD][0] > 0 and v[GAIN][0] > 0 and (not v["linear_compared"] or v[LINE][0] > 0),
    r"their scores are the same": lambda v: v["student_gain"] == 0,
}


def said(v):
    result = {"verdict": v, "quality": "accuracy", "prompts": v["prompts_judged"], "arms": [{"accuracy": 0.5}]}
    headline, reasons = sentence(result)
    return f"{headline}. {reasons.removesuffix(verdict.UNTRAINED)} {verdict.what_would_change(result)}"


def check_claims(v):
    """Raise AssertionError for a claim that contradicts the numbers, or one that `CLAIMS` does not have."""
    text = said(v)
    rest = text
    assert ("fewer than 10" in text) is (v["prompts_judged"] < 10), text
    for claim, holds in CLAIMS.items():
        if re.search(claim, text):
            assert holds(v), (claim, text)
            rest = re.sub(claim, "", rest)
    assert not re.search("measurabl|contains|half-way", rest), rest
    for share in re.findall(r"at (\d+)% of", text):
        assert int(share) == pytest.approx(100 * v["distance_share"], abs=0.5)
    if prompts := re.search(r"about (\d+) prompts", text):
        assert int(prompts[1]) >= v["prompts_judged"]


def outcomes():
    """Numbers of comparisons: every order of the intervals and zero, also where intervals just touch it."""
    spans = [(0.12, 0.02, 0.25), (0.12, 0.0, 0.25), (0.01, -0.01, 0.03), (0.0, -0.01, 0.01), (0.0, -0.13, 0.13)]
    spans += [(-estimate, -high, -low) for estimate, low, high in spans[:3]]
    nearer = [(0.4, 0.35, 0.45), (0.01, 0.005, 0.015), (-0.2, -0.3, -0.1)]
    for lead, gain, line, near, linear, prompts in itertools.product(spans, spans, spans, nearer, (True, False), (9, 100)):
        found = {"linear_compared": linear, "prompts_judged": prompts, "distance_share": max(near[0], 0.01)}
        for name, (estimate, *interval) in {
            "teacher_lead": lead, "student_gain": gain, "over_linear": line, "nearer_share": near
        }.items():  # fmt: skip
            found |= {name: estimate, f"{name}_interval": interval}
        yield {**found, "worth_it": verdict._worth_it(found)}


def test_every_claim_of_the_verdict_follows_from_its_numbers():
    seen = set()
    for v in outcomes():
        check_claims(v)
        seen.add(v["worth_it"])
    assert seen == set(HEADLINES)


# What a planted verdict says is also true of some numbers of these other verdicts.
ALSO_TRUE = {
    "undecided": {"mixing", "linear"},
    "linear": {"no", "no lead", "no lead, but q*"},
    "no": {"no lead"},
    "no lead": {"no lead, but q*"},
}


@pytest.mark.parametrize("planted", HEADLINES)
def test_a_planted_verdict_contradicts_the_numbers(planted):
    skipped = {planted} | ALSO_TRUE.get(planted, set())
    for v in outcomes():
        if v["worth_it"] not in skipped:
            with pytest.raises(AssertionError):
                check_claims(v | {"worth_it": planted})


def test_the_prompts_that_would_decide():
    """An interval shrinks with the root of the prompts: half as wide with four times as many."""
    v = {"worth_it": "undecided", "prompts_judged": 100, "teacher_lead": 0.3, "linear_compared": True}
    v |= {"student_gain": -0.05, GAIN: [-0.15, 0.05], LINE: [-0.1, 0.1], "nearer_share_interval": [0.3, 0.4]}
    assert "about 400 prompts" in verdict._change(v)
    equal = {"student_gain": 0.0, GAIN: [-0.06, 0.06]}
    assert "about 400 prompts" in verdict._change(v | equal)  # a loss of 0.03 is a tenth of the lead
    assert "their scores are the same" in verdict._change(v | equal | {"nearer_share_interval": [0.0, 0.1]})


def test_completions_are_escaped(tmp_path):
    class Hostile(FakePair):
        def _completion(self, *args):
            completion = super()._completion(*args)
            completion.text = "<script>alert(1)</script>"
            return completion

    compare(config(tmp_path), Hostile)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page


def test_bad_rows_and_failed_completions_are_left_out_of_every_arm(tmp_path):
    rows = [*ROWS[:5], {"question": "", "answer": "w8"}, {"question": "w9 " * 50, "answer": "w9"}]
    seen = []

    class Failing(FakePair):
        def sample(self, requests, *args, **kwargs):
            seen.append([request.row.id for request in requests])
            self.fails = (requests[0].row.id,) if len(seen) == 2 else ()  # one completion of the second arm
            return super().sample(requests, *args, **kwargs)

    result = compare(config(tmp_path, rows), Failing)
    assert [entry["row"] for entry in result["rejected"]] == [5, 6]
    assert "the prompt is empty" in result["rejected"][0]["reason"]
    assert result["prompts"] == result["samples"] == 4
    for path in (tmp_path / "out").glob("completions-*"):
        assert seen[0][0] not in set(pd.read_parquet(path)["id"])


def test_100_rows_are_read_by_default(tmp_path):
    rows = [{"question": f"w{7 + i % 50}", "answer": f"w{i}"} for i in range(130)]
    assert compare(config(tmp_path, rows), FakePair)["prompts"] == 100
    assert compare(config(tmp_path, rows, limit=120), FakePair)["prompts"] == 120


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"linear_weights": [0.5, 1.0]}, "linear_weights: 1.0 is not between 0"),
        ({"linear_weights": 0.5}, "linear_weights=0.5 is not a list"),
        ({"mixture": "linear", "alpha_method": "fixed"}, "would compare the linear mixture with itself"),
        ({"num_samples": 0}, "num_samples=0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


def test_the_progress_bar_names_the_arm_that_is_being_drawn(tmp_path, monkeypatch):
    shown = []

    class Bar(comparison.SampleBar):
        def update(self, n=1):
            shown.append(self.desc)
            return super().update(n)

    monkeypatch.setattr(comparison, "SampleBar", Bar)
    compare(config(tmp_path), FakePair)
    assert [shown[i] for i in range(0, len(shown), len(ROWS))] == [arm.name for arm in comparison.arms(config(tmp_path))]
    assert len(shown) == 6 * len(ROWS)


def test_nothing_usable_fails(tmp_path):
    with pytest.raises(NothingUsable, match="all 1 rows were rejected"):
        compare(config(tmp_path, [{"question": "", "answer": "w8"}]), FakePair)


# -- real models --------------------------------------------------------------------------------------------------------


def test_records_of_real_models_match_each_arm(tmp_path, tiny_pair, capfd):
    """Run the command with tiny models and check the records of every arm."""
    settings = config(tmp_path)
    kwargs = json.dumps(tiny_engine_kwargs(async_scheduling=False))
    flags = ["--teacher_model_name_or_path", tiny_pair[0], "--model_name_or_path", tiny_pair[1], "--engine_kwargs", kwargs]
    flags += ["--input", settings.input, "--output", settings.output, "--prompt_column", "question", "--num_samples", "2"]
    flags += ["--privileged_template", "{prompt} {answer}", "--max_completion_length", "8", "--linear_weights", "0.3"]
    cli.main(["compare", *map(str, flags)])
    assert "compare.html" in capfd.readouterr().out
    arms = {path.stem.removeprefix("completions-"): pd.read_parquet(path) for path in Path(settings.output).glob("*.parquet")}
    assert set(arms) == {"student", "linear-0.3", "q-star", "teacher"}
    every = {arm: {name: np.concatenate(data[name]) for name in RECORD_FIELDS} for arm, data in arms.items()}
    student, teacher, linear, mixed = (every[arm] for arm in ("student", "teacher", "linear-0.3", "q-star"))
    assert set(student["alpha"]) == {0}
    assert student["logp_draw"] == pytest.approx(student["logp_theta"], abs=1e-4)
    assert abs(student["kl_theta"]).max() < 1e-4 < student["kl_teacher"].min()
    assert set(teacher["alpha"]) == {1}
    assert teacher["logp_draw"] == pytest.approx(teacher["logp_teacher"], abs=1e-4)
    assert abs(teacher["kl_teacher"]).max() < 1e-4 < teacher["kl_theta"].min()
    arithmetic = np.log(0.3 * np.exp(linear["logp_teacher"]) + 0.7 * np.exp(linear["logp_theta"]))
    assert linear["logp_draw"] == pytest.approx(arithmetic, abs=1e-4)
    geometric = mixed["alpha"] * mixed["logp_teacher"] + (1 - mixed["alpha"]) * mixed["logp_theta"]
    assert mixed["kl_theta"] == pytest.approx(mixed["kl_teacher"], abs=1e-3)
    assert (mixed["logp_draw"] - geometric > 0.01).mean() > 0.9  # minus log Z: a geometric mean of distributions sums to < 1
    seeds = [set(data["seed"]) for data in arms.values()]
    assert all(some == seeds[0] for some in seeds)
