"""Train a student with OSD: `accelerate launch trainers/train_osd.py --config configs/distillation.yaml [--flag value]`.

Flags win over the YAML file. An unknown key or flag is an error. The data is a file or folder on this machine, a dataset of the
Hub, or a mixture of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

import yaml

from osd.terminal import silence_libraries

if __name__ == "__main__":  # before TRL imports vLLM
    silence_libraries()

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from osd.core import suggest
from osd.data.parse import data_keys, split_sections
from osd.engine.served import ServerUnavailable
from osd.interrupts import kept_interrupts
from osd.train import OSDConfig, OSDTrainer
from osd.train.data import DataArguments, load_data
from osd.train.preparation import Plan, plan

_HOLDERS = (DataArguments, OSDConfig, ModelConfig)
_DRY_ROWS = 3

_HELP = """\
usage: accelerate launch trainers/train_osd.py --config FILE [--FLAG VALUE ...]

Train a student on completions drawn from q*, the optimal mixture of teacher and student. Every flag is also a YAML key.
"""
_SHORT = {
    "models": "model_name_or_path teacher_model_name_or_path use_peft",
    "data": "dataset_name dataset_test_name datasets test_split_size prompt_column privileged_template drop_bad_rows",
    "sampling": "alpha_method alpha_max temperature max_completion_length",
    "training": "learning_rate per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs bf16 use_cpu",
    "engine": "vllm_gpu_memory_utilization vllm_max_model_length engine_kwargs",
    "run": "output_dir save_steps resume_from_checkpoint dry_run",
}


class Parser(TrlParser):
    """TRL's parser with one-line errors. It skips keys of a YAML file for the data commands (rule: osd/data/parse.py)."""

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        top, _ = split_sections(values)
        known = training_keys()
        for key in top:
            if key not in known | data_keys():
                raise ValueError(f"unknown key {key!r}{suggest(key, known | data_keys())}; no command knows it")
        return super().set_defaults_with_config(
            **{action.dest: self._checked(action, top[action.dest]) for action in self._actions if action.dest in top}
        )

    @staticmethod
    def _checked(action: Any, value: Any) -> Any:
        """Return a value as a flag would give it: argparse converts and checks text."""
        if isinstance(value, (bool, int, float)):
            return str(value)
        converts = action.type not in (None, str, dict) and action.nargs != "+"
        if isinstance(value, (list, dict)) and converts:
            raise ValueError(f"{action.dest}={value!r} is one value, not a list or a mapping")
        return value

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def training_keys() -> set[str]:
    """Return every key that a YAML file can have for training."""
    return {entry.name for holder in _HOLDERS for entry in fields(holder)}


