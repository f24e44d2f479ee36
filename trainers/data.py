"""Load the training and evaluation sets of the training command: files, folders, the Hub, mixtures."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset
from trl.scripts.utils import DatasetConfig

from osd.core import suggest
from osd.data.reader import is_local, read_dataset

_BUILDERS = ("json", "csv", "parquet")  # of `datasets`, whose files the reader of `osd generate` reads


@dataclass
class DataArguments(ScriptArguments, DatasetMixtureConfig):
    """TRL's script arguments (`dataset_name`, splits, streaming) and mixtures (`datasets`, `test_split_size`); OSD's own."""

    dataset_test_name: str | None = field(
        default=None,
        metadata={"help": "File, folder or dataset to evaluate on, if it is not a split of `dataset_name`."},
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "The column with the student's prompts; it is renamed to `prompt`."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print both rendered prompts of a few rows, check all rows, and stop; loads no weights."},
    )

    def __post_init__(self) -> None:
        known = [entry.name for entry in fields(DatasetConfig)]
        for entry in self.datasets:
            for key in entry if isinstance(entry, dict) else ():
                if key not in known:
                    raise ValueError(f"unknown key {key!r} in datasets{suggest(key, known)}; use {', '.join(known)}")
        super().__post_init__()
        if self.datasets and self.dataset_name is not None:
            warnings.warn(f"dataset_name={self.dataset_name!r} has no effect beside datasets", stacklevel=4)
        if self.ignore_bias_buffers:
            warnings.warn("ignore_bias_buffers=True has no effect: TRL's distillation does not read it", stacklevel=4)


def load_data(data: DataArguments, *, evaluate: bool, seed: int = 42, drop_bad_rows: bool = False) -> tuple[Any, Any]:
    """Return the training set, and the evaluation set or None.

    Args:
        evaluate: load an evaluation set.
        seed: of the split by `test_split_size`.
        drop_bad_rows: drop rows of local files that cannot be read.

    Raises:
        ValueError: a file that does not exist, rows that cannot be read, a missing split or prompt column.
    """
    load = partial(_load, streaming=data.streaming or data.dataset_streaming, drop_bad_rows=drop_bad_rows)
    train: Any = _mixture(data, load) if data.datasets else _named(data, data.dataset_train_split, load)
    test: Any = None
    if data.test_split_size is not None:
        if isinstance(train, datasets.IterableDataset):
            raise ValueError(f"test_split_size={data.test_split_size} cannot split a stream; set dataset_test_name")
        try:
            parts = train.train_test_split(test_size=data.test_split_size, seed=seed)  # the same in every process
        except ValueError as error:
            raise ValueError(f"test_split_size={data.test_split_size}: {error}") from error
        train, test = parts["train"], parts["test"]
    if data.dataset_test_name is not None:
        test = load(data.dataset_test_name, split=data.dataset_test_split)
    elif test is None and evaluate:
        if data.datasets or Path(str(data.dataset_name)).is_file():
            raise ValueError("no evaluation set: set dataset_test_name or test_split_size, or eval_strategy: 'no'")
        test = _named(data, data.dataset_test_split, load)
    return _with_prompt(train, data.prompt_column), _with_prompt(test, data.prompt_column) if evaluate else None


def _named(data: DataArguments, split: str, load: Any) -> Any:
    if data.dataset_config is not None and is_local(str(data.dataset_name)):
        warnings.warn(f"dataset_config={data.dataset_config!r} has no effect: {data.dataset_name!r} is local", stacklevel=4)
    return load(data.dataset_name, name=data.dataset_config, split=split)


def _mixture(data: DataArguments, load: Any) -> Any:
    """Mix `datasets` as TRL does, with our reader for local files."""
    mixture = DatasetMixtureConfig(datasets=data.datasets, streaming=data.streaming)
    original = datasets.load_dataset

    def ours(streaming: bool, **kwargs: Any) -> Any:
        with patch.multiple(datasets, load_dataset=original):  # for the reader
            return load(**kwargs)

    with patch.multiple(datasets, load_dataset=ours):
        return get_dataset(mixture)["train"]


def _load(
    path: str,
    *,
    split: str,
    streaming: bool,
    drop_bad_rows: bool,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
) -> Any:
    """Load one split of a file, a folder or a dataset of the Hub."""
    files = _local_files(path, split, data_dir, data_files)
    if files:
        parts = [read_dataset(file, split=split, drop_bad_rows=drop_bad_rows) for file in files]
        loaded = datasets.concatenate_datasets(parts)
        return loaded.to_iterable_dataset() if streaming else loaded
    if not streaming and data_dir is None and data_files is None:
        return read_dataset(path, config=name, split=split, drop_bad_rows=drop_bad_rows)
    try:
        return datasets.load_dataset(
            path, name=name, split=split, streaming=streaming, data_dir=data_dir, data_files=data_files
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def _local_files(path: str, split: str, data_dir: str | None, data_files: Any) -> list[str]:
    """Return the local files or folders to read, or nothing if `datasets` has to load them."""
    if path not in _BUILDERS:
        return [path] if is_local(path) and data_dir is None and data_files is None else []
    named = data_files.get(split, []) if isinstance(data_files, dict) else data_files
    named = [named] if isinstance(named, str) else list(named or [])
    files = [Path(data_dir or ".") / file for file in named or ([""] if data_dir else [])]
    return [str(file) for file in files] if all(file.exists() for file in files) else []


def _with_prompt(dataset: Any, column: str) -> Any:
    if column == "prompt" or dataset is None:
        return dataset
    columns = dataset.column_names
    if columns is not None and (column not in columns or "prompt" in columns):
        raise ValueError(f"prompt_column={column!r} cannot be renamed to 'prompt': the columns are {sorted(columns)}")
    return dataset.rename_column(column, "prompt")
