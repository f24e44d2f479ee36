"""Processes of `osd serve`: started on a free port, waited for, asked, and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch

ROOT = Path(__file__).parent.parent
KEY = "secret"
LONGEST, LONGEST_OF_STUDENT = 256, 128
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LONGEST), "--block-size", "32"]
FLAGS += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", str(64 << 20), "--gpu-memory-utilization", "0.2"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Process:
    """A process that serves HTTP on a port, in a process group of its own; its output is in ``log``."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        # On a CPU the engine's process is forked, which saves the seconds that it would import for.
        method = "spawn" if torch.cuda.is_available() else "fork"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "VLLM_WORKER_MULTIPROC_METHOD": method}
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)

    def wait(self, seconds: float = 240) -> None:
        """Wait until it answers on /health."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def members(self) -> list[int]:
        """Return the processes of its group that run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            except OSError:  # it ended meanwhile
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def serve(teacher: Path, student: Path, log: Path, *flags: str, port: int | None = None) -> Process:
    """Start `osd serve`; does not wait for it."""
    port = port or free_port()
    command = [sys.executable, "-m", "osd", "serve", "--teacher", str(teacher), "--student", str(student)]
    return Process([*command, *FLAGS, "--port", str(port), *flags], port, log)


@contextmanager
def served(teacher: Path, student: Path, log: Path, *flags: str) -> Iterator[Client]:
    server = serve(teacher, student, log, *flags)
    try:
        server.wait()
        yield Client(server)
    finally:
        server.kill()


class Client:
    """Requests to a server, with its key."""

    def __init__(self, server: Process) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {KEY}"})

    def post(self, route: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()  # httpx refuses NaN
        return self.http.post(route, content=content, headers={"Content-Type": "application/json"})

    def complete(
        self, prompt: Any, student: Any = None, *, route: str = "/v1/completions", osd: Any = None, **fields: Any
    ) -> Any:
        """Return the answer's choices; ``student`` is the student's prompt in token ids. Asks for logprobs, ids and record."""
        osd = {"record": True, **({} if student is None else {"student_prompt_token_ids": student}), **(osd or {})}
        asked = {"prompt": prompt, "logprobs": 0} if route == "/v1/completions" else {"messages": prompt, "logprobs": True}
        body = {**asked, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True, "osd": osd, **fields}
        answer = self.post(route, body)
        assert answer.status_code == 200, answer.text
        return events(answer.text) if fields.get("stream") else answer.json()["choices"]

    def refused(self, body: dict[str, Any], *, route: str = "/v1/completions") -> tuple[int, str]:
        """Return status and message of an error; of an event stream those in its first event."""
        answer = self.post(route, body)
        error = events(answer.text)[0] if answer.text.startswith("data:") else answer.json()
        assert "error" in error, answer.text
        return error["error"]["code"], error["error"]["message"]


def running(server: Client) -> float:
    """Return how many requests the engine runs."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_requests_running{"))


def events(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, without its end."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
