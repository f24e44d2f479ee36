"""The training command: its data, one line for every mistake, short help, dry run; and what its documents state."""

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from trl import DistillationConfig, DistillationTrainer
from trl.scripts import utils as trl_scripts

from osd.data.reader import read
from osd.train import OSDConfig, OSDTrainer, train_osd
from osd.train.data import DataArguments, load_data
from tests.tiny import tiny_engine_kwargs

ROOT = Path(__file__).parent.parent
ROWS = [{"prompt": f"w{i}", "answer": f"w{i + 1}"} for i in range(7, 19)]
CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def saved(tmp_path, kind):
    path = tmp_path / kind
    if kind == "saved":
        Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "splits":
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(path)
    elif kind == "numbers.csv":
        path.write_text("prompt,answer\nw7,0042\nw8,12\nw9,NA\nw10,2024-01-01\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


# -- data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["saved", "splits", "rows.ndjson", "numbers.csv"])
def test_training_reads_what_generation_reads(tmp_path, kind):
    path = saved(tmp_path, kind)
    train, _ = load_data(DataArguments(dataset_name=path), evaluate=False)
    assert list(train) == [dict(row.values) for row in read(path).rows]


def test_a_split_of_a_folder_is_the_evaluation_set(tmp_path):
    _, test = load_data(DataArguments(dataset_name=saved(tmp_path, "splits")), evaluate=True)
    assert list(test) == ROWS[:2]
    with pytest.raises(ValueError, match="train"):
        load_data(DataArguments(dataset_name=saved(tmp_path, "splits"), dataset_test_split="dev"), evaluate=True)


def test_a_broken_line_is_named_or_dropped(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": oops}\n')
    with pytest.raises(ValueError, match="the first is row 1"):
        load_data(DataArguments(dataset_name=str(path)), evaluate=False)
    train, _ = load_data(DataArguments(dataset_name=str(path)), evaluate=False, drop_bad_rows=True)
    assert list(train) == [{"prompt": "a"}]


def test_a_mixture_as_trl_mixes(tmp_path, jsonl):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"w{i}", "answer": "w9", "more": 1}) + "\n" for i in range(30, 50)))
    entries = [
        {"path": jsonl, "fraction": 0.5},
        {"path": "json", "data_files": str(other), "columns": ["prompt", "answer"], "fraction": 0.5},
    ]
    data = DataArguments(datasets=entries, test_split_size=0.25)
    train, test = load_data(data, evaluate=True, seed=3)
    assert (len(train), len(test)) == (18, 6)
    assert train.column_names == ["prompt", "answer"]
    again, _ = load_data(DataArguments(datasets=entries, test_split_size=0.25), evaluate=True, seed=3)
    assert list(again) == list(train)  # every process splits alike
    assert "datasets.load_dataset(" in inspect.getsource(trl_scripts.get_dataset), "osd.train.data replaces it in this call"


def test_streams(jsonl):
    for flags in ({"dataset_name": jsonl, "dataset_streaming": True}, {"datasets": [{"path": jsonl}], "streaming": True}):
        train, _ = load_data(DataArguments(**flags), evaluate=False)
        assert isinstance(train, IterableDataset)
        assert list(train) == ROWS
    with pytest.raises(ValueError, match=r"test_split_size=0.5 cannot split a stream"):
        load_data(DataArguments(dataset_name=jsonl, streaming=True, test_split_size=0.5), evaluate=True)


def test_a_wrong_key_of_a_mixture_is_named(jsonl):
    with pytest.raises(ValueError, match=r"unknown key 'pth' in datasets \(did you mean 'path'\?\)"):
        DataArguments(datasets=[{"pth": jsonl}])


