"""`osd generate`: settings, prompts, samples, filters, the command and real models.

Most tests use a pair without models (tests/fake_pair.py), whose draws depend on the seed and the prompts alone.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys

import pytest
import yaml

from osd import cli
from osd.core import RECORD_FIELDS
from osd.data import generate as running
from osd.data import grading, writer
from osd.data.generate import generate
from osd.data.parse import parse
from osd.data.requests import sample_seed
from osd.data.samples import SCHEMA
from osd.data.settings import GenerateConfig
from tests.fake_pair import FakePair
from tests.generate_run import (
    ROOT,
    ROWS,
    SIZES,
    config,
    content,
    finish,
    flags,
    keys,
    kill_until_done,
    launch,
    read_output,
    write_rows,
)
from tests.tiny import tiny_engine_kwargs, tiny_model

# -- what is refused before a model loads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_column": "problem"}, r"prompt_column='problem' is not a column of the input; its columns are \['answer'"),
        ({"columns": {"problem": "qestion"}}, r"columns\['problem'\]='qestion' is not a column"),
        ({"answer_column": "anser"}, "answer_column='anser' is not a column"),
        ({"id_column": "name"}, "id_column='name' is not a column"),
        ({"privileged_template": "{prompt} {anser}"}, "'anser', which the dataset does not have"),
        ({"student_template": "Solve {problem}"}, "student_template names {problem}"),
        ({"teacher_chat_template": "no-such-file.jinja"}, "teacher_chat_template='no-such-file.jinja' is neither a file"),
        ({"input": "no-such-file.jsonl"}, "input='no-such-file.jsonl' does not exist"),
        ({"columns": {"answer": "question"}}, "the input has a column 'answer' too"),
        ({"output": __file__}, "cannot be a folder"),
        ({"output": f"{__file__}/out"}, "cannot be a folder"),
    ],
)
def test_settings_that_do_not_fit_the_input_are_refused(tmp_path, given, message):
    def no_pair(settings):
        raise AssertionError("the models were started")

    with pytest.raises(ValueError, match=message):
        generate(config(tmp_path, **given), no_pair)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"num_samples": "two"}, "num_samples='two' is not a whole number"),
        ({"temperature": True}, "temperature=True is not a number"),
        ({"alpha_method": "kl_simmetry"}, "alpha_method='kl_simmetry' is unknown"),
        ({"format": "csv"}, "format='csv' is unknown; use parquet or jsonl"),
        ({"filter_answer": "match"}, "filter_answer='match' needs the reference answer; set answer_column"),
        ({"filter_finish_reasons": ["stopp"]}, "filter_finish_reasons='stopp' is unknown"),
        ({"shard": "4/4"}, "shard='4/4' is not i/n"),
        ({"teacher_templates": ["{prompt}"]}, "teacher_templates and privileged_template are both set"),
        ({"privileged_template": "{}"}, "a literal brace is written twice"),
        ({"generation_kwargs": {"seed": 1}}, "would give every sample the same noise"),
        ({"output": None}, "output is not set"),
        ({"model_name_or_path": None}, "model_name_or_path is not set"),
        ({"engine_kwargs": "dtype"}, "engine_kwargs='dtype' is not a mapping"),
        ({"temperature": float("nan")}, "temperature=nan must be 0 \\(greedy\\) or"),
        ({"seed": -1}, "seed=-1 is not a whole number from 0 to 4294967295"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization=1.5 must be a share"),
        ({"vllm_max_model_length": 6}, "max_completion_length=6 leaves no room for a prompt in vllm_max_model_length=6"),
        ({"engine_kwargs": {"max_model_len": 6}}, "leaves no room for a prompt"),
        ({"privileged_template": None, "teacher_templates": []}, r"teacher_templates=\[\] has no template"),
        ({"privileged_template": " "}, "privileged_template: ' ' is empty"),
        ({"privileged_template": "{prompt:{answer}}"}, "has a field in a field"),
        ({"chat_template_kwargs": {"tokenize": False}}, r"chat_template_kwargs\['tokenize'\] is set by OSD"),
        ({"filter_finish_reasons": []}, "would remove everything"),
        ({"filter_max_kl": float("nan")}, "filter_max_kl=nan would remove everything"),
        ({"filter_min_tokens": 7}, "filter_min_tokens=7 is not from 0 to max_completion_length=6"),
    ],
)
def test_bad_settings_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


# -- prompts ------------------------------------------------------------------------------------------------------------


def test_each_side_has_its_own_template_and_columns_have_aliases(tmp_path):
    settings = config(
        tmp_path,
        columns={"problem": "question"},
        student_template="w40 {problem}",
        privileged_template="{prompt} w41 {answer}",
        teacher_system_prompt="w50",
        student_system_prompt="w51",
        num_samples=1,
    )
    generate(settings, FakePair)
    sample = next(s for s in read_output(settings.output) if json.loads(s["source"]) == ROWS[0])
    assert sample["student_prompt"] == "w51\n\nw40 w7 w8"
    assert sample["teacher_prompt"] == "w50\n\nw40 w7 w8 w41 w20"
    assert list(sample["student_prompt_ids"]) == [51, 40, 7, 8]
    assert list(sample["teacher_prompt_ids"]) == [50, 40, 7, 8, 41, 20]


def test_each_model_has_its_own_chat_template(tmp_path):
    own = tmp_path / "chat.jinja"
    own.write_text("{% for m in messages %}{{ 'w60 ' + m['content'] }}{% endfor %}")
    settings = config(tmp_path, enable_chat_template=True, teacher_chat_template=str(own), num_samples=1)
    generate(settings, FakePair)
    sample = read_output(settings.output)[0]
    assert sample["teacher_prompt"].startswith("w60 ")
    assert sample["student_prompt"].startswith("<bos> user w")


def test_teacher_templates_take_turns_and_do_not_depend_on_the_order(tmp_path):
    templates = ["{prompt} w41 {answer}", "{prompt} w42 {answer}", "{prompt} w43 {answer}"]
    settings = config(tmp_path, privileged_template=None, teacher_templates=templates, num_samples=3)
    generate(settings, FakePair)
    by_row = {}
    for sample in read_output(settings.output):
        assert f" w4{int(sample['teacher_template']) + 1} " in sample["teacher_prompt"]
        by_row.setdefault(sample["id"], []).append(sample["teacher_template"])
    assert all(sorted(used) == [0, 1, 2] for used in by_row.values())
    assert len({used[0] for used in by_row.values()}) > 1  # rows begin with different ones


# -- determinism --------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_batch_size_shard_size_or_order(tmp_path):
    expected = config(tmp_path, output=str(tmp_path / "expected"))
    generate(expected, FakePair)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    path = write_rows(tmp_path / "shuffled.jsonl", shuffled)
    other = config(tmp_path, input=str(path), batch_size=100, shard_size=17)
    generate(other, FakePair)
    assert keys(read_output(other.output)) != keys(read_output(expected.output))
    assert content(read_output(other.output)) == content(read_output(expected.output))


def test_another_seed_gives_other_samples_and_every_sample_has_its_own(tmp_path):
    first, second = config(tmp_path), config(tmp_path, seed=43, output=str(tmp_path / "second"))
    for settings in (first, second):
        generate(settings, FakePair)
    seeds = [{s["seed"] for s in read_output(settings.output)} for settings in (first, second)]
    assert len(seeds[0]) == len(seeds[1]) == 2 * len(ROWS)
    assert not seeds[0] & seeds[1]
    assert sample_seed(42, "a", 11) != sample_seed(421, "a", 1)


# -- output -------------------------------------------------------------------------------------------------------------


def test_a_sample_has_every_column_of_the_schema(tmp_path):
    settings = config(tmp_path, answer_column="answer", alpha_max=0.8)
    generate(settings, FakePair)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["alpha_max"] == 0.8
    samples = read_output(settings.output)
    assert set(samples[0]) == set(SCHEMA.names)
    for sample in samples:
        length = sample["num_tokens"]
        assert {len(sample[name]) for name in ("token_ids", "tokens", *RECORD_FIELDS)} == {length}
        assert "".join(sample["tokens"]) == sample["completion"]
        assert sample["alpha_mean"] == pytest.approx(sum(sample["alpha"]) / length)
        assert (sample["alpha_min"], sample["alpha_max"]) == pytest.approx((min(sample["alpha"]), max(sample["alpha"])))
        assert sample["kl_theta_mean"] == pytest.approx(sum(sample["kl_theta"]) / length)
        assert sample["answer"] == json.loads(sample["source"])["answer"]
        assert sample["config_hash"] == run["config_hash"]
        assert (sample["teacher_model"], sample["student_model"], sample["weights_version"]) == ("teacher", "student", 0)


def test_jsonl_and_parquet_hold_the_same_samples(tmp_path):
    both = [config(tmp_path, output=str(tmp_path / kind), format=kind) for kind in ("parquet", "jsonl")]
    for settings in both:
        generate(settings, FakePair)
    parquet, jsonl = (read_output(settings.output) for settings in both)
    assert content(parquet) == content(jsonl)
    assert list(jsonl[0]["logq"]) == pytest.approx(list(parquet[0]["logq"]), rel=1e-8)


def test_json_has_no_infinities():
    line = json.loads(writer._json_line({"logq": [-0.5, float("-inf"), float("nan")]}))
    assert line == {"logq": [-0.5, None, None]}


def test_the_config_hash_changes_with_settings_that_change_the_data(tmp_path):
    def hash_of(**given):
        settings = config(tmp_path, **given)
        return running.describe(settings, running.read_rows(settings, limit=None), 1)["config_hash"]

    same = hash_of()
    assert hash_of(batch_size=7, shard_size=9, format="jsonl", vllm_gpu_memory_utilization=0.5) == same
    others = {hash_of(**given) for given in ({"seed": 1}, {"alpha_max": 0.5}, {"filter_min_tokens": 2}, {"num_samples": 3})}
    write_rows(tmp_path / "other.jsonl", ROWS[:-1])
    others.add(hash_of(input=str(tmp_path / "other.jsonl")))
    assert len(others) == 5
    assert same not in others


# -- filters ------------------------------------------------------------------------------------------------------------


def test_filters_remove_and_count(tmp_path):
    everything = config(tmp_path, output=str(tmp_path / "all"), num_samples=20)
    generate(everything, FakePair)
    samples = read_output(everything.output)
    settings = config(
        tmp_path,
        num_samples=20,
        answer_column="answer",
        filter_min_tokens=3,
        filter_finish_reasons=["stop"],
        filter_answer="contains",
        filter_max_kl=0.5,
    )
    counts = generate(settings, FakePair)
    remaining, removed = samples, {}
    for name, keep in [
        ("filter_min_tokens", lambda s: s["num_tokens"] >= 3),
        ("filter_finish_reasons", lambda s: s["finish_reason"] == "stop"),
        ("filter_answer", lambda s: json.loads(s["source"])["answer"] in s["completion"].split()),
        ("filter_max_kl", lambda s: s["kl_theta_mean"] <= 0.5),
    ]:
        kept = [s for s in remaining if keep(s)]
        removed[name] = len(remaining) - len(kept)
        remaining = kept
    assert all(removed.values())
    assert counts.removed == removed
    assert keys(read_output(settings.output)) == keys(remaining)
    assert remaining
    assert counts.drawn == len(samples) == counts.kept + sum(removed.values())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["removed"] == removed


@pytest.mark.parametrize(
    ("completion", "answer", "contained", "matched"),
    [
        (r"so \boxed{1,234}", "1234", True, True),
        (r"\boxed{\frac{1}{2}} is it", r"\boxed{\frac{1}{2}}", True, True),
        ("The answer is 72.", "He sold 48 and 24.\n#### 72", True, True),
        ("First 72, then 73", "72", True, False),
        ("that makes 172", "72", False, False),
        ("that makes 7.25", "7", False, False),
        ("The answer is **Paris**.", "paris", False, True),
        ("I would say Paris, but London is close", "Paris", True, False),
        ("it costs $5.00", "5", False, True),
        ('{"a": 1}', '{"a": 1}', True, True),
        ("", "5", False, False),
        ("no idea", "5", False, False),
    ],
)
def test_answers(completion, answer, contained, matched):
    assert grading.contains(completion, answer) == contained
    assert grading.matches(completion, answer) == matched


def test_the_progress_bar_shows_counts_and_times(tmp_path, capsys):
    rows = [*ROWS[:10], {"question": "", "answer": "w8"}]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    settings = config(tmp_path, input=path, filter_min_tokens=3)
    counts = generate(settings, lambda settings: FakePair(settings, seconds=0.08))
    first, *_, last = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
    assert first.startswith("0/22 samples")
    assert "loading the models" in first
    kept, removed = counts.kept, counts.removed["filter_min_tokens"]
    assert re.fullmatch(
        rf"22/22 samples \|.*\| [\d,]+ tokens/s, α {counts.alpha_mean:.2f}, {kept} kept, {removed} removed, 2 rejected \| "
        r"\d\d:\d\d passed, 00:00 left",
        last,
    )
    assert removed


# -- the command --------------------------------------------------------------------------------------------------------


def test_help_imports_no_torch():
    code = "import sys, osd.cli; osd.cli.main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
    for word in ("generate", "inspect", "compare"):
        assert word in done.stdout
    assert not {"torch", "vllm", "transformers", "trl"} & set(done.stderr.split())


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_help_of_a_command_lists_every_setting_and_imports_no_torch(command):
    code = (
        "import sys, osd.cli\ntry: osd.cli.main(sys.argv[1:])\n"
        "except SystemExit as e: print(e.code, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, command, "--help-all"], cwd=ROOT, capture_output=True, text=True)
    settings_class = GenerateConfig if command == "generate" else cli_compare_config()
    for field in dataclasses.fields(settings_class):
        assert f"--{field.name} " in done.stdout
        assert field.metadata["help"], field.name
    assert done.stderr.split()[0] == "0"
    assert not {"torch", "vllm"} & set(done.stderr.split())


def cli_compare_config():
    from osd.data.settings import CompareConfig

    return CompareConfig


def test_a_full_disk_ends_in_one_line_and_loses_only_the_shard(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    settings = config(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("osd.data.pair.EnginePair", FakePair)
        patched.setattr(writer.pq, "write_table", full)
        with pytest.raises(SystemExit, match=r"failed: .*No space left on device; `--resume` goes on") as ended:
            cli.main(["generate", *flags(settings, *SIZES)])
    assert "Traceback" not in str(ended.value)
    assert generate(dataclasses.replace(settings, resume=True), FakePair).kept == 2 * len(ROWS)


def test_a_run_without_usable_rows_ends_with_status_1(tmp_path):
    settings = config(tmp_path, input=str(write_rows(tmp_path / "x.jsonl", [{"question": "", "answer": "w8"}])))
    status, out = finish(launch("generate", *flags(settings, "output")))
    assert status == 1
    assert "osd generate: failed: nothing was sampled: all 1 rows were rejected" in out


def test_flags_win_over_the_file_and_mappings_are_json(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("num_samples: 2\nalpha_max: 0.5\nengine_kwargs: {dtype: float32}\ngenerate: {num_samples: 3}\n")
    argv = ["--config", path, "--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--input", "x", "--output", "y"]
    argv = [*map(str, argv), "--columns", '{"problem": "question"}', "--num_samples", "4", "--linear-is-not-a-flag"]
    settings = parse(GenerateConfig, argv[:-1], training_keys=set)
    assert (settings.num_samples, settings.alpha_max) == (4, 0.5)
    assert settings.engine_kwargs == {"dtype": "float32"}
    assert settings.columns == {"problem": "question"}


# -- real models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path, tiny_pair):
    """The settings of a run with tiny models, and their YAML file."""
    settings = dict(
        model_name_or_path=str(tiny_pair[1]),
        teacher_model_name_or_path=str(tiny_pair[0]),
        prompt_column="question",
        privileged_template="{prompt} {answer}",
        enable_chat_template=True,
        max_completion_length=12,
        num_samples=2,
        shard_size=8,
        engine_kwargs=tiny_engine_kwargs(async_scheduling=False),
        input=str(write_rows(tmp_path / "in.jsonl", ROWS)),
    )
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    return settings, path


@pytest.mark.slow
def test_real_models_draw_the_same_in_batches_of_any_size(tmp_path, real):
    from osd.data.pair import EnginePair

    settings, _ = real
    by_batch = []
    for size in (1024, 5):
        given = GenerateConfig(**settings, batch_size=size, output=str(tmp_path / f"out{size}"))
        counts = generate(given, EnginePair)
        assert counts.kept == 2 * len(ROWS)
        by_batch.append(read_output(given.output))
    assert content(by_batch[0]) == content(by_batch[1])
    for sample in by_batch[0]:
        assert list(sample["kl_theta"]) == pytest.approx(list(sample["kl_teacher"]), abs=1e-3)  # α balances the two
        logq = sample["alpha"] * sample["logp_teacher"] + (1 - sample["alpha"]) * sample["logp_theta"]
        assert (sample["logq"] >= logq - 1e-4).all()  # the geometric mean of two distributions sums to at most 1
        assert list(sample["teacher_prompt_ids"])[:-5] != list(sample["student_prompt_ids"])[:-5]


def test_models_with_different_tokenizers_are_refused_and_nothing_is_written(tmp_path, real):
    from osd.data.pair import EnginePair

    settings, _ = real
    other = tiny_model(tmp_path / "other", vocab=64, tokenizer_vocab=60)
    with pytest.raises(ValueError, match="different tokenizers: id 60"):
        generate(GenerateConfig(**{**settings, "model_name_or_path": str(other)}, output=str(tmp_path / "out")), EnginePair)
    with pytest.raises(ValueError, match="top_q"):
        generate(GenerateConfig(**settings, generation_kwargs={"top_q": 1}, output=str(tmp_path / "out")), EnginePair)
    assert not (tmp_path / "out").exists()


def test_a_failed_engine_start_rejects_no_rows(tmp_path, real, monkeypatch):
    from osd.data.pair import EnginePair
    from osd.engine import engine

    def no_memory(config):
        raise ValueError("no memory for the KV cache")

    monkeypatch.setattr(engine, "PairEngine", no_memory)
    settings, _ = real
    with pytest.raises(ValueError, match="no memory for the KV cache"):
        generate(GenerateConfig(**settings, output=str(tmp_path / "out")), EnginePair)
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_sigkill_with_real_models(tmp_path, real, kills):
    from osd.data.pair import EnginePair

    settings, path = real
    expected = GenerateConfig(**settings, output=str(tmp_path / "expected"))
    generate(expected, EnginePair)
    chance = random.Random(kills)
    moments = [chance.uniform(0, 0.3) for _ in range(kills)]
    argv = ["generate", "--config", path, "--output", tmp_path / "out"]
    out = kill_until_done(argv, moments, tmp_path / "out", module="osd")
    assert "46 kept" in out
    assert content(read_output(tmp_path / "out")) == content(read_output(expected.output))
    assert keys(read_output(tmp_path / "out")) == keys(read_output(expected.output))
