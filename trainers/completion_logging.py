"""TRL's completion logging, with a column for α."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers.utils import is_rich_available
from trl.trainer.utils import print_prompt_completions_sample

if TYPE_CHECKING:
    from osd.train.trainer import OSDTrainer


def log_completions(trainer: OSDTrainer) -> None:
    """Print a sample, write `completions/completions_<step>.parquet` and log the table, as TRL's `log()` does.

    TRL's own version has other columns. Here they are `step`, `prompt`, `completion`, `alpha_mean`, `alpha` and `token_ids` (a
    list with one entry per token each).
    """
    logs = {name: list(values) for name, values in trainer._logs.items()}
    alpha_mean = [sum(alpha) / len(alpha) if alpha else float("nan") for alpha in logs["alpha"]]
    step = trainer.state.global_step
    if is_rich_available():
        shown = trainer.num_completions_to_print  # None: all of them
        print_prompt_completions_sample(logs["prompt"], logs["completion"], {"alpha": alpha_mean}, None, step, shown)  # type: ignore[arg-type]
    table = pd.DataFrame({"step": [step] * len(alpha_mean), **logs})
    table.insert(3, "alpha_mean", alpha_mean)
    folder = Path(trainer.args.output_dir or ".") / "completions"
    table.to_parquet(folder / f"completions_{step:05d}.parquet")
    if trainer.log_unique_prompts:
        table = table.drop_duplicates(subset=["prompt"])
    for backend in _tables(trainer.args.report_to):
        backend.log({"completions": backend.Table(dataframe=table)})


def _tables(report_to: Any) -> list[Any]:
    """Return the reporting back ends in use that accept tables."""
    backends = []
    if "wandb" in (report_to or ()):
        import wandb

        if wandb.run is not None:
            backends.append(wandb)
    if "trackio" in (report_to or ()):
        import trackio

        backends.append(trackio)
    return backends
