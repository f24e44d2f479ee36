"""Tests of studies/quality: its tasks, every arm at toy size, resuming, the tables, and errors planted in each."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from transformers import AutoTokenizer

from studies.quality import models, report, results, run, runs
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


@pytest.mark.parametrize("name", ["bookings", "shifts", "contacts", "long_sums"])
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


NEW_VALUES = {
    ("bookings", "guest"): lambda answer: {json.loads(answer)["guest"]},
    ("bookings", "city"): lambda answer: {json.loads(answer)["city"]},
    ("bookings", "date"): lambda answer: {json.loads(answer)["date"]},
    ("shifts", "name"): lambda answer: {line.split()[-1] for line in answer.splitlines()},
    ("contacts", "first name"): lambda answer: {answer.split()[1]},
}


@pytest.mark.parametrize(("task", "value"), NEW_VALUES)
def test_held_out_rows_have_new_values(task, value):
    train, held_out = (
        {found for row in TASKS[task].rows(split) for found in NEW_VALUES[task, value](row["answer"])}
        for split in ("train", "held_out")
    )
    assert train
    assert held_out
    assert not train & held_out


@pytest.mark.parametrize("part", ["message", "answer"])
def test_a_held_out_row_in_training_is_found(part):
    train, held_out = (TASKS["shifts"].rows(split) for split in ("train", "held_out"))
    train[3] = {**train[3], part: held_out[7][part]}
    columns = TASKS["shifts"].columns
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


def test_the_floor_is_cross_entropy_on_the_teachers_samples(engine, tmp_path):
    rows = Dataset.from_list(ECHO.columns(ECHO.rows("train", 8)))
    trainer = runs.make_trainer(small("sft", steps=1), runs.load(engine.config.student), rows, engine, str(tmp_path))
    trainer.train()
    logp = torch.cat([completion.record.logp_theta for completion in trainer.vllm_generation.last_batch.completions])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-logp.mean().item(), rel=1e-4)


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


@pytest.mark.parametrize(("arm", "trained_as"), [("q* prefix", "q*"), ("sft", "teacher")])
def test_an_ignored_option_is_found(engine, arm_results, monkeypatch, arm, trained_as):
    """These arms sample as another one does, and differ in their loss: the planted error is that they do not."""
    make = runs.make_trainer
    monkeypatch.setattr(runs, "make_trainer", lambda run, *rest: make(dataclasses.replace(run, arm=trained_as), *rest))
    ignored = runs.execute(small(arm), engine)
    results.check_distinct([arm_results[arm], arm_results[trained_as]])
    with pytest.raises(RuntimeError, match="two runs have the same losses"):
        results.check_distinct([arm_results[trained_as], ignored])


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


# -- whole studies ------------------------------------------------------------------------------------------------------


SIZES = "--batch 4 --limit 6 --validation 12 --points 2 --cross_check 1 --tune_steps 2 --tune_seeds 1 --seeds 1".split()  # noqa: SIM905
EVERY = ["--phases", *run.PHASES]


@pytest.fixture
def study(engine, tiny_pair, monkeypatch, tmp_path):
    """Return a function that runs the privileged study on the module's engine, and returns its folder."""
    monkeypatch.setattr(run, "_engines", [engine])
    monkeypatch.setattr(run, "make_models", lambda flags: tuple(map(str, tiny_pair)))

    def study(folder, *flags):
        given = "--losses forward --teacher_at_least 0 --learning_rates 1e-2 2e-2 --arms student q*".split()  # noqa: SIM905
        assert run.main(["privileged", *SIZES, *given, "--output", str(folder), *flags]) == 0
        return folder / "privileged"

    return study


@pytest.fixture(scope="module")
def whole_study(tmp_path_factory):
    """Folder of an uninterrupted study, which the first test that needs it makes."""
    return tmp_path_factory.mktemp("studies") / "a-machine"


