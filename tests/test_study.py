"""Tests of studies/quality: its tasks, every arm at toy size, resuming, the tables, and errors planted in each."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest

from studies.quality import models, report, results, run, runs, tasks
from studies.quality.arms import ARMS, check_sampled_as, mixing_at
from studies.quality.runs import Run
from studies.quality.tasks import SPLITS, TASKS, Task, check_unseen, last_line_is_right

TIMES = {"date", "commit", "seconds", "hardware"}  # differ between equal runs


def echo_rows(split):
    draw = random.Random(split)
    while True:
        words = " ".join(f"w{draw.randint(7, 63)}" for _ in range(4))
        yield {"message": f"user {words}", "answer": words}


ECHO = Task(name="echo", system="w8 w9", make=echo_rows, right=last_line_is_right, max_new_tokens=6)


@pytest.fixture(autouse=True)
def toy_tasks(monkeypatch):
    monkeypatch.setitem(TASKS, "echo", ECHO)
    monkeypatch.setitem(TASKS, "long_echo", dataclasses.replace(ECHO, name="long_echo", shown=0))
    monkeypatch.setitem(run.STUDIES, "privileged", ("echo",))
    monkeypatch.setitem(run.STUDIES, "capacity", ("long_echo",))
    monkeypatch.setattr(models, "TASK", "long_echo")


# -- the tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bookings", "sums", "shifts", "long_sums"])
def test_tasks_measure_rows_that_training_does_not_have(name):
    task = TASKS[name]
    train, validation, held_out = (task.columns(task.rows(split)) for split in SPLITS)
    assert [len(part) for part in (train, validation, held_out)] == list(SPLITS.values())
    assert len(held_out) >= 400
    check_unseen(train, validation + held_out)
    check_unseen(validation, held_out)
    assert task.rows("held_out", 5) == task.rows("held_out")[:5]  # the same in every process
    for row in held_out:
        assert task.right(row["answer"], row["answer"])
        assert not task.right(row["answer"][:-2], row["answer"])
        assert row["answer"] not in json.dumps(row["prompt"])
        assert (row["teacher_prompt"] == row["prompt"]) is (task.shown == 0)


def test_held_out_values_of_bookings_and_names_of_shifts_are_new():
    for task, keys in (("bookings", ("guest", "city", "date")), ("shifts", ("name",))):
        rows = {split: TASKS[task].rows(split) for split in ("train", "held_out")}
        for key in keys:
            train, held_out = (
                {json.loads(row["answer"])[key] for row in part}
                if task == "bookings"
                else {line.split()[-1] for row in part for line in row["answer"].splitlines()}
                for part in rows.values()
            )
            assert not train & held_out, (task, key)


@pytest.mark.parametrize("part", ["message", "answer"])
def test_a_held_out_row_in_training_is_found(part):
    train, held_out = (TASKS["sums"].rows(split) for split in ("train", "held_out"))
    train[3] = {**train[3], part: held_out[7][part]}
    columns = TASKS["sums"].columns
    with pytest.raises(RuntimeError, match="measured row 7 is in the training data"):
        check_unseen(columns(train), columns(held_out))


# -- single runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_pair):
    with runs.start_engine(str(tiny_pair[0]), str(tiny_pair[1])) as engine:
        yield engine


SMALL = {"learning_rate": 1e-2, "steps": 2, "batch": 4, "limit": 6, "validation": 3, "points": 2, "cross_check": 1}


def small(arm, seed=0, **fields):
    return Run(**{**SMALL, "task": "echo", "loss": "forward", "arm": arm, "seed": seed, **fields})


def without_times(result):
    if isinstance(result, dict):
        return {key: without_times(value) for key, value in result.items() if key not in TIMES}
    return [without_times(item) for item in result] if isinstance(result, list) else result


@pytest.fixture(scope="module")
def arm_results(engine):
    """Results of all arms on one engine, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "echo", ECHO)
        return {arm: runs.execute(small(arm), engine) for arm in ARMS}


