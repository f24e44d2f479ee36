"""Benchmark of a training step whose samples come from a server: with and without overlap, and TRL's trainer, in one run.

    python benchmarks/async_step.py                                   # two GPUs: the first trains, the second samples
    python benchmarks/async_step.py --completions 256 --micro-batch 16
    python benchmarks/async_step.py --processes 4 --tensor-parallel-size 4     # four GPUs train, the next four hold the pair
    python benchmarks/async_step.py --systems osd_server osd_async --pair tiny+tiny --prompt-tokens 8 --new-tokens 8 \\
        --completions 4 --micro-batch 2 --steps 2                     # two processes on a CPU

osd_server    OSDTrainer with vllm_mode="server": samples from q*, then trains
osd_async     the same with async_generation: samples the next batch while it trains on one
trl_server    TRL's DistillationTrainer in server mode: samples from the student, then runs a transformers teacher. TRL moves
              weights by NCCL alone, so this one needs GPUs
trl_server_autocast   the same with the loss under autocast (see benchmarks/train_step.py)

Models, prompts, lengths, loss, optimizer, dtypes, timing and the table are those of benchmarks/train_step.py. Each system has a
server of its own, which starts before it and ends after it: `osd serve` with the pair, or `vllm serve` with TRL's student.
`generate` is the time that training waits for samples. In the steps timed by part, the stopwatch drains the trainer's device
around each part, so only the steps timed as a whole (`step_s`) show what the overlap gains.

Writes a JSON after each system, so finished results are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks import serving, train_step
from benchmarks.process import GPU, environment, exit_on_sigterm, header, nothing, result_path, run_worker
from benchmarks.train_worker import TrainJob

SYSTEMS = {
    "osd_server": "OSDTrainer and a server, one after the other",
    "osd_async": "OSDTrainer and a server at the same time",
    "trl_server": "TRL DistillationTrainer and a server",
    "trl_server_autocast": "TRL DistillationTrainer and a server, autocast",
}
ON_A_CPU = ["osd_server", "osd_async"]


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
def server(system: str, job: TrainJob, folder: Path) -> Iterator[dict[str, str]]:
    """Run a system's server on the GPUs after its trainer's; yields what the trainer has in its environment."""
    kwargs, env, log = engine_kwargs(system, job), environment(folder / f"caches-server-{system}"), folder / f"{system}.server"
    if system.startswith("osd"):
        with serving.server(job.teacher, job.student, kwargs, env, log, first_gpu=job.processes) as given:
            yield given
    else:
        command = ["-m", "vllm.entrypoints.cli.main", "serve", job.student]
        command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
        # TRL's client sends no key, and asks for vLLM's development mode.
        with serving.started(command, kwargs, env | {"VLLM_SERVER_DEV_MODE": "1"}, log, first_gpu=job.processes) as given:
            yield given


def measured(args: argparse.Namespace, spec: dict[str, Any], folder: Path, left: float | None) -> dict[str, Any]:
    """Run a system's server and its trainer; return what the trainer wrote."""
    try:
        with server(system := spec["system"], TrainJob(**spec["job"]), folder) as given:
            env = environment(folder / f"caches-{system}") | {"HF_HUB_OFFLINE": "1"} | given
            return run_worker(spec, env, folder, left, "benchmarks.train_worker", train_step.launcher(args))
    except RuntimeError as error:
        return nothing(str(error))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    begin = time.monotonic()
    command = ["python", "benchmarks/async_step.py", *(sys.argv[1:] if argv is None else argv)]
    result: dict[str, Any] = {**header(command, vars(args)), "systems": {}, "summary": {}}
    path = result_path(args.output, f"async_step_{args.pair}", result["hardware"]["device"])
    with tempfile.TemporaryDirectory(prefix="osd-bench-") as scratch:
        folder = Path(scratch)
        models = train_step.make_models(args, folder / "models")
        for system in args.systems:
            train_step.say(begin, f"{SYSTEMS[system]} ...")
            left = None if args.time_limit is None else args.time_limit - (time.monotonic() - begin)
            spec = {"system": system, "job": train_step.job(args, models, folder / f"output-{system}")}
            none_left = left is not None and left <= 0
            result["systems"][system] = nothing("no time was left") if none_left else measured(args, spec, folder, left)
            result["summary"] = train_step.summarise(result["systems"], "osd_async")
            path.write_text(json.dumps(result, indent=1) + "\n")
            train_step.say(begin, train_step.describe(result["systems"][system]))
    print(f"\n{train_step.table(result['summary'])}\n\nwritten to {path}")
    return int(any(system["status"] != "ok" for system in result["systems"].values()))


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
