"""Checkpoints of a run: only whole ones, with the same models, mixing and order of prompts, are resumed.

RUN_FILE in a checkpoint holds the models and the mixing of the run, and the number of weight syncs. It is written last: a
checkpoint without it was left by a killed process and is never resumed from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.trainer.utils import RepeatSampler

if TYPE_CHECKING:
    from osd.engine.engine import PairConfig, PairEngine
    from osd.engine.served import ServedPair
    from osd.train.config import OSDConfig
    from osd.train.trainer import OSDTrainer

RUN_FILE = "osd_run.json"
LAST = "last"
_SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SAMPLING = (
    "alpha_schedule",
    "alpha_min_end",
    "alpha_max_end",
    "fixed_alpha_end",
    "alpha_schedule_steps",
    "mix_tokens",
    "mix_fraction",
)


def start_of(checkpoint: str | None) -> datetime:
    """Return the time at which a checkpoint's run started; now, if there is no checkpoint or it does not say."""
    path = None if checkpoint is None else Path(checkpoint) / RUN_FILE
    saved = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    return datetime.fromisoformat(saved["dates"]["started"]) if "dates" in saved else datetime.now()


def run_of(
    model: Any, pair: PairConfig | PairEngine | ServedPair, args: OSDConfig, started: datetime | None = None
) -> dict[str, Any]:
    """Return the identity of a run as plain values for JSON: both models, by name and shape, the mixing and the start.

    Args:
        model: the student as given to the trainer.
        pair: the return value of `planned_pair`.
        started: when the run began; None leaves it out.
    """
    config: Any = getattr(pair, "config", pair)  # of a running engine, or a server
    student = {**config.engine_kwargs, **config.student_kwargs}
    teacher = {**config.engine_kwargs, **config.teacher_kwargs}
    return {
        "student": _named(model, student) if isinstance(model, str) else _shape(model.name_or_path, model.config),
        "teacher": _named(config.teacher, teacher),
        "sampling": args.mixing().to_dict() | {name: getattr(args, name) for name in _SAMPLING},
        **({"dates": {"started": started.isoformat()}} if started else {}),
    }


def _named(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    options = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    return _shape(name, AutoConfig.from_pretrained(name, **options))


def _shape(name: str, config: Any) -> dict[str, Any]:
    # Only the last part of a path: the models may be in another folder when the run is resumed.
    text = config.get_text_config()
    return {"name": Path(name).name, **{key: getattr(text, key, None) for key in _SHAPE}}


def check_same_run(checkpoint: str | Path, run: dict[str, Any]) -> int:
    """Return the weights version of the run at this checkpoint.

    Raises:
        ValueError: a checkpoint that is not whole or not of an OSDTrainer; one of a run with another model or mixing, naming
            the difference.
    """
    path = Path(checkpoint) / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} has no {RUN_FILE}: OSDTrainer did not write it, or was stopped before "
            f"it was whole. Use another checkpoint, or {LAST!r} for the newest whole one in output_dir"
        )
    saved = json.loads(path.read_text())
    for part, values in run.items():
        for key, value in values.items():
            before = saved.get(part, {}).get(key)
            if before != value and part != "dates":
                raise ValueError(
                    f"resume_from_checkpoint={str(checkpoint)!r} is of a run whose {part} had {key}={before!r}, and this one's "
                    f"has {value!r}. Resume with what the run began with, or begin a new run from the checkpoint's weights: "
                    "set model_name_or_path to it, and no resume_from_checkpoint"
                )
    return saved["weights_version"]


def resolve(resume: str | bool | None, output_dir: str | None) -> str | None:
    """Return the checkpoint to resume from, or None to begin.

    Args:
        resume: a folder; "last" for the newest whole checkpoint in `output_dir`, or None if there is none; True for the newest.

    Raises:
        ValueError: True without a whole checkpoint.
    """
    if str(resume).lower() in ("true", "false"):  # of the command line
        resume = str(resume).lower() == "true"
    if resume not in (True, LAST):
        return resume or None  # type: ignore[return-value]
    folders = [path.parent for path in Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*/{RUN_FILE}")]
    if not folders and resume is True:
        raise ValueError(f"resume_from_checkpoint=True: there is no whole checkpoint in {output_dir!r}")
    return str(max(folders, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))) if folders else None


@contextmanager
def marked_when_whole(trainer: OSDTrainer, folder: Path, run: dict[str, Any], weights_version: int) -> Iterator[None]:
    """Keep RUN_FILE out of a checkpoint until every process has written its part, then write it.

    Older checkpoints are deleted after that; transformers would delete them before the new one is whole.
    """
    args, path = trainer.args, folder / RUN_FILE
    limit, args.save_total_limit = args.save_total_limit, None
    if args.should_save:
        path.unlink(missing_ok=True)  # an earlier run's, in the same output_dir
    try:
        yield
    finally:
        args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({**run, "weights_version": weights_version}, indent=2))
        os.replace(draft, path)
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(output_dir=str(folder.parent), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch alone.

    TRL's sampler draws a permutation at the start of every epoch from one generator, so a run that is resumed in its third
    epoch would use the order of the first.
    """

    def __init__(self, like: Any, *, times: int, epoch: Callable[[], int]) -> None:
        """Copy TRL's sampler.

        Args:
            like: TRL's sampler.
            times: factor on its repetitions of a batch.
            epoch: returns the current epoch, from 0.
        """
        super().__init__(
            like.data_source,
            mini_repeat_count=like.mini_repeat_count,
            batch_size=like.batch_size,
            repeat_count=like.repeat_count * times,
            shuffle=like.shuffle,
            seed=like.seed,
        )
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            assert self.seed is not None, "TRL gives its sampler the run's seed"
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
