"""Train a student with OSD: `accelerate launch trainers/train_osd.py --config configs/distillation.yaml [--flag value]`.

Flags win over the YAML file; a key or flag that nothing knows is an error. The data is a dataset of the Hub, or a local
.json, .jsonl, .csv or .parquet file with a `prompt` column (or another, named by --prompt_column).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from osd.data.parse import data_keys, split_sections
from trainers import OSDConfig, OSDTrainer

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments(ScriptArguments):
    """TRL's script arguments (`dataset_name`, `dataset_config`, splits, streaming), and these."""

    dataset_test_name: str | None = field(
        default=None,
        metadata={"help": "A local file with the evaluation set, when `dataset_name` is a local file."},
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "The column that the student is prompted with; it is renamed to `prompt`."},
    )


class Parser(TrlParser):
    """TRL's parser, which skips what a YAML file says to the data commands only (see osd/data/parse.py for the rule)."""

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        top, _ = split_sections(values)
        return super().set_defaults_with_config(
            **{k: v for k, v in top.items() if k in training_keys() or k not in data_keys()}
        )


def training_keys() -> set[str]:
    """Every key that a YAML file can have for training."""
    return {f.name for holder in (DataArguments, OSDConfig, ModelConfig) for f in fields(holder)}


def parse(argv: Sequence[str] | None = None) -> tuple[DataArguments, OSDConfig, ModelConfig]:
    """Arguments from `--config file.yaml` and flags; unknown ones of either kind are refused."""
    parser = Parser([DataArguments, OSDConfig, ModelConfig])  # type: ignore[list-item]
    data, args, model = parser.parse_args_and_config(argv)
    if data.dataset_name is None or model.model_name_or_path is None:
        raise ValueError("dataset_name and model_name_or_path must be set, in the YAML file or as flags")
    return data, args, model


def load_data(data: DataArguments, *, evaluate: bool) -> tuple[Any, Any]:
    """The training set, and the evaluation set or None.

    Raises:
        ValueError: a file that is not there, a split or a prompt column that the data does not have.
    """
    splits = _splits(data)
    wanted = [data.dataset_train_split, *([data.dataset_test_split] if evaluate else [])]
    missing = [split for split in wanted if split not in splits]
    if missing:
        raise ValueError(
            f"{data.dataset_name!r} has no split {missing}; it has {sorted(splits)}. Set dataset_train_split and "
            "dataset_test_split (or dataset_test_name for a local file), or eval_strategy: 'no'"
        )
    train, *test = (_with_prompt(splits[split], data.prompt_column) for split in wanted)
    return train, (test[0] if test else None)


def _splits(data: DataArguments) -> Any:
    from datasets import load_dataset

    assert data.dataset_name is not None, "checked by parse()"
    suffix = Path(data.dataset_name).suffix
    if suffix not in _FILE_FORMATS:
        return load_dataset(data.dataset_name, name=data.dataset_config, streaming=data.dataset_streaming)
    files = {data.dataset_train_split: data.dataset_name}
    if data.dataset_test_name is not None:
        files[data.dataset_test_split] = data.dataset_test_name
    for path in files.values():
        if not Path(path).is_file():
            raise ValueError(f"the data file {path!r} does not exist")
    return load_dataset(_FILE_FORMATS[suffix], data_files=files, streaming=data.dataset_streaming)


def _with_prompt(dataset: Any, column: str) -> Any:
    if column == "prompt":
        return dataset
    columns = dataset.column_names
    if columns is not None and (column not in columns or "prompt" in columns):
        raise ValueError(f"prompt_column={column!r} cannot be renamed to 'prompt': the columns are {sorted(columns)}")
    return dataset.rename_column(column, "prompt")


def main(argv: Sequence[str] | None = None) -> OSDTrainer:
    """Parse, load, train, save; returns the trainer, whose engine is shut down."""
    data, args, model = parse(argv)
    train_dataset, eval_dataset = load_data(data, evaluate=args.eval_strategy != "no")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **args.student_init_kwargs(),
    }
    trainer = OSDTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if trainer.is_fsdp_enabled:  # with its SHARDED_STATE_DICT, nothing would be saved
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(args.output_dir)
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=data.dataset_name)
    finally:
        trainer.close()  # last: vLLM ends the process group that it was given
    return trainer


if __name__ == "__main__":
    main()
