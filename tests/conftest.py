"""Shared fixtures. Environment first: vLLM reads it when it is imported."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from a second thread, and lose much where two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM's attention for float32 on a GPU is Triton's, which multiplies in TF32 unless told otherwise: 1e-2 off.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.async_cpu import allow_async_scheduling
from tests.exact import reference
from tests.pairs import start
from tests.served import KEY, Client, served
from tests.tiny import tiny_model

# The background jobs of a shell ignore SIGINT, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def async_scheduling_everywhere() -> None:
    if not torch.cuda.is_available():
        allow_async_scheduling()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random models of one vocabulary (teacher, student), different enough for α to move."""
    root = tmp_path_factory.mktemp("tiny")
    return tiny_model(root / "teacher", seed=1), tiny_model(root / "student", seed=2)


@pytest.fixture(scope="module")
def model_paths(tiny_pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """Teacher and student of `engine` and `models`; a test module may define its own."""
    return tiny_pair


@pytest.fixture(scope="module")
def engine(model_paths: tuple[Path, Path], request: pytest.FixtureRequest) -> Iterator:
    """One open pair per test module.

    Its arguments are those of `PairConfig`: the module's ``ENGINE``, updated by the fixture's parameter (``indirect=True``).
    ``engine_kwargs`` update `tiny_engine_kwargs`.
    """
    config = {**getattr(request.module, "ENGINE", {}), **getattr(request, "param", {})}
    with start(model_paths, config) as engine:
        yield engine


@pytest.fixture(scope="module")
def models(model_paths: tuple[Path, Path]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Teacher and student in transformers, float32."""
    teacher, student = map(reference, model_paths)
    return teacher, student


@pytest.fixture(scope="session")
def server(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """An `osd serve` process of the tiny pair that takes weights. It starts once; tests leave it without a trainer."""
    log = tmp_path_factory.mktemp("server") / "serve.log"
    flags = ("--api-key", KEY, "--weight-transfer-config", '{"backend": "http"}', "--max-num-queued-reqs", "12")
    with served(*tiny_pair, log, *flags) as client:
        yield client


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32, converted once into the repository's ignored ``models`` folder."""
    from examples.smollm2 import prepare_smollm2

    return prepare_smollm2(Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct", dtype="float32")
