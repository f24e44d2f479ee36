"""Benchmark of a training step whose samples come from a server: with and without overlap, and TRL's trainer, in one run.

    python benchmarks/async_step.py                                   # two GPUs: the first trains, the second samples
    python benchmarks/async_step.py --completions 256 --micro-batch 16
    python benchmarks/async_step.py --processes 4 --tensor-parallel-size 4     # four GPUs train, the next four hold the pair
    python benchmarks/async_step.py --systems osd_server osd_async --pair tiny+tiny --prompt-tokens 8 --new-tokens 8 \\
        --completions 4 --micro-batch 2 --steps 2                     # two processes on a CPU

osd_server    OSDTrainer with vllm_mode="server": samples from q*, then trains
osd_async     the same with async_generation: samples the next batch while it trains on one
osd_running   the same with weights updated under running requests, and two batches ahead
trl_server    TRL's DistillationTrainer in server mode: samples from the student, then runs a transformers teacher. TRL moves
              weights by NCCL alone, so this one needs GPUs
trl_server_autocast   the same with the loss under autocast (see benchmarks/train_step.py)

Models, prompts, lengths, loss, optimizer, dtypes, timing and the table are those of benchmarks/train_step.py. Each system has a
server of its own, which starts before it and ends after it: `osd serve` with the pair, or `vllm serve` with TRL's student.
The servers of both OSD systems are alike, so the second one finds what the first has compiled.
`generate` is the time that training waits for samples. In the steps timed by part, the stopwatch drains the trainer's device
around each part, so only the steps timed as a whole (`step_s`) show what the overlap gains.

Writes a JSON after each system, so finished results are kept.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks import serving, train_step
from benchmarks.process import GPU, environment, exit_on_sigterm, nothing, run_worker
from benchmarks.train_worker import TrainJob

SYSTEMS = {
    "osd_server": "OSDTrainer and a server, one after the other",
    "osd_async": "OSDTrainer and a server at the same time",
    "osd_running": "OSDTrainer and a server at the same time, weights under running requests",
    "trl_server": "TRL DistillationTrainer and a server",
    "trl_server_autocast": "TRL DistillationTrainer and a server, autocast",
}
ON_A_CPU = ["osd_server", "osd_async", "osd_running"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = train_step.parser(__doc__, SYSTEMS, list(SYSTEMS) if GPU else ON_A_CPU)
    args = train_step.checked(parser, parser.parse_args(argv))
    if args.sleep:
        parser.error("--sleep: a server does not sleep")
    if not GPU and (asked := sorted(set(args.systems) - set(ON_A_CPU))):
        parser.error(f"--systems {' '.join(asked)}: TRL moves weights by NCCL, which needs GPUs")
    return args


def engine_kwargs(system: str, job: TrainJob) -> dict[str, Any]:
    """Return the arguments of a server's engine, which samples for all processes: those of the engines of train_step.py."""
    models = (job.teacher, job.student) if system.startswith("osd") else (job.student,)
    return {
        **replace(job, processes=job.tensor_parallel_size).llm_kwargs(*models),
        "tensor_parallel_size": job.tensor_parallel_size,
        "max_model_len": job.prompt_tokens + job.new_tokens,
        "max_num_seqs": job.completions,
        "weight_transfer_config": {"backend": "nccl" if job.gpu else "http"},
    }


@contextmanager
def server(system: str, job: TrainJob, folder: Path, seconds: float) -> Iterator[dict[str, str]]:
    """Run a system's server on the GPUs after its trainer's; yields what the trainer has in its environment.

    Args:
        seconds: for the server to start.
    """
    env = environment(folder / f"caches-server-{'osd' if system.startswith('osd') else 'trl'}")
    kwargs, log, place = (
        engine_kwargs(system, job),
        folder / f"{system}.server",
        {"first_gpu": job.processes, "seconds": seconds},
    )
    if system.startswith("osd"):
        with serving.server(job.teacher, job.student, kwargs, env, log, **place) as given:
            yield given
    else:
        command = ["-m", "vllm.entrypoints.cli.main", "serve", job.student]
        command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
        # TRL's client sends no key, and asks for vLLM's development mode.
        with serving.started(command, kwargs, env | {"VLLM_SERVER_DEV_MODE": "1"}, log, **place) as given:
            yield given


def measured(args: argparse.Namespace, spec: dict[str, Any], folder: Path, left: float | None) -> dict[str, Any]:
    """Run a system's server and its trainer; return what the trainer wrote."""
    begin, left = time.monotonic(), math.inf if left is None else left
    try:
        with server(system := spec["system"], TrainJob(**spec["job"]), folder, left) as given:
            env = environment(folder / f"caches-{system}") | {"HF_HUB_OFFLINE": "1"} | given
            left -= time.monotonic() - begin
            seconds = None if left == math.inf else left
            return run_worker(spec, env, folder, seconds, "benchmarks.train_worker", train_step.launcher(args))
    except RuntimeError as error:
        return nothing(str(error))


def main(argv: list[str] | None = None) -> int:
    return train_step.run_systems(parse_args(argv), argv, "async_step", SYSTEMS, measured, ours="osd_async")


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
