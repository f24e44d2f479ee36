"""Worker process that times the weight syncs of one system.

python -m benchmarks.sync_worker job.json out.json        (started by benchmarks/weight_sync.py)
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.process import Written, guarded, serve
from benchmarks.serving import SERVER

RAW = "raw copy"
Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class SyncJob:
    """Job of both systems. The model folders have no weights.

    Attributes:
        gpu: run on CUDA.
        dtype, student_dtype: dtypes of the engine's weights and of the trainer's weights.
        repeats: counted repeats of every method, after one that is not counted.
        tensor_parallel_size: processes that hold an engine together; each has a whole live student.
    """

    teacher: str
    student: str
    gpu: bool
    dtype: str
    student_dtype: str
    repeats: int
    tensor_parallel_size: int = 1

    def engine_kwargs(self) -> dict[str, Any]:
        kwargs = dict(load_format="dummy", skip_tokenizer_init=True, dtype=self.dtype, max_model_len=256, max_num_seqs=4)
        # vLLM requires this share to be free beside the trainer's model. The last argument limits its KV cache.
        kwargs |= dict(enforce_eager=True, gpu_memory_utilization=0.3, kv_cache_memory_bytes=1 << 28)
        return kwargs | ({"tensor_parallel_size": self.tensor_parallel_size} if self.tensor_parallel_size > 1 else {})

    def live_student(self) -> Any:
        with torch.device("cuda" if self.gpu else "cpu"):
            config = AutoConfig.from_pretrained(self.student)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.student_dtype))
        model.name_or_path = self.student
        return model

    def accelerator(self) -> Accelerator:
        return Accelerator(cpu=not self.gpu)


def osd(job: SyncJob, model: Any) -> Ways:
    from osd.engine.engine import PairConfig
    from osd.generation import OSDGeneration

    pair = PairConfig(teacher=job.teacher, student=job.student, engine_kwargs=job.engine_kwargs())
    generation = OSDGeneration(model, job.accelerator(), None, pair=pair, check_sync=False)
    engine = generation.engine
    named = [(name, p.data) for name, p in model.named_parameters()]
    worker = engine._frontend.worker
    assert worker is not None, "the engine must run in this process"

    def load_weights(*calls: list[tuple[str, torch.Tensor]]) -> None:
        with worker.as_student(), torch.no_grad():
            for given in calls:
                worker.student_runner.get_model().load_weights(given)

    return {
        "sync": generation.sync_weights,
        "engine": lambda: engine.load_student_weights(named),
        "load_weights": lambda: load_weights(named),
        "per tensor": lambda: load_weights(*([item] for item in named)),
    }


def trl(job: SyncJob, model: Any) -> Ways:
    from trl.generation.vllm_generation import VLLMGeneration

    from benchmarks.trl_engine import engine_arguments

    kwargs = job.engine_kwargs()
    given = {name: kwargs.pop(name) for name in ("max_num_seqs", "gpu_memory_utilization")}
    given["max_model_length"] = kwargs.pop("max_model_len")
    with engine_arguments(**kwargs):  # arguments that TRL has no option for
        return {"trl": VLLMGeneration(model, job.accelerator(), None, mode="colocate", **given).sync_weights}


def server(job: SyncJob, model: Any) -> Ways:
    from osd.engine.config import PairConfig
    from osd.engine.served import ServedPair
    from osd.generation import OSDGeneration

    pair = ServedPair(config=PairConfig(teacher=job.teacher, student=job.student), url=os.environ[SERVER])
    generation = OSDGeneration(model, job.accelerator(), None, pair=pair, check_sync=False)
    return {"server": generation.sync_weights}


SYSTEMS: dict[str, Callable[[SyncJob, Any], Ways]] = {"osd": osd, "trl": trl, "server": server}


def raw(job: SyncJob, model: Any) -> Ways:
    sources = [p.data for p in model.parameters()]
    targets = [torch.empty_like(source, dtype=getattr(torch, job.dtype)) for source in sources]

    def one_by_one() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)

    return {"raw, at once": lambda: torch._foreach_copy_(targets, sources, non_blocking=True), RAW: one_by_one}


def timed(sync: Callable[[], Any], drain: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Measure the milliseconds of every repeat and their medians, until the device is done and until the call returns."""
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        drain()
        start = time.perf_counter()
        sync()
        returned = time.perf_counter()
        drain()
        times.append(((time.perf_counter() - start) * 1e3, (returned - start) * 1e3))
    done_ms, host_ms = (list(column) for column in zip(*times[1:], strict=True))
    return {"ms": statistics.median(done_ms), "host_ms": statistics.median(host_ms), "all_ms": done_ms, "all_host_ms": host_ms}


def run(spec: dict[str, Any], write: Callable[[Written], None]) -> Written:
    """Start the system named in ``spec`` and time its methods of syncing."""

    def measure(result: Written) -> None:
        job = SyncJob(**spec["job"])
        model = job.live_student()
        tensors = list(model.parameters())
        size = sum(p.numel() for p in tensors) * getattr(torch, job.dtype).itemsize
        result["settings"] = {"tensors": len(tensors), "gigabytes": size / 1e9}
        ways = SYSTEMS[spec["system"]](job, model) | raw(job, model)
        drain = torch.cuda.synchronize if job.gpu else lambda: None
        rows = [{"way": way, **timed(sync, drain, job.repeats)} for way, sync in ways.items()]
        floor_ms = rows[-1]["ms"]
        result["rows"] = [{**row, "over_raw_copy": row["ms"] / floor_ms} for row in rows]

    return guarded(measure, write)


if __name__ == "__main__":
    serve(run)