def parse(argv: Sequence[str] | None = None) -> tuple[DataArguments, OSDConfig, ModelConfig]:
    """Parse `--config file.yaml` and flags.

    Raises:
        ValueError: an unknown key or flag, a bad value, a file that cannot be read, no model or no data.
        SystemExit: `--help` or `--help-all`.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(_HOLDERS, allow_abbrev=False, add_help=False, usage="train_osd.py --config FILE [--FLAG VALUE ...]")  # type: ignore[arg-type]
    if {"-h", "--help", "--help-all"} & set(given):
        print(parser.format_help().replace("%%", "%") if "--help-all" in given else _short_help())
        raise SystemExit(0)
    _check_file(given)
    *parsed, unknown = parser.parse_args_and_config(given, return_remaining_strings=True)
    if unknown:
        flags = sorted(f"--{key}" for key in training_keys())
        raise ValueError(f"unknown argument {unknown[0]!r}{suggest(unknown[0], flags)}; --help-all lists all of them")
    data, args, model = parsed
    if (data.dataset_name is None and not data.datasets) or model.model_name_or_path is None:
        raise ValueError("dataset_name (or datasets) and model_name_or_path must be set, in the YAML file or as flags")
    return data, args, model


def _check_file(argv: list[str]) -> None:
    for i, flag in enumerate(argv):
        if flag.startswith("--config="):
            argv[i : i + 1] = flag.split("=", 1)  # the form that TRL's parser knows
    if "--config" not in argv:
        return
    rest = argv[argv.index("--config") + 1 :]
    if not rest:
        raise ValueError("--config needs a file")
    path = Path(rest[0])
    if not path.is_file():
        raise ValueError(f"config={str(path)!r} is not a file" if path.exists() else f"config={str(path)!r} does not exist")
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r} is not YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise ValueError(f"config={str(path)!r} is not a mapping of keys to values")


def _short_help() -> str:
    known = {entry.name: entry for holder in _HOLDERS for entry in fields(holder)}
    lines = [_HELP]
    for title, names in _SHORT.items():
        lines.append(f"{title}:")
        for name in names.split():
            text = f"--{name}".ljust(34) + known[name].metadata["help"].replace("%%", "%")
            shown = known[name].default
            text += f" [{shown}]" if isinstance(shown, (str, int, float)) and shown is not False else ""
            lines.append(fill(text, 118, initial_indent="  ", subsequent_indent=" " * 36, break_on_hyphens=False))
    return "\n".join([*lines, f"\n--help-all lists all {len(known)} options, with those of TRL and transformers."])


def main(argv: Sequence[str] | None = None) -> OSDTrainer | None:
    """Parse, load, train, save.

    Returns:
        the trainer, with its engine shut down; None after `--dry_run`.
    """
    data, args, model = parse(argv)
    train_dataset, eval_dataset = load_data(
        data, evaluate=args.eval_strategy != "no", seed=args.seed, drop_bad_rows=args.drop_bad_rows
    )
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **args.student_init_kwargs(),
    }
    given = {
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }
    if data.dry_run:
        planned = plan(model.model_name_or_path, args, **given)
        _show(planned, train_dataset)
        planned.datasets(train_dataset, eval_dataset)
        return None
    trainer = OSDTrainer(model=model.model_name_or_path, args=args, **given)
    trainer.dataset_name = data.dataset_name
    with trainer:  # closed last: vLLM ends the process group that it was given
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if trainer.is_fsdp_enabled:  # accelerate's SHARDED_STATE_DICT would save no model
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(args.output_dir)
        trainer.create_model_card()
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=data.dataset_name)
        trainer.accelerator.print(
            f"trained model in {args.output_dir}; next: osd compare --model_name_or_path {args.output_dir} "
            f"--teacher_model_name_or_path {trainer.vllm_generation.engine.config.teacher} --input FILE --output FOLDER"
        )
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.end_training()  # the process group, with its threads
    return trainer


def _show(planned: Plan, dataset: Any) -> None:
    """Print both prompts of the first rows."""
    from osd.data.dry_run import described

    renderer = planned.renderer
    for number, row in enumerate(islice(iter(dataset), _DRY_ROWS)):
        if (problem := renderer.problem(row)) is not None:
            print(f"row {number}: rejected: {problem}")
            continue
        [student] = renderer.student_ids([renderer.student_prompt(row)])
        [teacher] = renderer.teacher_ids([row])
        print(described(f"row {number}", renderer.student_tokenizer, student, renderer.teacher_tokenizer, teacher))


def command(argv: Sequence[str] | None = None) -> None:
    """Run `main` as a program: an error of the user ends in one line and status 2, Ctrl-C in 130, no server in 1."""
    try:
        with kept_interrupts():
            main(argv)
    except ValueError as error:
        if os.environ.get("OSD_TRACEBACK"):
            raise
        _end(f"error: {error} (OSD_TRACEBACK=1 shows where)", 2)
    except ServerUnavailable as error:
        if os.environ.get("OSD_TRACEBACK"):
            raise
        _end(f"failed: {error} (OSD_TRACEBACK=1 shows where)", 1)
    except KeyboardInterrupt:
        _end("interrupted; `--resume_from_checkpoint last` goes on from the newest whole checkpoint", 130)


def _end(message: str, status: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # every process ends for the same reason
        print(f"osd train: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    command()
