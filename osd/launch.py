"""`osd train`: check the arguments, then run `osd.train.train_osd` under `accelerate launch`, or here if that runs already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from osd.data.configs import find

HELP = """\
usage: osd train --config FILE [--FLAG VALUE ...]

Train a student on samples from q*. The teacher scores every token while it is sampled.

start here:
  osd train --config math_qa                  a shipped config: base, distillation, math_qa or server; or your own YAML file
  osd train --config math_qa --dry_run        print the prompts of both sides for the first rows; loads no weights
  osd train --config math_qa --use_cpu --bf16 false

the settings that most runs set (every flag is a key of the YAML file too; flags win):
  --model_name_or_path MODEL                  the student
  --teacher_model_name_or_path MODEL          the teacher, with the student's tokenizer
  --dataset_name DATA                         a file, a folder or a dataset of the Hub, with a column `prompt`
  --privileged_template TEXT                  the teacher's prompt, with columns in braces: '{prompt} Answer: {answer}'
  --output_dir FOLDER                         checkpoints and the trained model
  --learning_rate X, --max_steps N, --max_completion_length N, --per_device_train_batch_size N

processes:
  --num_processes N                           GPUs of this machine to use [all of them]
  --accelerate_config FILE                    a shipped config of accelerate (one_gpu, ddp, fsdp2, zero3, cpu, cpu_ddp) or a
                                              file. Default: accelerate's own, else data parallel over --num_processes
  --num_machines, --machine_rank, --main_process_ip, --main_process_port: as for `accelerate launch`

  --help-all                                  every setting
"""
FORWARDED = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # set by torchrun, and by `accelerate launch` also for one process


def train(argv: Sequence[str]) -> None:
    """Run the training command. Replaces this process by `accelerate launch` unless a launcher started it.

    Raises:
        ValueError: a config that does not exist, an unknown key or flag.
        SystemExit: a run in this process failed.
    """
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return
    launch, rest = _split(argv)
    from osd.train.train_osd import command, parse

    if "--help-all" in rest:
        parse(["--help-all"])
    if any(name in os.environ for name in LAUNCHED):
        command(rest)
        return
    data, args, _ = parse(rest)  # one line for a mistake, before processes start
    if data.dry_run:
        command(rest)
    else:
        _replace_process([*_accelerate_flags(launch, use_cpu=args.use_cpu), "-m", "osd.train.train_osd", *rest])


def _split(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Separate the flags of the launch from those of training, and resolve the name of a shipped config."""
    parser = ArgumentParser(prog="osd train", add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for name in ("config", "accelerate_config", *FORWARDED):
        parser.add_argument(f"--{name}")
    parser.error = _one_line  # type: ignore[method-assign, assignment]
    launch, rest = parser.parse_known_args(list(argv))
    if "config" in launch:
        rest = ["--config", str(find(launch.config)), *rest]
    return launch, rest


def _one_line(message: str) -> NoReturn:
    raise ValueError(f"{message}; `osd train --help` says more")


def _accelerate_flags(launch: Namespace, *, use_cpu: bool) -> list[str]:
    """Return the flags of `accelerate launch`. Without a config of accelerate's, use the devices of this machine."""
    forwarded = [text for name in FORWARDED if name in launch for text in (f"--{name}", getattr(launch, name))]
    if "accelerate_config" in launch:
        path = find(launch.accelerate_config, key="accelerate_config", folder="accelerate")
        return ["--config_file", str(path), *forwarded]
    from accelerate.commands.config.config_args import default_config_file

    if os.path.isfile(default_config_file):
        return forwarded
    import torch

    gpus = 0 if use_cpu else torch.cuda.device_count()
    processes = getattr(launch, "num_processes", str(max(gpus, 1)))
    if gpus == 0 and processes != "1":
        path = find("cpu_ddp", folder="accelerate")
        return ["--config_file", str(path), *forwarded]
    defaults = [] if "num_processes" in launch else ["--num_processes", processes]
    defaults += [] if "num_machines" in launch else ["--num_machines", "1"]
    device = ["--cpu"] if gpus == 0 else ["--multi_gpu"] if processes != "1" or "num_machines" in launch else []
    # The trainer's own bf16 sets the precision.
    return [*forwarded, *defaults, *device, "--mixed_precision", "no", "--dynamo_backend", "no"]


def _replace_process(arguments: list[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, "-m", "osd.launch", *arguments])


def accelerate_launch() -> None:
    """Run `accelerate launch`. If a single training process fails, exit with its status: it has printed the reason itself."""
    from accelerate.commands.launch import main

    # Ctrl-C goes to the training process too, and that one ends the run. (A handler, unlike SIG_IGN, is not inherited.)
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)


if __name__ == "__main__":
    accelerate_launch()
