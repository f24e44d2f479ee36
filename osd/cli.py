"""The `osd` command. Each subcommand imports what it needs when it runs, so that `osd --help` is quick."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from multiprocessing import current_process
from typing import TYPE_CHECKING, Any

from osd.core import suggest
from osd.interrupts import kept_interrupts
from osd.terminal import silence_libraries

if TYPE_CHECKING:
    from osd.data.settings import CompareConfig, GenerateConfig

if current_process().name != "MainProcess":  # a process that the engine spawned imports the `osd` script, before vLLM
    silence_libraries()
    if sys.argv[1:2] == ["serve"]:  # of vLLM's front ends, which import nothing of ours before vLLM
        pass

HELP = """\
usage: osd COMMAND [--help] ...

Semi-on-policy data from two models: every token drawn from q* ∝ π_θ^(1-α) π_t^α.

commands:
  check      say before anything loads whether a pair samples and trains, and what memory it needs
  generate   sample completions for a file of prompts, with log-probabilities and α of every token
  inspect    write one HTML page about the data that `generate` wrote
  compare    sample the same prompts from teacher, student, linear mixture and q*: is it worth it for this pair?
  train      train the student on samples from q*, under accelerate
  serve      serve the OpenAI API from q*: vLLM's own server, with both models in it
  env        print versions and devices, for a bug report

