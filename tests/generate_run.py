"""Runs of `osd generate` with a pair without models: settings, launched processes, and what they wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from osd.data.settings import GenerateConfig

ROOT = Path(__file__).parent.parent
ROWS = [{"question": f"w{i} w{i + 1}", "answer": f"w{i % 7 + 20}"} for i in range(7, 30)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(tmp_path, settings_class=GenerateConfig, **given):
    settings = dict(
        model_name_or_path="student",
        teacher_model_name_or_path="teacher",
        prompt_column="question",
        privileged_template="{prompt} {answer}",
        max_completion_length=6,
        num_samples=2,
        shard_size=5,
        batch_size=3,
        output=str(tmp_path / "out"),
    )
    if "input" not in given:
        given["input"] = str(write_rows(tmp_path / "in.jsonl", ROWS))
    if settings_class is not GenerateConfig:
        settings.pop("shard_size")
    return settings_class(**{**settings, **given})


def read_output(folder):
    files = sorted(Path(folder).glob("data-*"))
    frames = [pd.read_parquet(f) if f.suffix == ".parquet" else pd.read_json(f, lines=True, dtype=False) for f in files]
    return [row for frame in frames for row in frame.to_dict("records")]


def keys(samples):
    return [(sample["id"], sample["sample"]) for sample in samples]


def content(samples):
    """Seeds, tokens and teacher prompts by id and sample."""
    return {(s["id"], s["sample"]): (s["seed"], list(s["token_ids"]), s["teacher_prompt"]) for s in samples}


def rejected(folder):
    return [json.loads(line) for line in (Path(folder) / "rejected.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Replaces SIGKILL: nothing catches it."""


def launch(*argv, module="tests.fake_pair", own_group=False, **environment):
    """Start a command; `own_group` gives it a process group, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0 if own_group else None,
    )


def finish(process, timeout=300):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def flags(settings, *names):
    """The command line of some settings."""
    argv = []
    for name in ("model_name_or_path", "teacher_model_name_or_path", "prompt_column", "privileged_template", "input", *names):
        argv += [f"--{name}", str(getattr(settings, name))]
    return argv


SIZES = ("max_completion_length", "num_samples", "shard_size", "batch_size", "output")


def kill_until_done(argv, moments, folder, **environment):
    """Run and kill once for each moment (seconds after a new shard), then let the run finish; return its output."""
    for moment in moments:
        done = len(list(Path(folder).glob("data-*")))
        process = launch(*argv, "--resume", **environment)
        while len(list(Path(folder).glob("data-*"))) == done and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    status, out = finish(launch(*argv, "--resume", **environment))
    assert status == 0, out
    return out
