"""Worker process that trains a few steps with one trainer and times them.

    python -m benchmarks.train_worker job.json out.json        (started by benchmarks/train_step.py and async_step.py)

First come ``warm_up`` steps that are not counted. Then come ``steps`` steps timed as a whole: the device is drained only before
the first and after the last of them. Then the same number of steps is timed by part, with a stopwatch that drains the device at
the start and end of each part. A step lasts from the end of the previous step to its own end, so no time is left out. Parts of
both trainers:

    sync        `sync_weights()` of the generator: copies the student's weights to its engine
    generate    `generate()` of the generator with all of its host work; OSD's includes fetching the record
    teacher     TRL: `_get_last_hidden_state(teacher)`; OSD: batching the recorded hidden states
    student     `compute_loss` and `accelerator.backward` without the teacher, with both output layers
    optimizer   `accelerator.clip_grad_norm_` and `optimizer.step`
    other       the rest: data loader, tokenizing, metrics, logs, `zero_grad`
"""

from __future__ import annotations

import os
import random
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoConfig, TrainerCallback

from benchmarks.checkpoints import text_of
from benchmarks.process import Written, guarded, serve
from benchmarks.serving import SERVER
from benchmarks.stopwatch import PARTS, Stopwatch
from benchmarks.systems import resolved
from osd.engine.remote import RemoteEngine


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Job of all trainers.

    Attributes:
        teacher, student: model folders with weights and tokenizer.
        gpu: run on CUDA.
        dtype: dtype of the teacher and of the engines' weights and computation.
        student_dtype: dtype of the trained weights. If it differs from ``dtype``, passes run under autocast to ``dtype``.
        prompt_tokens, new_tokens: number of tokens of every prompt and every completion.
        completions: completions per optimizer step.
        micro_batch: completions per forward and backward pass.
        kv_tokens: tokens in the KV cache of each model of an engine.
        warm_up, steps: see the module docstring.
        sleep: engines sleep between `generate` calls. OSD's engine also holds the teacher's weights; TRL's does not.
        engine_kwargs: further ``vllm.LLM`` arguments for all engines.
        processes: that train; ``completions`` are of all together.
        tensor_parallel_size: processes that hold one engine together; GPUs of a server.
    """

    teacher: str
    student: str
    gpu: bool
    dtype: str
    student_dtype: str
    prompt_tokens: int
    new_tokens: int
    completions: int
    micro_batch: int
    kv_tokens: int
    warm_up: int
    steps: int
    gradient_checkpointing: bool
    sleep: bool
    learning_rate: float
    output_dir: str
    engine_kwargs: dict[str, Any]
    processes: int = 1
    tensor_parallel_size: int = 1

    def trainer_kwargs(self) -> dict[str, Any]:
        """Return the arguments of TRL's `DistillationConfig`, equal for all trainers. All others keep TRL's defaults."""
        return dict(
            output_dir=self.output_dir,
            use_cpu=not self.gpu,
            bf16=self.dtype == "bfloat16",
            model_init_kwargs={"dtype": self.student_dtype},
            gradient_checkpointing=self.gradient_checkpointing,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=self.completions // self.micro_batch // self.processes,
            max_steps=self.warm_up + 2 * self.steps,
            max_completion_length=self.new_tokens,
            vllm_enable_sleep_mode=self.sleep,
            vllm_max_model_length=self.prompt_tokens + self.new_tokens,
            generation_kwargs={"ignore_eos": True},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def llm_kwargs(self, *models: str) -> dict[str, Any]:
        """Return the arguments of an engine with these models, each with a KV cache for its share of ``kv_tokens`` tokens."""
        engines = self.processes // self.tensor_parallel_size
        size = sum(kv_bytes_per_token(model, self.dtype, self.tensor_parallel_size) for model in models)
        size *= -(-self.kv_tokens // engines)
        kwargs = {"dtype": self.dtype, "kv_cache_memory_bytes": size}
        return kwargs | ({} if self.gpu else {"enforce_eager": True}) | self.engine_kwargs

    def rows(self) -> Dataset:
        """Return one prompt per completion of the run. No prompt occurs twice, so prefix caches have no effect."""
        rng, count = random.Random(0), self.completions * (self.warm_up + 2 * self.steps)
        return Dataset.from_list([{"prompt": text_of(rng.choices(range(10), k=self.prompt_tokens))} for _ in range(count)])


def kv_bytes_per_token(model: str, dtype: str, ranks: int) -> int:
    """Return the bytes of KV cache per token on each of the ``ranks`` of an engine."""
    config = AutoConfig.from_pretrained(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * max(1, config.num_key_value_heads // ranks) * head * getattr(torch, dtype).itemsize


def trl(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """Build TRL's trainer, with the student in vLLM and the teacher in transformers. Returns it with the engine settings."""
    from trl import DistillationConfig, DistillationTrainer

    from benchmarks.trl_engine import engine_arguments

    args = DistillationConfig(
        **job.trainer_kwargs(),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_tensor_parallel_size=job.tensor_parallel_size,
        teacher_model_init_kwargs={"dtype": job.dtype},
    )
    with engine_arguments(**job.llm_kwargs(job.student)):
        trainer = DistillationTrainer(model=job.student, teacher_model=job.teacher, args=args, train_dataset=job.rows())
    return trainer, {"student": described(trainer.vllm_generation.llm.llm_engine.vllm_config)}


