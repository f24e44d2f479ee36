"""Ctrl-C: SIGINT goes to a terminal's whole process group, so also to the process of vLLM's engine core.

Each case runs in a process group of its own, ends within a deadline with status 130, and leaves no process behind.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

DEADLINE = 90.0  # seconds; it takes a few on an idle machine
MARK = "OSD_TEST_CTRL_C"
SCRIPT = """
import sys

def main(teacher, student, twice):
    print("importing", flush=True)
    from osd.engine.engine import PairConfig, PairEngine, PairPrompt
    from tests.tiny import tiny_engine_kwargs
    print("loading", flush=True)
    prompts = [PairPrompt(teacher_token_ids=[7 + i % 50, 9], student_token_ids=[30, 8 + i % 50]) for i in range(2000)]
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs())) as engine:
        print("sampling", flush=True)
        try:
            engine.generate(prompts, sampling=dict(max_tokens=200, ignore_eos=True))
        except KeyboardInterrupt:
            if not twice:
                raise
            engine.generate(prompts[:1], sampling=dict(max_tokens=2))
    print("finished", flush=True)

if __name__ == "__main__":
    try:
        main(*sys.argv[1:3], twice=len(sys.argv) > 3)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(error, flush=True)
        sys.exit(3)
"""


def start(tmp_path: Path, tiny_pair, *, multiprocessing: int, options: tuple[str, ...] = ()) -> tuple[subprocess.Popen, str]:
    """Start the script in a process group of its own; return it and a mark in the environment of all its processes."""
    (tmp_path / "run.py").write_text(SCRIPT)
    mark = uuid.uuid4().hex
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": str(multiprocessing), "PYTHONPATH": os.getcwd(), MARK: mark}
    command = [sys.executable, str(tmp_path / "run.py"), *map(str, tiny_pair), *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return process, mark


def wait_for(tmp_path: Path, process: subprocess.Popen, stage: str) -> None:
    end = time.monotonic() + 5 * DEADLINE
    while stage not in (tmp_path / "log").read_text().split("\n"):
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < end, f"never reached {stage}"
        time.sleep(0.05)


def alive(mark: str) -> list[str]:
    """Return the processes that have the mark in their environment, zombies apart."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(f"{folder.name} {(folder / 'cmdline').read_bytes()[:80]!r}")
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


def check_end(tmp_path: Path, process: subprocess.Popen, mark: str, status: int) -> None:
    try:
        assert process.wait(DEADLINE) == status, (tmp_path / "log").read_text()[-3000:]
        end = time.monotonic() + 10
        while alive(mark) and time.monotonic() < end:
            time.sleep(0.1)
        assert not alive(mark)
    finally:
        for entry in alive(mark):
            os.kill(int(entry.split()[0]), signal.SIGKILL)
    assert "finished" not in (tmp_path / "log").read_text().split("\n")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("multiprocessing", "stage", "seconds"),
    [
        pytest.param(1, "sampling", 1.0, id="own process, sampling"),
        pytest.param(0, "sampling", 1.0, id="in process, sampling", marks=slow),
        pytest.param(1, "loading", 1.0, id="own process, loading", marks=slow),
        pytest.param(1, "loading", 6.0, id="own process, loading late", marks=slow),
        pytest.param(0, "loading", 1.0, id="in process, loading", marks=slow),
    ],
)
def test_ctrl_c_ends_every_process(tmp_path, tiny_pair, multiprocessing, stage, seconds):
    process, mark = start(tmp_path, tiny_pair, multiprocessing=multiprocessing)
    wait_for(tmp_path, process, stage)
    time.sleep(seconds)
    assert process.poll() is None, "it ended before it could be interrupted"
    os.killpg(process.pid, signal.SIGINT)
    check_end(tmp_path, process, mark, 130)


@slow
def test_an_engine_whose_process_was_interrupted_says_that_it_is_closed(tmp_path, tiny_pair):
    process, mark = start(tmp_path, tiny_pair, multiprocessing=1, options=("twice",))
    wait_for(tmp_path, process, "sampling")
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    check_end(tmp_path, process, mark, 3)
    # It may have answered the clean-up before it ended.
    assert re.search("this engine is closed|the engine's process has ended", (tmp_path / "log").read_text())


@slow
def test_an_engine_whose_process_was_killed_ends_the_call(tmp_path, tiny_pair):
    """Out of memory, say: nothing waits for a dead process."""
    process, mark = start(tmp_path, tiny_pair, multiprocessing=1)
    wait_for(tmp_path, process, "sampling")
    time.sleep(0.5)
    [core] = [int(entry.split()[0]) for entry in alive(mark) if "EngineCore" in name_of(entry)] or [None]
    assert core is not None
    os.kill(core, signal.SIGKILL)
    check_end(tmp_path, process, mark, 3)


def name_of(entry: str) -> str:
    return (Path("/proc") / entry.split()[0] / "comm").read_text() + entry
