"""One file, one set of rows: what `osd generate` reads (`read`) and what training reads (`read_dataset`)."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import pickle

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osd.data.reader import read, read_dataset

CHAT = [{"role": "user", "content": "b"}]


def both(path, **given):
    """The rows as the data commands and as training read them, which must be equal to the type of every number."""
    rows = [dict(row.values) for row in read(str(path), **given).rows]
    trained = list(read_dataset(path, **given))
    assert repr(trained) == repr(rows)
    return rows


def write(path, content):
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("blank.csv", 'answer\n12\n""\n7\n', ["12", "", "7"]),
        ("versions.csv", "answer\n1.10\n3.50\n", ["1.10", "3.50"]),
        ("codes.tsv", "n\tanswer\n1\t0042\n2\t0007\n", ["0042", "0007"]),
        ("words.CSV", "answer\nNA\nnull\nTrue\nnan\n", ["NA", "null", "True", "nan"]),
        ("dates.csv", "answer\n2024-01-05\n", ["2024-01-05"]),
        ("bom.csv", "\ufeffanswer\nx\n", ["x"]),
        ("dates.jsonl", [{"answer": "2024-01-05"}, {"answer": "2024-02-17T00:00:00Z"}], ["2024-01-05", "2024-02-17T00:00:00Z"]),
        ("numbers.jsonl", [{"answer": 408}, {"answer": 3.5}, {"answer": 1 / 3}], [408, 3.5, 1 / 3]),
        ("floats.ndjson", [{"answer": 3.0}, {"answer": None}], [3.0, None]),
        ("big.jsonl", [{"answer": 2**64}, {"answer": 1}], [2**64, 1]),
        ("kinds.jsonl", [{"answer": "0042"}, {"answer": True}, {"answer": [1, "a"]}], ["0042", True, [1, "a"]]),
        ("chats.jsonl", [{"answer": "a"}, {"answer": CHAT}], ["a", CHAT]),
        ("keys.jsonl", [{"answer": CHAT}, {"answer": [{**CHAT[0], "name": "n"}]}], [CHAT, [{**CHAT[0], "name": "n"}]]),
        ("order.jsonl", [{"answer": {"a": 1, "b": 2}}, {"answer": {"b": 1, "a": 2}}], [{"a": 1, "b": 2}, {"b": 1, "a": 2}]),
        ("late.jsonl", [{"prompt": "a"}, {"prompt": "b", "answer": "2"}], [None, "2"]),
        ("nan.jsonl", '{"answer": NaN}\n{"answer": [NaN, 0.5]}\n', [None, [None, 0.5]]),
        ("list.json", '[{"answer": 12}]', [12]),
        ("lines.json", '{"answer": 12}\n{"answer": "12"}\n', [12, "12"]),
    ],
)
def test_values_are_kept_as_written(tmp_path, name, content, expected):
    assert [row["answer"] for row in both(write(tmp_path / name, content))] == expected


def test_gzipped_text_is_read(tmp_path):
    for name, content in (("a.jsonl.gz", '{"answer": "1"}\n'), ("a.csv.gz", "answer\n1\n")):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert both(tmp_path / name) == [{"answer": "1"}]


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 5), decimal.Decimal("12.50"), 12, "0042", [1.5], CHAT])
def test_values_of_parquet_and_arrow_keep_their_types(tmp_path, value):
    table = pa.Table.from_pylist([{"answer": value}, {"answer": None}])
    pq.write_table(table, tmp_path / "a.parquet")
    for name, open_writer in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with open_writer(tmp_path / name, table.schema) as file:
            file.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert both(tmp_path / name) == [{"answer": value}, {"answer": None}]


def test_missing_values_of_pandas_are_none(tmp_path):
    pd.DataFrame({"answer": [1.5, float("nan")], "kind": pd.Categorical(["a", "b"])}).to_parquet(tmp_path / "a.parquet")
    assert both(tmp_path / "a.parquet") == [{"answer": 1.5, "kind": "a"}, {"answer": None, "kind": "b"}]


def test_saved_datasets_give_the_rows_and_ids_of_their_file(tmp_path):
    rows = [{"prompt": "a", "answer": 1 / 3}, {"prompt": CHAT, "answer": "0042"}, {"prompt": [{**CHAT[0], "name": "n"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    expected, dataset = both(path), read_dataset(path)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    dataset.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "splits", "a.parquet"):
        assert both(tmp_path / name) == expected
        assert [row.id for row in read(str(tmp_path / name)).rows] == [row.id for row in read(str(path)).rows]
    assert both(tmp_path / "splits", split="test") == [expected[1]]


def test_a_dataset_keeps_its_values_through_what_trainers_do(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": 1 / 3}, {"prompt": CHAT, "answer": "0042"}])
    dataset, expected = read_dataset(path), both(path)
    renamed = dataset.rename_column("answer", "a").rename_column("a", "answer")
    for changed in (renamed, pickle.loads(pickle.dumps(dataset)), dataset.to_iterable_dataset(), dataset.select([0, 1])):
        assert list(changed) == expected


def test_folders_are_read_file_by_file_and_split_by_name(tmp_path):
    write(tmp_path / "train-1.csv", "answer\n0042\n")
    write(tmp_path / "train-2.jsonl", [{"answer": 7}])
    write(tmp_path / "test.csv", "answer\n1.10\n")
    (tmp_path / "notes.txt").write_text("no data")
    assert both(tmp_path) == [{"answer": "0042"}, {"answer": 7}]
    assert both(tmp_path, split="test") == [{"answer": "1.10"}]
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        read_dataset(tmp_path, split="dev")


def test_of_a_folder_that_generate_wrote_only_the_samples_are_read(tmp_path):
    for name in ("data-00000-of-00001-000000.jsonl", "rejected.jsonl", "run.json"):
        write(tmp_path / name, [{"answer": name}])
    assert both(tmp_path) == [{"answer": "data-00000-of-00001-000000.jsonl"}]


def test_unreadable_rows_are_counted_and_the_first_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"answer": "1"}\n{"answer": oops}\n[2]\n{}\n{"answer": "3"}\n')
    with pytest.raises(ValueError, match=r"3 of 5 rows of .* the first is row 1 \(from 0\): it is not JSON"):
        read_dataset(path)
    with pytest.warns(UserWarning, match="drop_bad_rows: 3 of 5 rows"):
        dropped = list(read_dataset(path, drop_bad_rows=True))
    assert dropped == [{"answer": "1"}, {"answer": "3"}]
    with pytest.raises(ValueError, match="1 of 1 rows"):
        read_dataset(write(tmp_path / "b.jsonl", "{no\n"), drop_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'answer\n"open\nnext\n', "is not CSV in UTF-8"),
        ("a.jsonl.gz", "not gzip", "is not a whole gzip file"),
        ("a.arrow", "not arrow", "is not a whole Arrow file"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.xlsx", "x", "has an unknown ending; use .jsonl"),
    ],
)
def test_unreadable_files_are_refused_by_name(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"input='.*{name}' {message}"):
        read_dataset(write(tmp_path / name, content))


def test_deeply_nested_rows_are_rejected(tmp_path):
    depth = 600
    path = write(tmp_path / "a.jsonl", '{"answer": ' + "[" * depth + "]" * depth + '}\n{"answer": 1}\n')
    reasons = [row.error for row in read(str(path)).rows]
    assert "nested" in reasons[0] or "recursion" in reasons[0]
    assert reasons[1] is None
