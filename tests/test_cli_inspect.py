"""`osd inspect`: the numbers of the page against the data and its bounded size."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from osd import cli
from osd.core import RECORD_FIELDS
from osd.data import findings, inspection, statistics
from osd.data.inspection import inspect
from osd.report import pages
from tests.made_data import samples, save


def page_data(page):
    text = page.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def every(rows, name):
    return np.concatenate([row[name] for row in rows])


def test_the_tally_counts_every_token(tmp_path):
    rows = samples(300)
    save(tmp_path / "data-00000-of-00002-000000.parquet", rows[:120])
    save(tmp_path / "data-00001-of-00002-000000.parquet", rows[120:])
    (tmp_path / "rejected.jsonl").write_text("{}\n")
    result = statistics.tally(statistics.data_files(tmp_path), shown=10, extremes=5)
    assert (result.completions, result.tokens) == (300, len(every(rows, "alpha")))
    for name, edges in statistics.BINS.items():
        assert result.histograms[name].tolist() == np.histogram(every(rows, name), edges)[0].tolist(), name
        assert result.sums[name] == pytest.approx(every(rows, name).sum(), rel=1e-5)
    assert result.finish_reasons == {"stop": 225, "length": 75}
    assert sum(length * count for length, count in result.lengths.items()) == result.tokens
    assert result.place_counts.sum() == result.tokens
    assert result.place_sums["kl_theta"].sum() == pytest.approx(every(rows, "kl_theta").sum(), rel=1e-5)
    assert result.early_sums[3] == pytest.approx(sum(row["kl_theta"][3] for row in rows if row["num_tokens"] > 3), rel=1e-5)
    assert sum(sums.count for sums in result.by_token.values()) == result.tokens
    dots = [
        (t - s)
        for row in rows
        for text, t, s in zip(row["tokens"], row["logp_teacher"], row["logp_theta"], strict=True)
        if text == "."
    ]
    assert result.by_token["."].gap == pytest.approx(sum(dots), rel=1e-4)


def test_the_most_extreme_tokens_are_found(tmp_path):
    rows = samples(200)
    path = save(tmp_path / "x.parquet", rows)
    result = statistics.tally([path], shown=5, extremes=4)
    gaps = sorted(
        (t - s, row["id"], i)
        for row in rows
        for i, (t, s) in enumerate(zip(row["logp_teacher"], row["logp_theta"], strict=True))
    )
    found = [[(e.id, e.place) for e in inspection._by_score(heap)] for heap in (result.teacher_side, result.student_side)]
    assert found[0] == [(name, place) for _, name, place in gaps[:-5:-1]]
    assert found[1] == [(name, place) for _, name, place in gaps[:4]]
    extreme = inspection._by_score(result.teacher_side)[0]
    tokens = next(row for row in rows if row["id"] == extreme.id)["tokens"]
    assert extreme.token == tokens[extreme.place]
    assert "".join(tokens).startswith(extreme.before + extreme.token) or extreme.place > statistics.CONTEXT


def test_jsonl_and_parquet_with_zero_probabilities_give_the_same_page(tmp_path):
    rows = samples(20)
    rows[3]["logp_theta"][0] = -math.inf
    rows[3]["kl_theta"][0] = math.inf
    pages = [inspect(save(tmp_path / f"x.{kind}", rows), tmp_path / kind / "page.html") for kind in ("parquet", "jsonl")]
    data = [page_data(page) for page in pages]
    assert data[0]["vocab"] == data[1]["vocab"]
    assert data[0]["samples"][3]["lp"][0] is data[1]["samples"][3]["lp"][0] is None
    assert [s["a"] for s in data[0]["samples"]] == [s["a"] for s in data[1]["samples"]]


def test_the_page_shows_what_was_recorded(tmp_path):
    rows = samples(12)
    data = page_data(inspect(save(tmp_path / "x.parquet", rows)))
    assert len(data["samples"]) == 12
    for shown, row in zip(data["samples"], rows, strict=True):
        assert [data["vocab"][v] for v in shown["t"]] == row["tokens"]
        assert shown["a"] == pytest.approx(row["alpha"], abs=6e-4)
        assert shown["k"] == pytest.approx(row["kl_theta"], abs=6e-4)
        assert shown["ma"] == pytest.approx(np.mean(row["alpha"]), abs=6e-4)


def test_no_markup_of_a_completion_reaches_the_page(tmp_path):
    page = inspect(save(tmp_path / "x.parquet", samples(50))).read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<b>student" not in page
    assert not re.search(
        r'(?:src|href)="|url\((?!#)|@import|https?://(?!www\.w3\.org)', page.replace("xlink:href", "").replace('href="#', "")
    )


def test_the_size_of_the_page_is_bounded(tmp_path):
    """Ten times the data makes no larger page; long completions and prompts are cut."""
    sizes = []
    for count in (250, 2500):
        page = inspect(save(tmp_path / str(count) / "x.parquet", samples(count, longest=40)))
        assert len(page_data(page)["samples"]) == 200
        sizes.append(page.stat().st_size)
    assert sizes[1] < 1.1 * sizes[0] < 2e6
    long = samples(1)[0]
    whole = {name: [0.5] * 3_000 for name in RECORD_FIELDS} | {"tokens": [" w"] * 3_000, "student_prompt": "p" * 10**6}
    page = inspect(save(tmp_path / "long.parquet", [long | whole] * 40))
    assert page.stat().st_size < 4e6
    assert "long ones are cut after 2000 tokens" in page.read_text()


def test_tick_labels_and_the_cut_of_a_tall_bar(tmp_path):
    from matplotlib import pyplot as plt

    axes = plt.figure().subplots()
    inspection._percent(axes)
    axes.set_yticks([0.025, 0.05, 0.125])  # 2 %, 5 % and 12 % once
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["2.5 %", "5 %", "12.5 %"]
    shares = np.array([0.9] + [0.1 / 40] * 39)
    inspection._cut_the_tallest(axes, statistics.UNIT, shares)
    assert axes.get_ylim()[1] == pytest.approx(1.5 * 0.1 / 40)
    assert axes.texts[0].get_text() == "90 % ↑"


def test_the_page_of_a_run_shows_its_counts(tmp_path):
    save(tmp_path / "data-00000-of-00001-000000.parquet", samples(5))
    counts = {"drawn": 1209, "kept": 5, "rejected": 2, "removed": {"filter_answer": 1204}}
    (tmp_path / "summary.json").write_text(json.dumps(counts))
    text = " ".join(inspect(tmp_path).read_text().split())
    assert "The run: 1,209 drawn, 5 kept, 1,204 removed by filter_answer, 2 rejected before sampling." in text


def test_numbers_have_a_true_minus_and_no_negative_zero():
    assert [pages.decimals(x, 2) for x in (-0.001, -1.5, 2.0, -math.inf)] == ["0.00", "−1.50", "2.00", "−∞"]


def test_every_section_is_there_once(tmp_path):
    page = inspect(save(tmp_path / "x.parquet", samples(30))).read_text()
    titles = [
        "Completions",
        "The numbers",
        "How far apart they are",
        "The most extreme tokens",
        "Tokens on which they disagree",
    ]
    assert re.findall(r"<h2>(.*?)</h2>", page) == titles
    assert page.count("<svg") == 6


def test_completions_are_drawn_evenly(tmp_path):
    path = save(tmp_path / "x.parquet", samples(2000, longest=2))
    shown = [int(s["id"][3:]) for s in statistics.tally([path], shown=200, extremes=1).shown]
    assert len(set(shown)) == 200
    assert abs(np.mean(shown) - 1000) < 4 * 577 / math.sqrt(200)  # standard error of a uniform mean, four of them
    assert max(shown) > 1800


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"not parquet", "is not a Parquet file"),
        ("x.jsonl", b'{"id": 1}\n', "completion 0: it has no 'tokens'"),
        ("x.jsonl", b'\n{"id": 1, "tok', "line 2 is not JSON"),
        ("x.jsonl", b"[1]\n", "it is not a mapping"),
        ("x.jsonl", b'{"id": 1, "tokens": ["a"], "alpha": []}\n', "it has 1 tokens and 0 entries in 'alpha'"),
        ("x.txt", b"hello", "is neither .parquet nor .jsonl"),
        ("folder/readme", b"hello", "has no data"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(path.parent if "/" in name else path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_the_path_of_the_page(tmp_path, capsys):
    save(tmp_path / "data-00000-of-00001-000000.parquet", samples(5))
    cli.main(["inspect", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "inspect.html")
    cli.main(["inspect", str(tmp_path), "--output", str(tmp_path / "there.html"), "--shown", "2"])
    assert len(page_data(tmp_path / "there.html")["samples"]) == 2


def data_with(**columns):
    """Return completions of 20 tokens whose record has these values at every token."""
    record = {name: [columns.get(name, 0.5)] * 20 for name in RECORD_FIELDS}
    return [row | record | {"tokens": [" w"] * 20, "finish_reason": "stop"} for row in samples(10)]


NORMAL = {"kl_theta": 0.1, "kl_teacher": 0.1, "alpha": 0.5, "ess_theta": 0.9, "ess_teacher": 0.9}


@pytest.mark.parametrize(
    ("columns", "said", "odd"),
    [
        ({}, "and the student could have written them (KL 0.100", []),
        ({"kl_theta": 0.6, "kl_teacher": 0.6}, "out of the student's reach", ["mean KL(q* ‖ student), nats per token"]),
        ({"kl_theta": 1e-4, "kl_teacher": 1e-4}, "little to learn", ["mean KL(q* ‖ student), nats per token"]),
        ({"kl_teacher": 0.2}, "could have written", ["mean KL(q* ‖ teacher)"]),
        ({"alpha": 1.0}, "could have written", ["mean α"]),
        ({"ess_teacher": 0.4}, "could have written", ["mean effective sample size against the teacher"]),
    ],
)
def test_odd_statistics_are_named(tmp_path, columns, said, odd):
    result = statistics.tally([save(tmp_path / "x.parquet", data_with(**NORMAL | columns))], shown=1, extremes=1)
    sentence, _ = findings.headline(result)
    assert said in sentence
    assert [statistic.name for statistic in findings.statistics_in_words(result) if statistic.odd] == odd


def test_the_acceptance_is_that_of_the_students_drafts(tmp_path):
    rows = data_with(logp_theta=-2.0, logq=-1.0)
    result = statistics.tally([save(tmp_path / "x.parquet", rows)], shown=1, extremes=1)
    assert result.sums["accepted"] / result.tokens == pytest.approx(math.exp(-1))
    rows = data_with(logp_theta=-1.0, logq=-2.0)
    result = statistics.tally([save(tmp_path / "x.parquet", rows)], shown=1, extremes=1)
    assert result.sums["accepted"] == result.tokens


def test_the_page_marks_right_answers_by_the_runs_answer_match(tmp_path):
    rows = [row | {"completion": "The answer is: 408", "answer": "408" if i else "409"} for i, row in enumerate(samples(8))]
    save(tmp_path / "data-00000-of-00001-000000.parquet", rows)
    page = inspect(tmp_path)
    assert [sample["ok"] for sample in page_data(page)["samples"]] == [False, *[True] * 7]
    assert "7 of 8 (95 %: 52.9% to 97.8%), by answer_match." in page.read_text()
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"answer_match": "exact"}}))
    assert not any(sample["ok"] for sample in page_data(inspect(tmp_path))["samples"])
    assert page_data(inspect(tmp_path, answer_match="math"))["samples"][1]["ok"]
    assert "95 %: 0.0% to 32.4%" in inspect(tmp_path).read_text()
