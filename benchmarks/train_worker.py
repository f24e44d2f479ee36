"""One trainer in a process of its own: train a few steps, and time them.

    python -m benchmarks.train_worker job.json out.json        (benchmarks/train_step.py does this)

After ``warm_up`` steps that are not counted come ``steps`` as they are in use, the device drained only before the first and
after the last of them, and then as many with the stopwatch on, which drains the device where a part begins and ends. A step
lasts from the end of the one before it to its own end, so nothing is left out. The parts, the same for both trainers:

    sync        `sync_weights()` of the generator: the student's weights into its engine
    generate    `generate()` of the generator, with everything that it does on the host; OSD fetches the record in it
    teacher     TRL: `_get_last_hidden_state(teacher)`; OSD: making batches of the recorded hidden states
    student     `compute_loss` and `accelerator.backward`, without the teacher; both output layers are in it
    optimizer   `accelerator.clip_grad_norm_` and `optimizer.step`
    other       all else: the data loader, tokenizing, metrics, logs, `zero_grad`
"""

from __future__ import annotations

import random
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, TrainerCallback

from benchmarks.checkpoints import text_of
from benchmarks.process import Written, guarded, serve
from benchmarks.stopwatch import PARTS, Stopwatch
from benchmarks.systems import resolved


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What both trainers are told.

    Attributes:
        teacher, student: model folders, with weights and tokenizer.
        gpu: run on CUDA.
        dtype: of the teacher, and of what the engines hold and compute in.
        student_dtype: of the weights that are trained. If it is not ``dtype``, passes run under autocast to it.
        prompt_tokens, new_tokens: of every prompt and every completion.
        completions: per optimizer step.
        micro_batch: completions per forward and backward pass.
        kv_tokens: room in the KV cache of each model that an engine holds.
        warm_up, steps: see the module's docstring.
        sleep: engines sleep between their `generate` calls; the teacher's weights are in OSD's engine, and not in TRL's.
        engine_kwargs: further ``vllm.LLM`` arguments for the engines of both.
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

    def trainer_kwargs(self) -> dict[str, Any]:
        """Arguments of TRL's `DistillationConfig`, which both have. What they do not name is TRL's default."""
        return dict(
            output_dir=self.output_dir,
            use_cpu=not self.gpu,
            bf16=self.dtype == "bfloat16",
            model_init_kwargs={"dtype": self.student_dtype},
            gradient_checkpointing=self.gradient_checkpointing,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=self.completions // self.micro_batch,
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
        """Arguments of an engine that holds these models: as many tokens in the KV cache of each."""
        size = sum(kv_bytes_per_token(model, self.dtype) for model in models) * self.kv_tokens
        kwargs = {"dtype": self.dtype, "kv_cache_memory_bytes": size}
        return kwargs | ({} if self.gpu else {"enforce_eager": True}) | self.engine_kwargs

    def rows(self) -> Dataset:
        """A prompt for each completion of the run: none comes twice, so no prefix cache helps."""
        rng, count = random.Random(0), self.completions * (self.warm_up + 2 * self.steps)
        return Dataset.from_list([{"prompt": text_of(rng.choices(range(10), k=self.prompt_tokens))} for _ in range(count)])


def kv_bytes_per_token(model: str, dtype: str) -> int:
    config = AutoConfig.from_pretrained(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * getattr(torch, dtype).itemsize


def trl(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """TRL's trainer: its generator holds the student in vLLM, the teacher is transformers'. And its engine's settings."""
    from trl import DistillationConfig, DistillationTrainer

    from benchmarks.trl_engine import engine_arguments

    args = DistillationConfig(
        **job.trainer_kwargs(), use_vllm=True, vllm_mode="colocate", teacher_model_init_kwargs={"dtype": job.dtype}
    )
    with engine_arguments(**job.llm_kwargs(job.student)):
        trainer = DistillationTrainer(model=job.student, teacher_model=job.teacher, args=args, train_dataset=job.rows())
    return trainer, {"student": described(trainer.vllm_generation.llm.llm_engine.vllm_config)}


def trl_autocast(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """The same in mixed precision, which ``bf16=True`` does not reach under TRL 1.16 (see `OSDTrainer.compute_loss`)."""
    trainer, settings = trl(job)
    compute_loss = trainer.compute_loss

    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with trainer.accelerator.autocast():
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = under_autocast
    return trainer, settings


def osd(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """OSD's trainer: both models in one engine, the teacher out of the record. And that engine's settings, side by side."""
    from trainers import OSDConfig, OSDTrainer

    args = OSDConfig(**job.trainer_kwargs(), engine_kwargs=job.llm_kwargs(job.teacher, job.student))
    trainer = OSDTrainer(model=job.student, teacher_model=job.teacher, args=args, train_dataset=job.rows())
    worker = trainer.vllm_generation.engine._worker()
    assert worker is not None, "the engine lives in this process"
    return trainer, {"teacher": described(worker.vllm_config), "student": described(worker.student_config)}


def described(config: Any) -> dict[str, Any]:
    cache = config.cache_config
    return resolved(config) | {"kv_cache_tokens": (cache.num_gpu_blocks_override or cache.num_gpu_blocks) * cache.block_size}


SYSTEMS: dict[str, Callable[[TrainJob], tuple[Any, dict[str, Any]]]] = {"trl": trl, "trl_autocast": trl_autocast, "osd": osd}


def instrument(trainer: Any, watch: Stopwatch) -> None:
    """Have the stopwatch count the parts of this trainer's steps; the optimizer's is set up when training begins."""
    watch.around(trainer.vllm_generation, "sync_weights", "sync")
    watch.around(trainer.vllm_generation, "generate", "generate")
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
    """Times the steps of one run, and looks at the memory after each that is as in use."""

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
    """Bytes of the device: allocated by torch (the engine's weights and KV cache with it, asleep or not), and used in all.

    Used is looked at after each step that is timed as a whole, and every few milliseconds of those whose parts are: an engine
    that sleeps after sampling is not there at the end of a step. Without a GPU, the process's resident memory.
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
        """The warm-up is over: from here on it is the memory of training."""
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
    """Raises RuntimeError if any completion ended early: the systems would not have done the same work."""
    lengths = {entry[f"completions/{end}_length"] for entry in log_history if "loss" in entry for end in ("min", "max")}
    if lengths != {new_tokens}:
        raise RuntimeError(f"every completion should have {new_tokens} tokens, and they have between {sorted(lengths)}")


def run(spec: dict[str, Any], write: Callable[[Written], None]) -> Written:
    """Build the trainer that ``spec`` names and time its steps."""

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
        result |= {
            "step_s": clock.seconds,
            "parts_s": clock.parts,
            "memory_bytes": memory.bytes,
            "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "alpha": [entry["alpha/mean"] for entry in trainer.state.log_history if "alpha/mean" in entry],
            "optimizer": type(trainer.optimizer.optimizer).__name__,
            "trainer": {k: v for k, v in asdict(job).items() if not isinstance(v, (str, dict))},
        }

    return guarded(measure, write)


if __name__ == "__main__":
    serve(run)
