"""`osd generate`: files of every format, and rows that cannot be used."""

from __future__ import annotations

import dataclasses
import json

import datasets
import pandas as pd
import pytest

from osd.data.generate import NothingUsable, generate
from tests.fake_pair import FakePair
from tests.generate_run import (
    ROWS,
    config,
    content,
    read_output,
    rejected,
    write_rows,
)


def write_as(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        return write_rows(path, ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        pd.DataFrame(ROWS).to_csv(path, index=False)
    elif kind == "parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        write_rows(path / "train.jsonl", ROWS)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "splits", "folder"])
def test_every_format_gives_the_same_data(tmp_path, kind):
    expected = config(tmp_path, output=str(tmp_path / "expected"))
    generate(expected, FakePair)
    settings = config(tmp_path, input=str(write_as(kind, tmp_path)))
    counts = generate(settings, FakePair)
    assert (counts.kept, counts.rejected) == (2 * len(ROWS), 0)
    assert content(read_output(settings.output)) == content(read_output(expected.output))


def test_bad_rows_are_rejected_with_the_reason_and_the_run_goes_on(tmp_path):
    lines = [json.dumps(row) for row in ROWS[:4]]
    lines[1:1] = ["{not json", "[1, 2]", json.dumps({"question": "w7"}), json.dumps({"question": "", "answer": "w8"})]
    lines.append(json.dumps({"question": "w9 " * 50, "answer": "w9"}))
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    settings = config(tmp_path, input=str(path), num_samples=1)
    failing = generate_id(ROWS[0])
    counts = generate(settings, lambda settings: FakePair(settings, fails=(failing,)))
    found = {entry["row"]: entry["reason"] for entry in rejected(settings.output)}
    for row, reason in [
        (0, "NaN in the student's logits"),
        (1, "it is not JSON"),
        (2, "not an object with columns: [1, 2]"),
        (3, "needs 'answer'"),
        (4, "the prompt is empty"),
        (8, "the prompt has 51 tokens"),
    ]:
        assert reason in found.pop(row)
    assert found == {}
    assert (counts.rejected, counts.drawn, counts.kept) == (6, 3, 3)
    assert len(read_output(settings.output)) == 3


def test_what_no_tokenizer_chat_template_or_file_takes_is_rejected_and_the_run_goes_on(tmp_path):
    """Each of these once ended the run in a traceback, at the same row again when it was resumed."""
    chat = tmp_path / "chat.jinja"
    chat.write_text(
        "{% for m in messages %}{% if m['content'].startswith('w8') %}{{ raise_exception('no w8 here') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    lines = ['{"question": "w7 \\ud800", "answer": "w8"}', '{"question": "w7", "answer": "w8", "other": "\\ud800"}']
    lines += ['{"question": "w8", "answer": "w8"}', '{"question": "w9", "answer": "w8"}', '{"question": "w9", "answer": NaN}']
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    given = {"enable_chat_template": True, "student_chat_template": str(chat), "num_samples": 1}
    settings = config(tmp_path, input=str(path), **given)
    assert generate(settings, FakePair).kept == 1
    reasons = [entry["reason"] for entry in rejected(settings.output)]
    for reason, words in zip(
        reasons, ("half of a surrogate", "half of a surrogate", "no w8 here", "needs 'answer'"), strict=True
    ):
        assert words in reason


def test_a_reference_that_says_nothing_is_rejected_where_a_filter_needs_it(tmp_path):
    rows = [{"question": "w7", "answer": answer} for answer in ("####", " ", r"\boxed{}", "w8")]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    settings = config(tmp_path, input=path, answer_column="answer", filter_answer="contains", num_samples=1)
    counts = generate(settings, FakePair)
    assert (counts.rejected, counts.drawn) == (3, 1)
    assert {entry["reason"] for entry in rejected(settings.output)} == {
        "it has no 'answer' (answer_column), which filter_answer needs"
    }


def test_long_fields_of_a_csv_are_read(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text(f"question,answer\nw7,{'w8 ' * 50_000}\n")
    settings = config(tmp_path, input=str(path), privileged_template=None, num_samples=1)
    assert generate(settings, FakePair).kept == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "question\nw7 é\n".encode("latin-1"), "is not CSV in UTF-8"),
        ("x.csv", b"question,question\nw7,w8\n", "has several columns named 'question'"),
        ("x.parquet", b"PAR1", "is not a whole Parquet file"),
        ("x.json", b'{"question": "w7"}', "is not a list of objects"),
        ("x.jsonl", b"\n", "has no rows"),
    ],
)
def test_input_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"input='.*{name}' {message}"):
        generate(config(tmp_path, input=str(path)), FakePair)


def generate_id(row):
    from osd.data.reader import _digest

    return _digest(row)[:16]


def test_csv_lines_of_another_width_are_rejected(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("question,answer\nw7,w8\nw9\nw10,w11,w12\n")
    settings = config(tmp_path, input=str(path), num_samples=1)
    assert generate(settings, FakePair).kept == 1
    assert [entry["reason"][:18] for entry in rejected(settings.output)] == ["it has fewer field", "it has more fields"]


def test_a_second_row_of_the_same_id_is_rejected(tmp_path):
    rows = [{"question": "w7", "answer": "w8", "name": name} for name in ("a", "b", "a")]
    settings = config(tmp_path, input=str(write_rows(tmp_path / "x.jsonl", rows)), id_column="name", num_samples=1)
    assert generate(settings, FakePair).kept == 2
    [entry] = rejected(settings.output)
    assert (entry["row"], entry["id"]) == (2, "a-2")
    assert "ids must differ" in entry["reason"]


def test_repeated_rows_without_ids_are_different_samples(tmp_path):
    settings = config(tmp_path, input=str(write_rows(tmp_path / "x.jsonl", ROWS[:1] * 3)), num_samples=1)
    generate(settings, FakePair)
    samples = read_output(settings.output)
    assert len({s["id"] for s in samples}) == len({s["seed"] for s in samples}) == 3


@pytest.mark.parametrize("lines", ["{no\n{json\n", '{"question": ""}\n{"question": "", "answer": "w8"}\n'])
def test_a_run_with_every_row_bad_fails(tmp_path, lines):
    path = tmp_path / "in.jsonl"
    path.write_text(lines)
    settings = config(tmp_path, input=str(path), num_samples=1)
    FakePair.started = 0
    with pytest.raises(NothingUsable, match="all 2 rows were rejected"):
        generate(settings, FakePair)
    assert FakePair.started == 0
    assert len(rejected(settings.output)) == 2
    with pytest.raises(NothingUsable):  # and it does not come right by asking again
        generate(dataclasses.replace(settings, resume=True), FakePair)
