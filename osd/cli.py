"""The `osd` command. Each subcommand imports what it needs when it runs, so that `osd --help` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

HELP = """\
usage: osd COMMAND [--help] ...

Semi-on-policy data from two models: every token drawn from q* ∝ π_θ^(1-α) π_t^α.

commands:
  generate   sample completions for a file of prompts, with log-probabilities and α of every token
  inspect    one HTML page about the data that `generate` wrote
  compare    teacher, student, linear mixture and q* on the same prompts: is it worth it for this pair?

start here:
  osd generate --config configs/math_qa.yaml --input problems.jsonl --output data/
  osd inspect data/
  osd COMMAND --help

Training has an entry of its own: accelerate launch trainers/train_osd.py --config configs/math_qa.yaml
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; what the user got wrong ends in one line on stderr and status 2, a run without data in 1."""
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
        sys.exit(_refused("", f"unknown command {command!r}; use {', '.join(COMMANDS)}"))
    # Set before vLLM is imported; its own log would tear the progress bar.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        COMMANDS[command](rest)
    except ValueError as error:
        if os.environ.get("OSD_TRACEBACK"):
            raise
        sys.exit(_refused(command, str(error)))
    except OSError as error:  # a full disk, say
        if os.environ.get("OSD_TRACEBACK"):
            raise
        sys.exit(f"osd {command}: failed: {error}{_going_on(command)}")
    except KeyboardInterrupt:
        print(f"\nosd {command}: interrupted{_going_on(command)}", file=sys.stderr)
        sys.exit(130)


def _going_on(command: str) -> str:
    return "; `--resume` goes on after the last finished shard" if command == "generate" else ""


def _refused(command: str, message: str) -> int:
    print(f"osd {command}".rstrip() + f": error: {message}", file=sys.stderr)
    return 2


def _generate(argv: Sequence[str]) -> None:
    from osd.data.parse import parse
    from osd.data.settings import GenerateConfig

    settings = parse(
        GenerateConfig,
        argv,
        training_keys=_training_keys,
        prog="osd generate",
        description="Sample completions from q* into sharded files, with everything that was known of every token.",
    )
    from osd.data.generate import NothingUsable, generate
    from osd.data.pair import EnginePair

    try:
        counts = generate(settings, EnginePair)
    except NothingUsable as error:
        sys.exit(f"osd generate: failed: {error}")
    removed = "".join(f"\n  {count} removed by {name}" for name, count in counts.removed.items())
    rejected = f"\n  {counts.rejected} rejected, see rejected.jsonl" if counts.rejected else ""
    print(
        f"{counts.drawn} samples of {counts.tokens} tokens drawn, mean α {counts.alpha_mean:.3f}\n"
        f"  {counts.kept} kept in {settings.output}{removed}{rejected}"
    )


def _compare(argv: Sequence[str]) -> None:
    from osd.data.parse import parse
    from osd.data.settings import CompareConfig

    settings = parse(
        CompareConfig,
        argv,
        training_keys=_training_keys,
        prog="osd compare",
        description="Sample the same prompts from student, teacher, linear mixtures and q*, and score them with both models.",
    )
    from osd.data.comparison import compare, sentence
    from osd.data.generate import NothingUsable
    from osd.data.pair import EnginePair

    try:
        result = compare(settings, EnginePair)
    except NothingUsable as error:
        sys.exit(f"osd compare: failed: {error}")
    headline, reasons = sentence(result)
    print(f"{headline}\n{reasons}\n{settings.output}/compare.html, compare.png, compare.json")


def _inspect(argv: Sequence[str]) -> None:
    from argparse import ArgumentParser
    from pathlib import Path

    parser = ArgumentParser(
        prog="osd inspect", description="One HTML page about data that `osd generate` wrote.", allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .parquet or .jsonl file, or a whole output folder")
    parser.add_argument("--output", type=Path, metavar="PAGE", help="the page to write [inspect.html in the folder]")
    parser.add_argument("--shown", type=int, default=200, metavar="N", help="completions on the page, at most [200]")
    flags = parser.parse_args(argv)
    if flags.shown < 1:
        raise ValueError(f"shown={flags.shown} must be at least 1")
    from osd.data.inspection import inspect

    print(inspect(flags.file, flags.output, shown=flags.shown))


def _training_keys() -> set[str]:
    from trainers.train_osd import training_keys

    return training_keys()


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"generate": _generate, "inspect": _inspect, "compare": _compare}
