"""Tests of the demo: its task and data, its report page, and a run of a few steps."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import pytest

from examples import bookings, report
from tests.made_data import ANSWER, demo_metrics

ROOT = Path(__file__).parent.parent
WRITTEN_DATE = re.compile(
    r"(the )?\d{1,2}(st|nd|rd|th)? (of )?[A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}(st|nd|rd|th)?, \d{4}", re.I
)

# -- the task -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion",
    [
        ANSWER,
        ANSWER.replace(" ", "").replace("KateMurphy", "Kate Murphy"),
        f"\n{ANSWER}\n",
        json.dumps(json.loads(ANSWER), indent=2),
    ],
)
def test_right_completions_score(completion):
    assert bookings.score(completion, ANSWER)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        ANSWER[:-1],
        ANSWER.replace("2026-08-03", "2026-08-30"),
        ANSWER.replace("2026-08-03", "3 August 2026"),
        ANSWER.replace("Kate Murphy", "kate murphy"),
        ANSWER.replace('"guest"', '"name"'),
        ANSWER.replace("}", ', "nights": "2"}'),
        f"Here it is: {ANSWER}",
        f"```json\n{ANSWER}\n```",
        f"[{ANSWER}]",
        '{"guest": ["Kate Murphy"], "city": "London", "date": "2026-08-03"}',
        "null",
    ],
)
def test_wrong_completions_do_not_score(completion):
    assert not bookings.score(completion, ANSWER)


def test_measure_counts_form_and_values_separately():
    rows = [{"message": "", "answer": ANSWER}] * 3
    counts = bookings.measure([ANSWER, ANSWER.replace("03", "30"), f"It is {ANSWER}."], rows)
    assert counts == {"correct": 1, "valid_json": 2, "values_anywhere": 2, "total": 3}


def test_only_the_teacher_prompt_holds_the_answer():
    for row in bookings.load("train") + bookings.load("held_out"):
        student, teacher = (json.dumps(prompt(row)) for prompt in (bookings.student_prompt, bookings.teacher_prompt))
        when = json.loads(row["answer"])["date"]
        assert when not in student
        assert when in teacher


def fields(name, key):
    return {json.loads(row["answer"])[key] for row in bookings.load(name)}


def sentence(row):
    """Return the message with placeholders for guest, city and date."""
    answer = json.loads(row["answer"])
    text = row["message"].replace(answer["guest"], "GUEST").replace(answer["city"], "CITY")
    return WRITTEN_DATE.sub("DATE", text).lower()


@pytest.mark.parametrize("key", ["guest", "city", "date"])
def test_held_out_values_are_not_in_training_data(key):
    assert not fields("train", key) & fields("held_out", key)


def test_held_out_sentences_are_not_in_training_data():
    train, held_out = ({sentence(row) for row in bookings.load(name)} for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (20, 8)
    assert not train & held_out


def read_date(message):
    text = WRITTEN_DATE.search(message)[0]
    day, month, year = re.search(r"\d{1,2}", text)[0], re.search(r"[A-Z][a-z]{2,}", re.sub("(?i)the ", "", text))[0], text[-4:]
    return datetime.strptime(f"{day} {month} {year}", "%d %B %Y").date()


def test_every_message_contains_its_answer():
    for row in bookings.load("train") + bookings.load("held_out"):
        answer = json.loads(row["answer"])
        assert answer["guest"] in row["message"]
        assert answer["city"] in row["message"]
        assert read_date(row["message"]) == date.fromisoformat(answer["date"])


# -- the page -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics():
    return demo_metrics()


def test_page_shows_the_numbers(metrics):
    page = report.render(metrics)
    for text in (
        "5%",
        "73%",
        "3 of 64",
        "47 of 64",
        "after 2 steps",
        "322 s",
        "a-model",
        "torch 9.8.7",
        ">63<",
        ">51<",
        ">31<",
    ):
        assert text in page, text
    assert page.count("<svg") == 3
    assert page.count('<span class="tok') == 4
    for line in ("α       0.250", "log q*  -0.500", "log π_θ -1.250", "log π_t -0.125"):
        assert page.count(line) == 4, line


def test_page_is_self_contained_and_escaped(metrics):
    page = report.render(metrics)
    assert not re.search(r"<script|<link|<img|\ssrc=|url\(http|@import", page)
    assert "<b>M" not in page
    assert "&lt;b&gt;M&amp;M" in page
    assert "&lt;|im_end|&gt;" in page


def test_tokens_are_coloured_by_alpha():
    assert "--student" in report.shade(0.1)
    assert "--teacher" in report.shade(0.9)
    assert report.shade(0.5).endswith("* 0.000))")
    assert len({report.shade(alpha / 20) for alpha in range(21)}) == 21


def test_files_are_complete_and_strict_json(metrics, tmp_path):
    report.write(metrics, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "index.html"}
    read = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert read["after"] == metrics["after"]
    assert read["history"][0]["osd/q/kl_teacher"] is None


def test_failed_page_leaves_no_metrics(metrics, tmp_path):
    del metrics["probes"]
    with pytest.raises(Exception, match="probes"):
        report.write(metrics, tmp_path)
    assert not list(tmp_path.iterdir())


def test_terminal_shows_the_numbers(metrics, tmp_path, capsys):
    report.show(metrics, tmp_path, report.Console(width=120))
    out = capsys.readouterr().out
    for text in ("3/64", "47/64", "31/64", "after, student", "73%", "2 steps, 322 seconds", "<b>M&M</b>"):
        assert text in out, text


# -- the whole run ------------------------------------------------------------------------------------------------------


def run_demo(*flags):
    # The command of `make demo`, with this checkout first on the path.
    command = [sys.executable, "examples/demo.py", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_demo_runs_end_to_end(smollm2, tmp_path):
    (tmp_path / "metrics.json").write_text("an earlier run's")
    done = run_demo("--steps", 2, "--limit", 3, "--model", smollm2, "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "index.html", "student"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["before"] == 0
    assert metrics["after"] * 3 in (0, 1, 2, 3)
    assert metrics["counts"]["after"]["total"] == 3
    assert metrics["seconds"] == pytest.approx(sum(metrics["timing"].values()), abs=1)
    assert {"torch", "trl", "transformers"} <= set(metrics["versions"])
    assert len(metrics["history"]) == len(metrics["step_seconds"]) == 2
    for entry in metrics["history"]:
        assert math.isfinite(entry["loss"])
        assert 0 < entry["osd/alpha/mean"] < 1
        assert entry["osd/q/kl_student"] == pytest.approx(entry["osd/q/kl_teacher"], rel=0.05)
    assert [(probe["step"], probe["arm"]) for probe in metrics["probes"]] == [
        (0, "student alone"),
        (0, ""),
        (0, "teacher alone"),
        (1, ""),
        (2, ""),
    ]
    student, mixed, teacher = (probe["tokens"] for probe in metrics["probes"][:3])
    assert {token["alpha"] for token in student} == {0.0}
    assert {token["alpha"] for token in teacher} == {1.0}
    [other] = metrics["others"]  # the on-policy arm starts from the same student and draws from it alone
    assert other["arm"] == "student"
    assert {entry["osd/alpha/max"] for entry in other["history"]} == {0.0}
    assert other["counts"]["before"] == metrics["counts"]["before"]
    assert (tmp_path / "student" / "model.safetensors").is_file()
    # log q* is the normalised mixture, so it is at least the weighted mean of the two log-probabilities.
    for token in mixed:
        mean = (1 - token["alpha"]) * token["logp_theta"] + token["alpha"] * token["logp_teacher"]
        assert token["logq"] >= mean - 1e-3
    assert "2 steps" in done.stdout
    asked = subprocess.run(shlex.split(done.stdout.splitlines()[-1]), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert asked.stdout.strip(), asked.stderr


@pytest.mark.slow
def test_failed_run_leaves_no_metrics(tmp_path):
    output, model = tmp_path / "output", tmp_path / "not-a-model"
    output.mkdir()
    model.mkdir()
    (output / "metrics.json").write_text("an earlier run's")
    done = run_demo("--model", model, "--output", output)
    assert done.returncode != 0
    assert "is not the SmolLM2 checkpoint" in done.stderr
    assert not list(output.iterdir())
