"""`osd generate`: kills, interrupts, resuming, and several processes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from osd.data import generate as running
from osd.data import requests, writer
from osd.data.generate import generate
from tests.fake_pair import FakePair
from tests.generate_run import (
    ROWS,
    SIZES,
    Killed,
    config,
    content,
    finish,
    flags,
    keys,
    kill_until_done,
    launch,
    read_output,
    rejected,
    write_rows,
)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_kill_at_every_step_of_writing_loses_at_most_a_shard(tmp_path, monkeypatch, kind):
    """Stop before each system call that completes a file, resume, and compare with an undisturbed run."""
    rows = [*ROWS[:2], {"question": "", "answer": "w8"}, *ROWS[2:4]]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    undisturbed = config(tmp_path, input=path, output=str(tmp_path / "undisturbed"), format=kind, shard_size=4)
    generate(undisturbed, FakePair)
    expected = keys(read_output(undisturbed.output)), rejected(undisturbed.output)
    calls = []

    def counted(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == kill_at:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "truncate"):
        monkeypatch.setattr(writer.os, name, counted(name))
    kill_at = 10**9
    generate(config(tmp_path, input=path, format=kind, shard_size=4), FakePair)
    steps = len(calls)
    assert steps > 20
    for kill_at in range(1, steps + 1):
        shutil.rmtree(tmp_path / "out")
        calls.clear()
        settings = config(tmp_path, input=path, format=kind, shard_size=4)
        with pytest.raises(Killed):
            generate(settings, FakePair)
        before = keys(read_output(settings.output)) if (tmp_path / "out").exists() else []
        assert before == expected[0][: len(before)]  # only whole shards are ever visible
        kill_at = 10**9
        counts = generate(dataclasses.replace(settings, resume=True), FakePair)
        assert (keys(read_output(settings.output)), rejected(settings.output)) == expected
        assert (counts.kept, counts.rejected) == (len(expected[0]), len(expected[1]))
        assert not list((tmp_path / "out").rglob("*.part"))


def test_sigkill_at_random_moments(tmp_path):
    settings = config(tmp_path, num_samples=12, shard_size=4, batch_size=2)
    expected = config(tmp_path, num_samples=12, shard_size=4, batch_size=2, output=str(tmp_path / "expected"))
    generate(expected, FakePair)
    moments = [random.Random(7).uniform(0, 0.15) for _ in range(3)]
    argv = ["generate", *flags(settings, *SIZES)]
    kill_until_done(argv, moments, settings.output, FAKE_SECONDS="0.005")
    samples = read_output(settings.output)
    assert keys(samples) == keys(read_output(expected.output))
    assert content(samples) == content(read_output(expected.output))


def dying_after(batches):
    """A pair that a kill ends after some batches."""

    class Dying(FakePair):
        def sample(self, requests, *args, **kwargs):
            if len(self.sizes) == batches:
                raise Killed
            return super().sample(requests, *args, **kwargs)

    return Dying


def begun(tmp_path):
    """A run that was killed after its second shard."""
    settings = config(tmp_path)
    with pytest.raises(Killed):
        generate(settings, dying_after(4))
    assert len(read_output(settings.output)) == 10
    return settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1}, "made with seed=42, and this run has seed=1"),
        ({"shard_size": 6}, "made with shard_size=5, and this run has shard_size=6"),
        ({"temperature": 0.5}, "made with temperature=1.0, and this run has temperature=0.5"),
        ({"engine_kwargs": {"dtype": "float32"}}, "made with engine_kwargs=None, and this run has engine_kwargs={'dtype'"),
        ({"shard": "0/2"}, "made with processes=1, and this run has processes=2"),
        ({"teacher_model_name_or_path": "other"}, "made with teacher_model_name_or_path='teacher'"),
    ],
)
def test_resuming_with_another_setting_is_refused_by_name(tmp_path, given, message):
    settings = begun(tmp_path)
    FakePair.started = 0
    with pytest.raises(ValueError, match=message):
        generate(dataclasses.replace(settings, resume=True, **given), FakePair)
    assert FakePair.started == 0
    assert len(read_output(settings.output)) == 10


def test_resuming_with_other_rows_is_refused(tmp_path):
    settings = begun(tmp_path)
    write_rows(tmp_path / "in.jsonl", ROWS[1:])
    with pytest.raises(ValueError, match="made with input rows="):
        generate(dataclasses.replace(settings, resume=True), FakePair)


def test_resuming_may_change_settings_that_do_not_change_the_data(tmp_path):
    settings = begun(tmp_path)
    moved = shutil.copy(tmp_path / "in.jsonl", tmp_path / "moved.jsonl")
    resumed = dataclasses.replace(settings, resume=True, batch_size=50, vllm_gpu_memory_utilization=0.3, input=str(moved))
    assert generate(resumed, FakePair).kept == 2 * len(ROWS)


def test_a_run_is_not_overwritten_without_resume(tmp_path):
    settings = begun(tmp_path)
    with pytest.raises(ValueError, match="add --resume"):
        generate(settings, FakePair)


def test_a_run_that_never_wrote_a_shard_may_be_corrected(tmp_path):
    class Refusing(FakePair):
        def sample(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        generate(config(tmp_path), Refusing)
    assert generate(config(tmp_path, engine_kwargs={"max_model_len": 64}), FakePair).kept == 2 * len(ROWS)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    settings = config(tmp_path)
    first = generate(settings, FakePair)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    FakePair.started = 0
    assert generate(dataclasses.replace(settings, resume=True), FakePair) == first
    assert FakePair.started == 0
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


# -- several processes --------------------------------------------------------------------------------------------------


def test_processes_share_the_work_and_their_outputs_merge(tmp_path):
    rows = [*ROWS[:9], {"question": "", "answer": "w8"}, *ROWS[9:]]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    alone = config(tmp_path, input=path, output=str(tmp_path / "alone"))
    counts = generate(alone, FakePair)
    shared = config(tmp_path, input=path)
    parts = [generate(dataclasses.replace(shared, shard=f"{i}/3"), FakePair) for i in (2, 0, 1)]
    assert all(part.kept for part in parts)
    merged = read_output(shared.output)
    assert len(merged) == len(set(keys(merged))) == counts.kept
    assert content(merged) == content(read_output(alone.output))
    assert rejected(shared.output) == rejected(alone.output)
    summaries = [json.loads((Path(folder) / "summary.json").read_text()) for folder in (alone.output, shared.output)]
    for name, value in summaries[0].items():
        assert summaries[1][name] == (value if name == "removed" else pytest.approx(value, rel=1e-9))


def test_the_launchers_place_and_gpus(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert running.process_place(gpus_each=2) == (3, 4)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert running.process_place() == (0, 1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_launched_processes_share_the_work(tmp_path):
    """Two processes of torchrun, which is what `accelerate launch` starts on several GPUs."""
    settings = config(tmp_path)
    argv = ["--nproc_per_node", "2", "-m", "tests.fake_pair", "generate", *flags(settings, *SIZES)]
    status, out = finish(launch(*argv, module="torch.distributed.run"))
    assert status == 0, out
    samples = read_output(settings.output)
    assert len(samples) == len(set(keys(samples))) == 2 * len(ROWS)
    assert {path.name[5:19] for path in (tmp_path / "out").glob("data-*")} == {"00000-of-00002", "00001-of-00002"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["kept"] == 2 * len(ROWS)


# -- interrupts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_finished_batches_of_an_interrupted_shard_are_written(tmp_path, error):
    """The third batch ends the run; a row of it that was rejected already is rejected once."""

    class Interrupted(FakePair):
        def sample(self, requests, *args, **kwargs):
            if len(self.sizes) == 2:
                raise error
            return super().sample(requests, *args, **kwargs)

    rows = [{"question": "", "answer": "w8"} if i == 7 else row for i, row in enumerate(ROWS)]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    sizes = {"num_samples": 1, "shard_size": 100, "batch_size": 3}
    undisturbed = config(tmp_path, input=path, output=str(tmp_path / "undisturbed"), **sizes)
    generate(undisturbed, FakePair)
    settings = config(tmp_path, input=path, **sizes)
    with pytest.raises(error):
        generate(settings, Interrupted)
    assert keys(read_output(settings.output)) == keys(read_output(undisturbed.output))[:6]
    counts = generate(dataclasses.replace(settings, resume=True), FakePair)
    assert keys(read_output(settings.output)) == keys(read_output(undisturbed.output))
    assert content(read_output(settings.output)) == content(read_output(undisturbed.output))
    assert rejected(settings.output) == rejected(undisturbed.output)
    assert (counts.kept, counts.rejected) == (len(ROWS) - 1, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_in_a_terminal_ends_with_status_130_and_loses_no_batch(tmp_path, processes):
    """SIGINT to the whole process group, as a terminal sends it."""
    settings = config(tmp_path, num_samples=12, shard_size=1000, batch_size=2)
    argv = ["generate", *flags(settings, *SIZES), "--resume"]
    started = [
        launch(*argv, *(["--shard", f"{i}/{processes}"] if processes > 1 else []), FAKE_SECONDS="0.1", own_group=True)
        for i in range(processes)
    ]
    states = [tmp_path / "out" / "state" / f"{i:05d}-of-{processes:05d}.json" for i in range(processes)]
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in states) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    for process in started:
        os.killpg(process.pid, signal.SIGINT)
    for process in started:
        status, out = finish(process, timeout=60)
        assert status == 130, out
        assert "interrupted" in out
    before = read_output(settings.output)
    assert before
    assert sum(json.loads(path.read_text())["tasks"] for path in states) == len(before)
    for i in range(processes):
        given = {"shard": f"{i}/{processes}"} if processes > 1 else {}
        generate(dataclasses.replace(settings, resume=True, **given), FakePair)
    after = read_output(settings.output)
    assert len(after) == len(set(keys(after))) == 12 * len(ROWS)


# -- the date in prompts ------------------------------------------------------------------------------------------------

DATED = "{{ 'w40 ' + strftime_now('w%d') + ' ' + messages[-1].content }}"


class Clock(datetime.datetime):
    today = datetime.datetime(2024, 1, 30, 23, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.today


def test_a_run_keeps_its_date_when_it_is_resumed_another_day(tmp_path, monkeypatch):
    for module in (running, requests):
        monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(Clock, "today", datetime.datetime(2024, 1, 30, 23, 59))
    dated = {"enable_chat_template": True, "teacher_chat_template": DATED, "student_chat_template": DATED}
    settings = config(tmp_path, **dated)
    with pytest.raises(Killed):
        generate(settings, dying_after(4))
    monkeypatch.setattr(Clock, "today", datetime.datetime(2024, 1, 31, 8, 0))
    generate(dataclasses.replace(settings, resume=True), FakePair)
    samples = read_output(settings.output)
    assert len(samples) == 2 * len(ROWS)
    for side in ("student", "teacher"):
        assert {sample[f"{side}_prompt"].split()[1] for sample in samples} == {"w30"}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["started"] == "2024-01-30T23:59:00"
    other = config(tmp_path, output=str(tmp_path / "other"), **dated)
    generate(other, FakePair)
    assert {sample["student_prompt"].split()[1] for sample in read_output(other.output)} == {"w31"}


def test_processes_that_start_on_two_days_share_the_date_of_the_first(tmp_path, monkeypatch):
    for module in (running, requests):
        monkeypatch.setattr(module, "datetime", Clock)
    settings = config(tmp_path, enable_chat_template=True, student_chat_template=DATED)
    for i, day in enumerate((30, 31)):
        monkeypatch.setattr(Clock, "today", datetime.datetime(2024, 1, day))
        generate(dataclasses.replace(settings, shard=f"{i}/2"), FakePair)
    assert {sample["student_prompt"].split()[1] for sample in read_output(settings.output)} == {"w30"}


def test_the_state_of_another_version_is_refused(tmp_path):
    settings = begun(tmp_path)
    path = tmp_path / "out" / "state" / "00000-of-00001.json"
    state = json.loads(path.read_text())
    del state["tasks"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="is of another version of osd; write to another folder"):
        generate(dataclasses.replace(settings, resume=True), FakePair)