def test_every_arm_samples_as_its_options_say(arm_results):
    """`execute` checks every token's record; α is compared here once more."""
    for arm, alpha in {"student": 0, "teacher": 1, "fixed 0.5": 0.5, "linear 0.1": 0.1, "linear 0.5": 0.5, "sft": 1}.items():
        assert arm_results[arm]["steps"]["alpha"] == pytest.approx([alpha] * 2, abs=1e-6), arm
    assert arm_results["q* annealed"]["steps"]["alpha"][1] <= 0.5
    results.check_distinct(arm_results.values())
    results.check_comparable(arm_results.values())


def test_arms_differ_in_their_own_options_alone(arm_results):
    for arm, result in arm_results.items():
        own = result["configuration"]
        shared = {name: value for name, value in own.items() if name not in ARMS[arm]}
        reference = arm_results["q*"]["configuration"]
        assert shared == reference, arm
        assert result["run"] == dataclasses.asdict(small(arm))


def test_a_result_has_the_curve_and_what_is_lost_elsewhere(arm_results):
    result = arm_results["q*"]
    assert [point["step"] for point in result["curve"]] == [0, 2]
    assert result["curve"][-1]["tokens"] == sum(result["steps"]["tokens"])
    assert result["curve"][-1]["seconds"] == pytest.approx(sum(result["steps"]["seconds"]), abs=1e-3)
    assert result["curve"][0] | {"seconds": 0} == arm_results["teacher"]["curve"][0] | {"seconds": 0}
    assert result["curve"][-1]["kl_teacher"] != result["curve"][0]["kl_teacher"]
    assert result["elsewhere"]["after"] != result["elsewhere"]["before"]
    assert "/" not in json.dumps(result["configuration"])


def test_a_run_does_not_depend_on_those_before_it(engine, arm_results):
    again = runs.execute(small("student"), engine)
    assert without_times(again) == without_times(arm_results["student"])


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("q*", "q* prefix")])
def test_arms_that_share_a_sampler_are_found(engine, monkeypatch, arm):
    """The planted error: the engine keeps the mixing of another arm."""
    engine.set_mixing(mixing_at("q*", 0, 2))
    monkeypatch.setattr(engine, "set_mixing", lambda mixing: None)
    with pytest.raises(RuntimeError, match="were not sampled as"):
        runs.execute(small(arm), engine)


def test_records_of_another_mixture_are_found(engine):
    """Each mixing's records pass its own check and fail all others."""
    mixings = {arm: mixing_at(arm, 1, 2) for arm in ARMS if arm not in ("q* prefix", "sft")}
    rows = ECHO.rows("train", 8)
    for arm, mixing in mixings.items():
        engine.set_mixing(mixing)
        records = [c.record for c in runs.complete(engine, ECHO, rows, {"seed": 1}, None)]
        check_sampled_as(mixing, records)
        # An annealed α is in q*'s bounds, and balances the KLs where it is inside its own.
        for other in mixings.keys() - {arm, *({"q*"} if arm == "q* annealed" else ())}:
            with pytest.raises(RuntimeError, match="were not sampled as"):
                check_sampled_as(mixings[other], records)


def test_an_ignored_seed_is_found(engine, arm_results, monkeypatch):
    other = runs.execute(small("q*", seed=1), engine)
    results.check_distinct([arm_results["q*"], other])
    make = runs.make_trainer
    monkeypatch.setattr(runs, "make_trainer", lambda run, *rest: make(dataclasses.replace(run, seed=0), *rest))
    ignored = runs.execute(small("q*", seed=1), engine)
    with pytest.raises(RuntimeError, match="two runs have the same losses"):
        results.check_distinct([arm_results["q*"], ignored])


def test_held_out_rows_in_training_stop_a_run(engine, monkeypatch):
    leaky = ECHO.rows
    monkeypatch.setattr(Task, "rows", lambda self, split, limit=None: leaky("held_out" if split == "train" else split, limit))
    with pytest.raises(RuntimeError, match="is in the training data"):
        runs.execute(small("q*"), engine)


def test_rows_that_differ_between_runs_are_found(arm_results):
    other = json.loads(json.dumps(arm_results["teacher"]))
    other["data"]["held_out"]["digest"] = "another"
    with pytest.raises(RuntimeError, match="have different rows"):
        results.check_comparable([arm_results["q*"], other])