def under_autocast(trainer: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return TRL's trainer with mixed precision in the loss, and its settings.

    Under TRL 1.16 ``bf16=True`` does not enable it there (see `OSDTrainer.compute_loss`).
    """
    compute_loss = trainer.compute_loss

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with trainer.accelerator.autocast():
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = autocast
    return trainer, settings


def osd(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """Build OSD's trainer, with both models in one engine. Returns it with the engine settings of both sides."""
    from osd.train import OSDConfig, OSDTrainer

    kwargs = job.llm_kwargs(job.teacher, job.student)
    args = OSDConfig(**job.trainer_kwargs(), engine_kwargs=kwargs, vllm_tensor_parallel_size=job.tensor_parallel_size)
    trainer = OSDTrainer(model=job.student, teacher_model=job.teacher, args=args, train_dataset=job.rows())
    worker = trainer.vllm_generation.engine._frontend.worker
    assert worker is not None, "the engine must run in this process"
    return trainer, {"teacher": described(worker.vllm_config), "student": described(worker.student_config)}


def osd_server(job: TrainJob, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """Build OSD's trainer against the server of benchmarks/async_step.py. Returns it with what the server says of itself."""
    from osd.train import OSDConfig, OSDTrainer

    args = OSDConfig(**job.trainer_kwargs(), vllm_mode="server", vllm_server_base_url=os.environ[SERVER], **fields)
    trainer = OSDTrainer(model=job.student, teacher_model=job.teacher, args=args, train_dataset=job.rows())
    info = trainer.vllm_generation.pair.info()
    return trainer, {"limits": info["limits"], "transfer": info["state"]["transfer"], **fields}


def osd_async(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """Build OSD's trainer as `osd_server` does; the server samples while it trains."""
    return osd_server(job, async_generation=True)


def osd_running(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """Build OSD's trainer as `osd_async` does; two batches are ahead, and weights are updated under their requests."""
    return osd_server(job, async_generation=True, async_weight_updates="running", max_staleness=2)


def trl_server(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """Build TRL's trainer against the server of benchmarks/async_step.py, with the teacher in transformers."""
    from trl import DistillationConfig, DistillationTrainer

    server = {"vllm_mode": "server", "vllm_server_base_url": os.environ[SERVER]}
    args = DistillationConfig(**job.trainer_kwargs(), use_vllm=True, **server, teacher_model_init_kwargs={"dtype": job.dtype})
    trainer = DistillationTrainer(model=job.student, teacher_model=job.teacher, args=args, train_dataset=job.rows())
    return trainer, {}


def described(config: Any) -> dict[str, Any]:
    cache = config.cache_config
    return resolved(config) | {"kv_cache_tokens": (cache.num_gpu_blocks_override or cache.num_gpu_blocks) * cache.block_size}


SYSTEMS: dict[str, Callable[[TrainJob], tuple[Any, dict[str, Any]]]] = {
    "trl": trl,
    "trl_autocast": lambda job: under_autocast(*trl(job)),
    "osd": osd,
    "osd_server": osd_server,
    "osd_async": osd_async,
    "osd_running": osd_running,
    "trl_server": trl_server,
    "trl_server_autocast": lambda job: under_autocast(*trl_server(job)),
}


def instrument(trainer: Any, watch: Stopwatch) -> None:
    """Count the parts of the trainer's steps with the stopwatch. `Clock` adds the optimizer when training begins."""
    watch.around(trainer.vllm_generation, "sync_weights", "sync")
    watch.around(trainer.vllm_generation, "generate", "generate")
    if isinstance(engine := getattr(trainer.vllm_generation, "engine", None), RemoteEngine):
        watch.around(engine, "settle", "generate")  # of a batch that is sampled meanwhile, inside the sync
    watch.around(trainer, "compute_loss", "student")
    watch.around(trainer.accelerator, "backward", "student")
    watch.around(trainer.accelerator, "clip_grad_norm_", "optimizer")
    if trainer.teacher_model is None:
        watch.around(trainer._teacher, "columns", "teacher")
        watch.around(trainer._teacher, "supervision", "teacher")
    else:
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        watch.around(trainer, "_get_last_hidden_state", lambda model, *args, **kwargs: "teacher" if model is teacher else None)


class Clock(TrainerCallback):
    """Trainer callback that times the steps and samples the memory after each step timed as a whole."""

    def __init__(self, job: TrainJob, watch: Stopwatch, memory: Memory) -> None:
        self.job, self.watch, self.memory = job, watch, memory
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        self.watch.around(optimizer, "step", "optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counted = state.global_step - self.job.warm_up
        if counted == 0:
            self.watch.drain()
            self.memory.begin()
            self._since = time.perf_counter()
        elif 0 < counted <= self.job.steps:
            if counted == self.job.steps:
                self.watch.drain()
            now = time.perf_counter()
            self.seconds.append(now - self._since)
            self._since = now
            self.memory.look()
            if counted == self.job.steps:
                self.watch.start()
                self.memory.keep_looking()
        elif counted > self.job.steps:
            self.parts.append(dict.fromkeys(PARTS, 0.0) | self.watch.lap())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.stop_looking()


class Memory:
    """Memory peaks of the device: bytes allocated by torch, and bytes used in total.

    Allocated bytes include the weights and KV cache of the engine, also while it sleeps. Used bytes are read after each step
    timed as a whole, and every 20 ms during steps timed by part, because a sleeping engine is not in memory at the end of a
    step. Without a GPU this is the resident memory of the process.
    """

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.bytes: dict[str, int] = {}
        self._over = threading.Event()
        self._looking: threading.Thread | None = None

    def keep_looking(self) -> None:
        def look() -> None:
            while not self._over.wait(0.02):
                self.look()

        self._looking = threading.Thread(target=look, daemon=True)
        self._looking.start()

    def stop_looking(self) -> None:
        self._over.set()
        if self._looking is not None:
            self._looking.join()

    def begin(self) -> None:
        """Reset the peaks at the end of the warm-up."""
        if self.gpu:
            self.bytes["allocated_peak_before"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.bytes["allocated_between_steps"] = torch.cuda.memory_allocated()

    def look(self) -> None:
        if not self.gpu:
            self.bytes["resident_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return
        free, total = torch.cuda.mem_get_info()
        self.bytes |= {
            "allocated_peak": torch.cuda.max_memory_allocated(),
            "reserved_peak": torch.cuda.max_memory_reserved(),
            "device_used_peak": max(total - free, self.bytes.get("device_used_peak", 0)),
            "device_total": total,
        }


def check_lengths(log_history: list[dict[str, Any]], new_tokens: int) -> None:
    """Raise RuntimeError if a completion ended early, because the systems would not have done the same work."""
    lengths = {entry[f"completions/{end}_length"] for entry in log_history if "loss" in entry for end in ("min", "max")}
    if lengths != {new_tokens}:
        raise RuntimeError(f"every completion must have {new_tokens} tokens; the shortest and longest have {sorted(lengths)}")


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def run(spec: dict[str, Any], write: Callable[[Written], None]) -> Written:
    """Build the trainer named in ``spec`` and time its steps."""

    def measure(result: Written) -> None:
        job = TrainJob(**spec["job"])
        begin = time.perf_counter()
        trainer, result["settings"] = SYSTEMS[spec["system"]](job)
        result["start"] = {"ready_s": time.perf_counter() - begin}
        write(result)
        watch, memory = Stopwatch(torch.cuda.synchronize if job.gpu else lambda: None), Memory(job.gpu)
        instrument(trainer, watch)
        clock = Clock(job, watch, memory)
        trainer.add_callback(clock)
        trainer.train()
        check_lengths(trainer.state.log_history, job.new_tokens)
        ranks = gather_object([memory.bytes])
        result |= {
            "step_s": clock.seconds,
            "parts_s": clock.parts,
            "memory_bytes": {name: max(rank[name] for rank in ranks) for name in memory.bytes},
            "memory_bytes_of_ranks": ranks,
            "loss": logged(trainer, "loss"),
            "alpha": logged(trainer, "osd/alpha/mean"),
            "staleness": logged(trainer, "osd/engine/staleness"),
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "trainer": {k: v for k, v in asdict(job).items() if not isinstance(v, (str, dict))},
        }

    return guarded(measure, write)


if __name__ == "__main__":
    serve(run)