start here:
  osd check TEACHER STUDENT
  osd generate --config math_qa --input problems.jsonl --output data/ --dry_run
  osd generate --config math_qa --input problems.jsonl --output data/
  osd inspect data/
  osd train --config math_qa
  osd COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake ends in one line on stderr and status 2; a failed run in status 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        from osd import __version__

        print(f"osd {__version__}")
        return
    command, *rest = arguments
    if command not in COMMANDS:
        near = suggest(command, COMMANDS)
        sys.exit(_refused("", f"unknown command {command!r}{near}; use {', '.join(COMMANDS)}"))
    if command not in ("env", "serve"):  # env shows the variables that the user has set, serve has vLLM's log
        silence_libraries()
    try:
        with kept_interrupts():
            COMMANDS[command](rest)
    except (ValueError, ImportError) as error:
        if os.environ.get("OSD_TRACEBACK"):
            raise
        sys.exit(_refused(command, str(error)))
    except (OSError, RuntimeError) as error:  # a full disk, an engine that does not start
        if os.environ.get("OSD_TRACEBACK"):
            raise
        sys.exit(f"osd {command}: failed: {error}{_going_on(command)} (OSD_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        print(f"\nosd {command}: interrupted{_going_on(command)}", file=sys.stderr)
        sys.exit(130)


def _going_on(command: str) -> str:
    return "; `--resume` goes on after the last sample that was written" if command == "generate" else ""


def _refused(command: str, message: str) -> int:
    print(f"osd {command}".rstrip() + f": error: {message}", file=sys.stderr)
    return 2


def _check(argv: Sequence[str]) -> None:
    from argparse import ArgumentParser

    from osd.data.parse import strict

    parser = strict(ArgumentParser)(
        prog="osd check",
        description="Say whether a pair samples and trains, what memory it needs and what to set; load no weights.",
        epilog="exit status: 0 it samples and trains, 1 it does not sample, 2 a wrong flag, 3 it samples but does not train",
        allow_abbrev=False,
    )
    parser.add_argument("teacher", metavar="TEACHER", help="model id or local path")
    parser.add_argument("student", metavar="STUDENT", help="model id or local path, with the teacher's tokenizer")
    parser.add_argument(
        "--max_model_len",
        type=int,
        metavar="N",
        help="longest prompt and completion together, in tokens [4096, or the models' own]",
    )
    parser.add_argument("--max_num_seqs", type=int, default=64, metavar="N", help="requests at once [64]")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of one engine, tensor parallel [1]")
    parser.add_argument("--gpu_memory", type=float, metavar="GIB", help="memory of each GPU [this machine's, else 80]")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the engine's weights [auto]"
    )
    parser.add_argument("--num_speculative_tokens", default="0", metavar="N", help="drafts of the student, 0 to 16 or auto [0]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    flags = parser.parse_args(argv)
    from osd.check import Wanted, check

    memory = _gpu_memory() if flags.gpu_memory is None else flags.gpu_memory * 2**30
    given = {name: value for name, value in vars(flags).items() if name not in ("teacher", "student", "gpu_memory")}
    report = check(flags.teacher, flags.student, Wanted(gpu_memory=memory, **given))
    print(*report.lines(), sep="\n")
    if report.status:
        sys.exit(report.status)


def _gpu_memory() -> float:
    """Return the bytes of this machine's first GPU, or of one of 80 GiB."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * 2**30


def _generate(argv: Sequence[str]) -> None:
    from osd.data.parse import parse
    from osd.data.settings import GenerateConfig

    settings = parse(
        GenerateConfig,
        argv,
        training_keys=_training_keys,
        prog="osd generate",
        description="Sample completions from q* into sharded files, with the record of every token.",
    )
    from osd.data.generate import NothingUsable, generate

    start_pair = _pair(settings)
    if settings.dry_run:
        return _dry_run(settings, start_pair)
    try:
        counts = generate(settings, start_pair)
    except NothingUsable as error:
        sys.exit(f"osd generate: failed: {error}")
    removed = "".join(f"\n  {count} removed by {name}" for name, count in counts.removed.items())
    rejected = f"\n  {counts.rejected} rejected, see rejected.jsonl" if counts.rejected else ""
    _say(
        settings.quiet,
        f"{counts.drawn} samples of {counts.tokens} tokens drawn, mean α {counts.alpha_mean:.3f}\n"
        f"  {counts.kept} kept in {settings.output}{removed}{rejected}\n"
        + (
            f"next: osd inspect {shlex.quote(settings.output or '')}"
            if counts.kept
            else "next: change the filters or the prompts"
        ),
    )
    return None


def _pair(settings: GenerateConfig) -> Any:
    if settings.server is None:
        from osd.data.pair import EnginePair

        return EnginePair
    from osd.data.remote import ServerPair

    return ServerPair


def _compare(argv: Sequence[str]) -> None:
    from osd.data.parse import parse
    from osd.data.settings import CompareConfig
    from osd.report.requirements import check_packages

    settings = parse(
        CompareConfig,
        argv,
        training_keys=_training_keys,
        prog="osd compare",
        description="Sample the same prompts from student, teacher, linear mixtures and q*, and score them with both models.",
    )
    check_packages("osd compare")
    from osd.data.comparison import compare, sentence
    from osd.data.generate import NothingUsable
    from osd.data.pair import EnginePair

    if settings.dry_run:
        return _dry_run(settings, EnginePair)
    try:
        result = compare(settings, EnginePair)
    except NothingUsable as error:
        sys.exit(f"osd compare: failed: {error}")
    headline, reasons = sentence(result)
    rejected = f"{len(result['rejected'])} rows were rejected, compare.json says why\n" if result["rejected"] else ""
    _say(
        settings.quiet,
        f"{headline}\n{reasons}\n{rejected}{settings.output}/compare.html, compare.png, compare.json\n"
        f"next: open {settings.output}/compare.html in a browser; `osd train` with the same config trains a student",
    )
    return None


def _dry_run(settings: GenerateConfig | CompareConfig, start_pair: Any) -> None:
    from osd.data.dry_run import dry_run

    for shown in dry_run(settings, start_pair):
        print(shown)
    print("nothing was sampled; without --dry_run the run starts", file=sys.stderr)


def _inspect(argv: Sequence[str]) -> None:
    from argparse import ArgumentParser
    from pathlib import Path

    from osd.data.parse import strict
    from osd.report.requirements import check_packages

    parser = strict(ArgumentParser)(
        prog="osd inspect", description="Write one HTML page about data that `osd generate` wrote.", allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .parquet or .jsonl file, or a whole output folder")
    parser.add_argument("--output", type=Path, metavar="PAGE", help="the page to write [inspect.html in the folder]")
    parser.add_argument("--shown", type=int, default=200, metavar="N", help="completions on the page, at most [200]")
    parser.add_argument(
        "--answer_match",
        metavar="HOW",
        help="when a completion is right: final, exact, contains, math, regex or module:function [as in run.json, else final]",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    flags = parser.parse_args(argv)
    if flags.shown < 1:
        raise ValueError(f"shown={flags.shown} must be at least 1")
    check_packages("osd inspect")
    from osd.data.inspection import inspect

    page = inspect(flags.file, flags.output, shown=flags.shown, answer_match=flags.answer_match)
    if not flags.quiet:
        print(page)
        print("next: open the page in a browser", file=sys.stderr)


def _train(argv: Sequence[str]) -> None:
    from osd.launch import train

    train(argv)


def _serve(argv: Sequence[str]) -> None:
    from osd.engine.backend.server import serve

    serve(argv)


def _env(argv: Sequence[str]) -> None:
    from osd.environment import report

    if argv:
        raise ValueError(f"unknown argument {argv[0]!r}; `osd env` takes none")
    print(report())


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text)


def _training_keys() -> set[str]:
    from osd.train.train_osd import training_keys

    return training_keys()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "check": _check,
    "generate": _generate,
    "inspect": _inspect,
    "compare": _compare,
    "train": _train,
    "serve": _serve,
    "env": _env,
}