def files(folder):
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_study_equals_an_uninterrupted_one(study, whole_study, monkeypatch, capsys, tmp_path):
    whole = files(study(whole_study, *EVERY))
    assert len(whole) == 1 + 1 + 2 + 2 * 2  # check, compare, tune; learning rates x arms
    execute, calls = runs.execute, []

    def killed(run, engine):
        calls.append(run)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return execute(run, engine)

    monkeypatch.setattr(runs, "execute", killed)
    for _ in range(20):
        try:
            resumed = study(tmp_path / "resumed", *EVERY)
        except KeyboardInterrupt:
            continue
        break
    assert len(calls) > len(set(calls)) == 2 + 2 * 2  # some runs were stopped and done again, and none that was finished
    assert without_times(files(resumed)) == without_times(whole)
    capsys.readouterr()
    study(tmp_path / "resumed", *EVERY)
    assert "done" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"and this command asks for .*'limit': 5"):
        study(tmp_path / "resumed", "--phases", "main", "--limit", "5")


def test_a_failed_run_is_reported_and_the_others_go_on(study, monkeypatch, capsys, tmp_path):
    execute = runs.execute

    def failing(run, engine):
        if run.arm == "student":  # the first
            raise RuntimeError("planted")
        return execute(run, engine)

    monkeypatch.setattr(runs, "execute", failing)
    with pytest.raises(AssertionError):
        study(tmp_path / "failed", "--phases", "main", "--learning_rate", "1e-2", "--steps", "2")
    assert "planted" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "failed" / "privileged" / "runs").iterdir())
    assert names == ["echo_forward_qstar_lr0.01_2steps_seed0.json"]


