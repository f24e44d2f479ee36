"""`osd generate`: files of every format, and rows that cannot be used."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
import random

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from osd.data import grading
from osd.data.comparison import compare
from osd.data.generate import NothingUsable, generate
from osd.data.samples import pieces
from osd.data.settings import CompareConfig, GenerateConfig
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


def test_bad_rows_are_rejected_with_a_reason_and_the_run_continues(tmp_path):
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


def test_rows_with_images_are_rejected(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [ROWS[0], {**ROWS[1], "images": ["a.png"]}, {**ROWS[2], "images": []}])
    settings = config(tmp_path, input=str(path), num_samples=1)
    assert generate(settings, FakePair).kept == 2
    [entry] = rejected(settings.output)
    assert entry["row"] == 1
    assert "it has 'images' (['a.png']), and OSD distils text" in entry["reason"]


def test_text_that_no_file_or_template_can_hold_is_rejected(tmp_path):
    """Each of these once ended the run in a traceback, and every resumed run at the same row."""
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


def test_an_empty_reference_is_rejected_if_a_filter_needs_it(tmp_path):
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
def test_unreadable_input_is_refused_by_name(tmp_path, name, content, message):
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


# -- rows whose content no template takes -------------------------------------------------------------------------------

CALLS = (  # as Llama 3.1's chat template: asks for the presence of a key, concatenates the content
    "{% for m in messages %}{% if 'tool_calls' in m and not m.tool_calls|length == 1 %}{{ raise_exception('one call') }}"
    "{% endif %}{{ '<bos> ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
)
ODD_PROMPTS = {
    "null": None,
    "a number": 12,
    "true": True,
    "texts": ["w7", "w8"],
    "ids": [7, 8],
    "one message": {"role": "user", "content": "w7"},
    "messages in a list too many": [[{"role": "user", "content": "w7"}]],
    "ShareGPT": [{"from": "human", "value": "w7"}],
    "no content": [{"role": "user"}],
    "content null": [{"role": "user", "content": None}],
    "content a number": [{"role": "user", "content": 12}],
    "content parts": [{"role": "user", "content": [{"type": "text", "text": "w7"}]}],
    "role null": [{"role": None, "content": "w7"}],
    "role a number": [{"role": 1, "content": "w7"}],
    "messages and null": [{"role": "user", "content": "w7"}, None],
    "assistant only": [{"role": "assistant", "content": "w7"}],
    "empty": [],
}


@pytest.mark.parametrize("template", [None, "{prompt} w9 {answer}"])
@pytest.mark.parametrize("command", [generate, compare])
def test_odd_prompts_are_rejected_by_index_and_the_run_continues(tmp_path, command, template):
    good = [{"question": "w7", "answer": "w8"}, {"question": [{"role": "user", "content": "w7"}], "answer": "w8"}]
    rows = [good[0], *({"question": prompt, "answer": "w8"} for prompt in ODD_PROMPTS.values()), good[1]]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    settings = config(
        tmp_path,
        settings_class=GenerateConfig if command is generate else CompareConfig,
        input=path,
        privileged_template=template,
        num_samples=1,
        teacher_chat_template=CALLS,
    )
    result = command(settings, FakePair)
    found = rejected(settings.output) if command is generate else result["rejected"]
    assert [entry["row"] for entry in found] == list(range(1, len(ODD_PROMPTS) + 1)), found
    assert all(entry["reason"] and entry["id"] for entry in found)
    if command is generate:
        assert generate(dataclasses.replace(settings, resume=True), FakePair).kept == 2


def test_tool_calls_and_nulls_of_parquet_reach_no_template(tmp_path):
    chats = [
        [{"role": "user", "content": "w7", "tool_calls": None, "name": None}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "user", "content": "w8"}],
    ]
    path = str(write_rows(tmp_path / "x.jsonl", [{"question": chat, "answer": "w8"} for chat in chats]))
    settings = config(tmp_path, input=path, num_samples=1, student_chat_template=CALLS, teacher_chat_template=CALLS)
    assert generate(settings, FakePair).kept == 2


@pytest.mark.parametrize("content", ["{{ 1 / 0 }}", "{{ messages[7].role }}", "{{ undefined() }}", "{{ messages|int + 'a' }}"])
def test_any_error_in_a_chat_template_is_a_rejection(tmp_path, content):
    template = "{% if 'w9' in messages[0].content %}" + content + "{% endif %}{{ messages[0].content }}"
    rows = [{"question": "w7", "answer": "w8"}, {"question": "w9", "answer": "w8"}]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    settings = config(tmp_path, input=path, enable_chat_template=True, teacher_chat_template=template, num_samples=1)
    assert generate(settings, FakePair).kept == 1
    assert [entry["row"] for entry in rejected(settings.output)] == [1]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (datetime.date(2024, 1, 5), "2024-01-05"),
        (datetime.datetime(2024, 1, 5, 12, 30), "2024-01-05 12:30:00"),
        (decimal.Decimal("12.50"), "12.50"),
        (12, "12"),
        (1.5, "1.5"),
        (True, "true"),
        ([1, None], "[1, null]"),
        (b"w8", "b'w8'"),
    ],
)
def test_answers_of_every_type_become_text(tmp_path, answer, expected):
    pq.write_table(pa.Table.from_pylist([{"question": "w7", "answer": answer}]), tmp_path / "x.parquet")
    settings = config(tmp_path, input=str(tmp_path / "x.parquet"), answer_column="answer", num_samples=1)
    generate(settings, FakePair)
    [sample] = read_output(settings.output)
    assert sample["answer"] == expected


@pytest.mark.parametrize(
    "lines",
    [
        '{"question": "w7", "teacher_prompt": "w8"}\n{"question": "w9"}\n',
        '{"question": "w7", "teacher_prompt": "w8"}\n{"question": "w9", "teacher_prompt": null}\n',
        '{"question": "w7", "teacher_prompt": "w8"}\n{"question": "w9", "teacher_prompt": ""}\n',
        '{"question": "w7", "privileged_context": "w8"}\n{"question": "w9"}\n',
        '{"question": "w7", "privileged_context": "w8"}\n{"question": "w9", "privileged_context": " "}\n',
    ],
)
def test_a_row_without_the_privilege_of_the_others_is_rejected(tmp_path, lines):
    path = tmp_path / "x.jsonl"
    path.write_text(lines)
    settings = config(tmp_path, input=str(path), privileged_template=None, num_samples=1)
    assert generate(settings, FakePair).kept == 1
    [entry] = rejected(settings.output)
    assert entry["row"] == 1
    assert "teacher_prompt" in entry["reason"] or "privileged_context" in entry["reason"] or "empty" in entry["reason"]
    compared = compare(config(tmp_path, CompareConfig, input=str(path), privileged_template=None), FakePair)
    assert [entry["row"] for entry in compared["rejected"]] == [1]


def test_every_file_is_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    lines = [
        '{"question": "w7", "answer": Infinity, "scores": [0.123456789012345, NaN, {"a": -Infinity}]}',
        '{"answer": [NaN]}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    settings = config(tmp_path, input=str(tmp_path / "x.jsonl"), num_samples=1, format="jsonl", filter_max_kl=float("inf"))
    generate(settings, FakePair)
    [sample] = read_output(settings.output)
    strict = {"question": "w7", "answer": None, "scores": [0.123456789012345, None, {"a": None}]}
    assert json.loads(sample["source"], parse_constant=refuse) == strict
    files = [path for path in (tmp_path / "out").rglob("*.json*") if path.suffix in (".json", ".jsonl")]
    for path in files:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=refuse)
    assert len(files) == 5
    assert generate(dataclasses.replace(settings, resume=True), FakePair).kept == 1


def test_source_has_the_columns_of_its_row_only(tmp_path):
    rows = [{"question": "w7", "answer": "w8"}, {"question": "w9", "answer": "w8", "note": None}]
    settings = config(tmp_path, input=str(write_rows(tmp_path / "x.jsonl", rows)), num_samples=1)
    generate(settings, FakePair)
    assert [json.loads(sample["source"]) for sample in read_output(settings.output)] == rows


def test_a_completion_that_a_filter_cannot_judge_is_rejected(tmp_path, monkeypatch):
    def judge(completion, answer):
        if answer == "w8":
            raise KeyError(answer)
        return True

    monkeypatch.setattr(grading, "matcher", lambda how: judge)
    rows = [{"question": "w7", "answer": "w8"}, {"question": "w7", "answer": "w9"}]
    path = str(write_rows(tmp_path / "x.jsonl", rows))
    settings = config(tmp_path, input=path, answer_column="answer", filter_answer="match", num_samples=1)
    assert generate(settings, FakePair).kept == 1
    assert "cannot be filtered ('w8')" in rejected(settings.output)[0]["reason"]


# -- texts of tokens ----------------------------------------------------------------------------------------------------


def byte_fallback():
    """A tokenizer like Llama 2's: bytes for what is not in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "▁"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_texts_of_bytes_never_raise():
    """Each of these once ended the run: half of a character after a byte that is a character by itself."""
    tokenizer = byte_fallback()
    newline, first, second, a = 3 + 0x0A, 3 + 0xC3, 3 + 0xA9, tokenizer.convert_tokens_to_ids("a")
    assert pieces(tokenizer, [a, first, second, a]) == ["a", "", "é", "a"]
    assert pieces(tokenizer, [newline, first, second]) == ["\n", "", "é"]
    assert pieces(tokenizer, [newline, first, a]) == ["\n", "", "a"]  # as vLLM's text of a completion
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.choice([newline, first, second, a, 2, 3 + 0xFF, 3 + 0xF0, 3 + 0x9F, 10**6]) for _ in range(30)]
        assert len(pieces(tokenizer, ids)) == 30


def test_texts_of_a_tokenizer_that_is_not_fast_never_raise():
    class Slow:
        def decode(self, ids):
            return {7: "w7"}[ids[0]]

    assert pieces(Slow(), [7, 8]) == ["w7", ""]
