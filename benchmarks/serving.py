"""Server processes for benchmarks, `osd serve` or `vllm serve`: started, waited for, and ended."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.process import GPU, ROOT, end_group

SERVER = "OSD_BENCH_SERVER"  # the server's URL, in the environment of its trainer
START_SECONDS = 900  # a large pair compiles for minutes


def flags(engine_kwargs: dict[str, Any]) -> list[str]:
    """Return engine arguments as flags of a server."""
    written = []
    for name, value in engine_kwargs.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            written += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return written


@contextmanager
def server(
    teacher: str,
    student: str,
    engine_kwargs: dict[str, Any],
    env: dict[str, str],
    log: Path,
    *,
    first_gpu: int,
    seconds: float = START_SECONDS,
) -> Iterator[dict[str, str]]:
    """Run `osd serve` on the GPUs from ``first_gpu`` on; yields what its trainer, on the GPUs before, has in its environment.

    Args:
        seconds: for it to start, `START_SECONDS` at most.

    Raises:
        RuntimeError: it did not start; with the end of its log.
    """
    key = {"VLLM_API_KEY": secrets.token_hex(16)}
    command = ["-m", "osd", "serve", "--teacher", teacher, "--student", student]
    with started(command, engine_kwargs, env | key, log, first_gpu=first_gpu, seconds=seconds) as given:
        yield given | key


@contextmanager
def started(
    command: list[str],
    engine_kwargs: dict[str, Any],
    env: dict[str, str],
    log: Path,
    *,
    first_gpu: int,
    seconds: float = START_SECONDS,
) -> Iterator[dict[str, str]]:
    """Run a server by arguments of Python; as `server`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    last = first_gpu + engine_kwargs.get("tensor_parallel_size", 1)
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first_gpu, last)))} if GPU else {}
    before = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first_gpu)))} if GPU else {}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, *flags(engine_kwargs), "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env=env | seen,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        _wait(url, process, log, min(seconds, START_SECONDS))
        yield {SERVER: url, **before}
    finally:
        end_group(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-3000:]}")