def test_settings_are_chosen_by_the_student_arm_on_validation_rows():
    def tuned(rate, validation, accuracy):
        curve = [
            {"step": step, "validation": v, "accuracy": a, "kl_teacher": 1.0}
            for step, v, a in zip((0, 8, 16), validation, accuracy, strict=True)
        ]
        return {"run": {"task": "t", "loss": "l", "learning_rate": rate}, "curve": curve}

    slow, fast = tuned(1e-4, (0, 0.2, 0.5), (0, 0.9, 0.9)), tuned(2e-4, (0, 0.58, 0.6), (0, 0, 0))
    assert results.frozen([slow, fast]) == {("t", "l"): {"learning_rate": 2e-4, "steps": 8}}
    assert results.frozen([slow]) == {("t", "l"): {"learning_rate": 1e-4, "steps": 16}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "long_echo"], "long_echo is not a task of the privileged study"),
        (["--steps", "4"], "--learning_rate and --steps are given together"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        run.parse(["privileged", *flags])
    assert message in capsys.readouterr().err


def test_a_poor_teacher_and_missing_tuning_stop_the_study(study, tmp_path):
    with pytest.raises(SystemExit, match="the teacher of echo has 0%, below 50%"):
        study(tmp_path / "poor", "--phases", "check", "--teacher_at_least", "0.5")
    with pytest.raises(SystemExit, match=r"no tuning runs of \[\('echo', 'forward'\)\]"):
        study(tmp_path / "untuned", "--phases", "main")


@pytest.mark.slow
def test_the_capacity_study_in_two_processes(tiny_pair, tmp_path):
    flags = (
        f"--processes 2 --losses reverse --teacher_at_least 0 --learning_rates 1e-2 --arms student sft --model {tiny_pair[1]}"
    )
    made = (
        f"--teacher_steps 2 --student_steps 1 --student_layers 1 --models {tmp_path / 'models'} --output {tmp_path / 'results'}"
    )
    command = [sys.executable, "studies/quality/run.py", "capacity", *SIZES, *flags.split(), *made.split()]
    for _ in range(2):
        done = subprocess.run(command, cwd=report.PAGE.parent.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "main: 0 to run" in done.stdout
    found = results.load(tmp_path / "results" / "capacity" / "runs")
    assert [result["run"]["arm"] for result in found] == ["sft", "student"]
    assert found[0]["models"]["student"]["layers"] == 1


# -- the models of the capacity study -----------------------------------------------------------------------------------


def test_models_are_made_once_and_from_their_recipe(tiny_pair, tmp_path):
    teacher = models.Recipe(layers=None, steps=30, batch=16, learning_rate=1e-2)
    student = models.Recipe(layers=1, steps=1, batch=2)
    paths = models.capacity_pair(tmp_path, str(tiny_pair[1]), teacher, student)
    made = [runs.load(path) for path in paths]
    assert [model.config.num_hidden_layers for model in made] == [2, 1]
    assert models.described(paths[1])["layers"] == 1
    rows = ECHO.rows("held_out", 8)
    tokenizer = AutoTokenizer.from_pretrained(paths[0])
    losses = [model(**models.batch(tokenizer, ECHO, rows)).loss.item() for model in (made[0], runs.load(tiny_pair[1]))]
    assert losses[0] < losses[1] - 0.5
    assert models.capacity_pair(tmp_path, str(tiny_pair[1]), teacher, student) == paths
    with pytest.raises(ValueError, match="teacher exists and was not made by"):
        models.capacity_pair(tmp_path, str(tiny_pair[1]), student, student)
    with pytest.raises(ValueError, match="layers=3 must be from 1 to 2"):
        models.keep_layers(made[0], 3)


def test_a_shorter_model_keeps_its_layers_as_they_were(tiny_pair):
    whole, cut = runs.load(tiny_pair[1]), runs.load(tiny_pair[1])
    models.keep_layers(cut, 2)
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(cut(ids).logits, whole(ids).logits)


# -- the report ---------------------------------------------------------------------------------------------------------


def made(arm, seed, accuracy, seconds=1.0, rate=1e-4, validation=None):
    curve = [
        {"step": s, "tokens": 10 * s, "seconds": seconds * s, "accuracy": a, "validation": validation or a, "kl_teacher": 0.5}
        for s, a in zip((0, 2, 4), accuracy, strict=True)
    ]
    return {
        "run": {"task": "echo", "loss": "forward", "arm": arm, "seed": seed, "learning_rate": rate, "steps": 4, "batch": 8},
        "curve": curve,
        "steps": {"loss": [hash((arm, seed, rate)) % 997], "tokens": [1], "kl_q_student": [0.1, 0.3]},
        "elsewhere": {"before": 2.0, "after": 2.25},
        "cross_check": {"rows": 2, "transformers": 1, "engine": 1},
        "hardware": {"device": "a machine", "processes": 1},
        "data": {"held_out": {"rows": 6, "digest": "d"}},
    }


PAIRED = [
    *(made("student", seed, (0, 0.2 + seed / 10, 0.4 + seed / 10)) for seed in range(3)),
    *(made("q*", seed, (0, 0.4 + seed / 10, 0.5 + seed / 10 + (seed == 2) / 100), seconds=2.0) for seed in range(3)),
]


def test_differences_are_paired_by_seed():
    table = report.figures(PAIRED)
    assert table["student"]["final"] == pytest.approx((0.5, 4.302653 * 0.1 / 3**0.5))  # t at 97.5 %, 2 degrees of freedom
    mean, half = table["q*"]["final_gain"]
    assert mean == pytest.approx(0.1 + 0.01 / 3)
    assert half == pytest.approx(4.302653 * np.std([0.1, 0.1, 0.11], ddof=1) / 3**0.5)
    assert table["q*"]["area_gain"][0] == pytest.approx(0.125 + 0.0025 / 3)
    assert table["q*"]["seconds_gain"][0] == pytest.approx(0, abs=1e-9)  # at the student's 4 seconds, q* is at step 2
    assert table["q*"]["tokens_gain"] == table["q*"]["final_gain"]
    assert table["q*"]["cost"][0] == 2
    unpaired = [run for run in PAIRED if (run["run"]["arm"], run["run"]["seed"]) != ("student", 2)]
    assert report.figures(unpaired)["q*"]["seeds"][0] == 2
    with pytest.raises(ValueError, match="no run of the arm 'student'"):
        report.figures(PAIRED[3:])


def test_best_learning_rates_are_chosen_on_validation_rows():
    better = made("q*", 0, (0, 0, 0.1), rate=2e-4, validation=0.9)
    assert report.best_rates([*PAIRED, better]) == {"student": 1e-4, "q*": 2e-4}


RATINGS = {"student": -3.0, "linear 0.1": -2.5, "q*": -2.0, "teacher": -1.0}  # log π_t


def before_training(**ratings):
    arms = [
        {
            "arm": arm,
            "accuracy": 0.1 * i,
            "kl_theta": 0.3 * i,
            "kl_teacher": 1 - i / 4,
            "logp_teacher": ratings.get(arm, rating),
        }
        for i, (arm, rating) in enumerate(RATINGS.items())
    ]
    return {"task": "echo", "quality": "accuracy", "arms": arms, "verdict": {"worth_it": "yes"}}


def test_rank_correlation_of_the_verdict_with_training():
    ends = {"student": 0.3, "linear 0.1": 0.4, "q*": 0.5, "teacher": 0.6}
    # Seed 1 is better for all arms; the teacher was not run with it. Unpaired means would rank it third.
    trained = [made(arm, 0, (0, 0.1, end)) for arm, end in ends.items()]
    trained += [made(arm, 1, (0, 0.1, 0.3 + end)) for arm, end in ends.items() if arm != "teacher"]
    [good] = report.rank_correlations([before_training()], trained)
    assert (good["arms"], good["verdict"], good["seeds"]) == (4, "yes", 1)
    assert good["gain"] == pytest.approx(0.05)
    for name, of in itertools.product(("nearness", "log π_t"), ("area", "final")):
        assert good[name][of] == pytest.approx((1, 1 / 24))  # one order of 24
    [worse] = report.rank_correlations([before_training(teacher=-4.0)], trained)
    assert worse["log π_t"]["area"] == pytest.approx((-0.2, 15 / 24))  # ranks 2 3 4 1 for 1 2 3 4
    [few] = report.rank_correlations([before_training()], PAIRED)
    assert np.isnan(few["log π_t"]["area"].correlation)
    assert report.rank_correlations([{**before_training(), "task": "another"}], trained) == []


def test_the_comparison_with_the_most_arms_and_the_same_models_is_used():
    trained = [made(arm, 0, (0, 0.1 * i, 0.2 * i)) for i, arm in enumerate(RATINGS)]
    few = {**before_training(), "arms": before_training()["arms"][:3], "verdict": {"worth_it": "no"}}
    other = {**before_training(), "models": "others"}
    [found] = report.rank_correlations([few, before_training(), other], trained)
    assert (found["arms"], found["verdict"]) == (4, "yes")


def test_tied_ranks_and_the_chance_of_a_correlation():
    rank = report.spearman([0, 0, 1, 2], [1, 2, 3, 4])
    assert rank == pytest.approx((stats.spearmanr([0, 0, 1, 2], [1, 2, 3, 4]).statistic, 2 / 24))


def test_report_of_a_whole_study(study, whole_study, tmp_path):
    study(whole_study, *EVERY)
    (whole_study / "note.md").write_text("A note.\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    report.main(["--results", str(whole_study.parent), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("# Title")
    assert text.endswith("after\n")
    assert "old" not in text
    for part in (
        "## Results: privileged, a-machine\n\nA note.",
        "| q\\* | 1 |",
        "own best learning rate",
        "beforehand",
        "page/a-machine_echo",
    ):
        assert part in text, part
    assert (tmp_path / "page" / "a-machine_echo_forward.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="once"):
        report.with_results("no marks", "")


def test_evidence_page_is_made_from_the_committed_results(tmp_path):
    page = report.PAGE.read_text()
    assert report.with_results(page, report.results_text(report.RESULTS, tmp_path / "evidence")) == page
    drawn = {path.name for path in (tmp_path / "evidence").glob("*")}
    assert drawn == {path.name for path in report.PAGE.with_suffix("").glob("*")}
