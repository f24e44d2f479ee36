"""The cards of trained students and of data sets, and their upload, without a network."""

from __future__ import annotations

import json

import datasets
import huggingface_hub
import pytest
from huggingface_hub import DatasetCard

from osd.data import card
from osd.data.generate import generate
from osd.data.writer import Counts
from osd.train import OSDConfig
from osd.train.model_card import model_card
from tests.fake_pair import FakePair
from tests.generate_run import config


@pytest.fixture
def hub(monkeypatch):
    """Hub that keeps what is uploaded to it. Returns a list of (repository, files)."""
    uploads = []

    class Hub:
        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            assert (repo_type, private, exist_ok) == ("dataset", True, True)
            return f"https://hub/datasets/{repo_id}"

        def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
            from pathlib import Path

            found = {path.name for pattern in allow_patterns for path in Path(folder_path).glob(pattern)}
            uploads.append((repo_id, found))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return uploads


def test_the_data_card_has_the_counts_and_loads_the_data(tmp_path):
    generate(config(tmp_path, alpha_max=0.75, filter_min_tokens=4), FakePair)
    folder = tmp_path / "out"
    read = DatasetCard.load(folder / "README.md")
    assert read.data.tags == ["osd", "distillation", "synthetic"]
    [made] = read.data.configs
    assert made["data_files"] == [{"split": "train", "path": "data-*.parquet"}]
    summary = json.loads((folder / "summary.json").read_text())
    for text in (
        "| student | student |",
        "| teacher | teacher |",
        "kl_symmetry, geometric mixture, α from 0 to 0.75",
        f"{summary['kept']} kept of {summary['drawn']} drawn",
        f"{summary['removed']['filter_min_tokens']} by filter_min_tokens",
        json.loads((folder / "run.json").read_text())["config_hash"],
    ):
        assert text in read.text, text
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))  # as the Hub reads the card
    assert len(loaded) == summary["kept"]


def test_data_is_uploaded_when_the_last_process_has_finished(tmp_path, hub, capsys):
    given = {"push_to_hub": True, "hub_dataset_id": "me/problems"}
    generate(config(tmp_path, shard="0/2", **given), FakePair)
    assert not hub
    assert not (tmp_path / "out" / "README.md").exists()
    generate(config(tmp_path, shard="1/2", **given), FakePair)
    [(repository, files)] = hub
    assert repository == "me/problems"
    assert {"README.md", "run.json", "summary.json"} < files
    assert {name for name in files if name.startswith("data-")} == {path.name for path in (tmp_path / "out").glob("data-*")}
    assert "https://hub/datasets/me/problems" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").read_text().count("# problems") == 1


def test_nothing_is_uploaded_unless_asked(tmp_path, hub):
    generate(config(tmp_path, hub_dataset_id="me/problems"), FakePair)
    assert not hub


def test_an_upload_without_a_place_or_a_token_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="needs hub_dataset_id"):
        config(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="needs a token"):
        config(tmp_path, push_to_hub=True, hub_dataset_id="me/problems")


def test_a_fixed_alpha_is_named():
    settings = {"alpha_method": "fixed", "mixture": "linear", "fixed_alpha": 0.25}
    assert card.alpha_of(settings) == "fixed, linear mixture, α = 0.25"
    assert Counts().kept == 0


def test_the_model_card_names_models_alpha_and_data(tmp_path):
    args = OSDConfig(str(tmp_path), alpha_max=0.8, beta=0.5, privileged_template="{prompt} {answer}", use_cpu=True, bf16=False)
    made = model_card(args, name="mine", student="org/small", teacher="org/big", dataset="openai/gsm8k")
    assert made.data.base_model == "org/small"
    assert made.data.datasets == "openai/gsm8k"
    assert {"osd", "distillation"} <= set(made.data.tags)
    for text in (
        "`org/small`",
        "`org/big`",
        "`openai/gsm8k`",
        "kl_symmetry, from 0 to 0.8",
        "jsd, β = 0.5",
        "its own template",
    ):
        assert text in made.text, text


def test_the_model_card_has_no_path_of_the_machine(tmp_path):
    args = OSDConfig(str(tmp_path), use_cpu=True, bf16=False)
    (tmp_path / "rows.jsonl").touch()
    made = model_card(args, name="mine", student=str(tmp_path), teacher=str(tmp_path), dataset=str(tmp_path / "rows.jsonl"))
    assert str(tmp_path.parent) not in made.content
    assert made.data.base_model is None
    assert "`rows.jsonl`" in made.text