# -- the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, tiny_pair, jsonl):
    path = tmp_path / "config.yaml"
    settings = {
        "model_name_or_path": str(tiny_pair[1]),
        "teacher_model_name_or_path": str(tiny_pair[0]),
        "dataset_name": jsonl,
        "privileged_template": "{prompt} {answer}",
        "max_completion_length": 4,
        "engine_kwargs": tiny_engine_kwargs(),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("argv", "line", "message"),
    [
        ([], "alpha_metod: fixed", "unknown key 'alpha_metod' (did you mean 'alpha_method'?)"),
        (["--alpha_metod", "fixed"], "", "unknown argument '--alpha_metod' (did you mean '--alpha_method'?)"),
        (["--learning", "1"], "", "unknown argument '--learning'"),
        (["--max_steps", "ten"], "", "argument --max_steps/--max-steps: invalid int value: 'ten'"),
        ([], "max_steps: 2.5", "argument --max_steps/--max-steps: invalid int value: '2.5'"),
        ([], "max_steps: [1]", "max_steps=[1] is one value"),
        ([], "top_p: 1.5", "top_p=1.5"),
        (["--dataset_name", "absent.jsonl"], "", "absent.jsonl"),
        (["--model_name_or_path", "absent"], "", "student model 'absent'"),
        (["--privileged_template", "{solution}"], "", "'solution', which the dataset does not have"),
        (["--eval_strategy", "epoch"], "", "no evaluation set: set dataset_test_name or test_split_size"),
        (["--config", "absent.yaml"], "", "config='absent.yaml' does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(config, capsys, argv, line, message):
    config.write_text(config.read_text() + line + "\n")
    with pytest.raises(SystemExit) as end:
        train_osd.command([*([] if "--config" in argv else ["--config", str(config)]), *argv])
    assert end.value.code == 2
    [printed] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("osd train: error: ")]
    assert message in printed


def test_short_help_first(capsys):
    pages = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            train_osd.parse([flag])
        assert end.value.code == 0
        pages[flag] = capsys.readouterr().out
    assert len(pages["--help"].splitlines()) < 80 < 400 < len(pages["--help-all"].splitlines())
    for key in re.findall(r"^  --(\w+)", pages["--help"], re.MULTILINE):
        assert key in train_osd.training_keys()
    assert "[kl_symmetry]" in pages["--help"]


def test_a_dry_run_prints_both_prompts_and_loads_no_weights(config, tiny_pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl.trainer.utils.create_model_from_path", lambda *args, **kwargs: pytest.fail("weights"))
    assert train_osd.main(["--config", str(config), "--dry_run"]) is None
    out = capsys.readouterr().out
    for number in range(3):
        assert f"row {number}" in out
    assert "row 3" not in out
    assert "w7 w8" in out  # the teacher's; the student reads w7


# -- what the documents state -------------------------------------------------------------------------------------------


def test_the_documented_defaults_are_the_defaults():
    text = (ROOT / "docs" / "distillation.md").read_text()
    args = {name: entry.default for name, entry in OSDConfig.__dataclass_fields__.items()}
    assert f"`vllm_gpu_memory_utilization` ({args['vllm_gpu_memory_utilization']} unless given)" in text
    assert float(re.search(r"`learning_rate` is (\S+) unless", text)[1]) == args["learning_rate"]
    assert args["learning_rate"] == DistillationConfig.__dataclass_fields__["learning_rate"].default
    for name, value in re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", text, re.MULTILINE):
        if name in args:
            assert str(args[name]) in (value, f"{value}.0", {"none": "None"}.get(value)), name


def test_the_trainer_lists_what_it_overrides():
    own = {name for name, value in vars(OSDTrainer).items() if inspect.isfunction(value)}
    overridden = {name for name in own if hasattr(DistillationTrainer, name)} - {"__init__"}
    text = sys.modules[OSDTrainer.__module__].__doc__.split("Overridden methods")[1]
    assert set(re.findall(r"`(\w+)`", text)) == overridden


def test_the_modules_that_import_trl_are_those_that_the_docs_name():
    importing = set()
    for path in sorted(p for folder in ("osd", "trainers") for p in (ROOT / folder).rglob("*.py")):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = [
            name for n in nodes for name in ([n.module or ""] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
        ]
        if any(name.split(".")[0] == "trl" for name in names):
            relative = path.relative_to(ROOT)
            importing.add("trainers" if relative.parts[0] == "trainers" else str(relative))
    [named] = re.findall(r"only\n?\s*(`osd/.*?) import TRL", (ROOT / "docs" / "structure.md").read_text())
    assert set(re.findall(r"`([^`]+)`", named)) == importing
