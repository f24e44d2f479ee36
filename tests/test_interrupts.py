"""Ctrl-C that comes inside a destructor ends the program all the same."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from trl import DistillationTrainer

from osd import cli
from osd.engine.backend import frontend
from osd.engine.engine import PairConfig
from osd.interrupts import kept_interrupts
from osd.train import train_osd
from osd.train.trainer import OSDTrainer


class Interrupting:
    """An object in a reference cycle. Ctrl-C comes while it is destroyed."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def drop_an_interrupt(*args, **kwargs) -> None:
    """Collect garbage as the libraries do, and wait for something that does not come."""
    Interrupting()
    gc.collect()
    begun = time.monotonic()
    try:
        threading.Event().wait(60)
    finally:
        assert time.monotonic() - begun < 30


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    """Python's own hook in the place of pytest's, and no garbage of other tests."""
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    gc.collect()


def test_python_drops_an_interrupt_in_a_destructor():
    Interrupting()
    gc.collect()
    time.sleep(0.2)


def test_it_is_kept_and_the_hook_restored():
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), kept_interrupts():
        drop_an_interrupt()
    assert sys.unraisablehook is before


def test_other_dropped_errors_go_to_the_hook_that_was_there(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: seen.append(dropped.exc_type))

    class Failing:
        def __del__(self):
            raise ZeroDivisionError

    with kept_interrupts():
        Failing()
    assert seen == [ZeroDivisionError]


def test_every_command_ends_with_130(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "env", drop_an_interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main(["env"])
    assert ended.value.code == 130
    assert "osd env: interrupted" in capsys.readouterr().err


def test_the_training_command_ends_with_130(monkeypatch, capsys):
    monkeypatch.setattr(train_osd, "main", drop_an_interrupt)
    with pytest.raises(SystemExit) as ended:
        train_osd.command([])
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_start_of_an_engine_ends(monkeypatch, tiny_pair):
    monkeypatch.setattr(frontend, "LLM", drop_an_interrupt)
    with pytest.raises(KeyboardInterrupt):
        frontend.Frontend(PairConfig(teacher=str(tiny_pair[0]), student=str(tiny_pair[1])))


def test_training_ends(monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "train", drop_an_interrupt)
    trainer = object.__new__(OSDTrainer)
    trainer.args = SimpleNamespace(output_dir="unused")
    trainer._ahead = SimpleNamespace(end=lambda: None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
