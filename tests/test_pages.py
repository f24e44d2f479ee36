"""The pages of `osd inspect`, `osd compare` and the demo in headless Chromium. Skipped where no browser is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from examples import report
from osd.data.comparison import compare
from osd.data.inspection import inspect
from osd.data.settings import CompareConfig
from tests.fake_pair import FakePair
from tests.made_data import demo_metrics, samples, save

CHROME = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROME is None, reason="no browser on this machine")]

# Loaded before the page's own script: errors are collected in an attribute of the document.
WATCH = """<script>
const seen = document.documentElement.dataset;
addEventListener("error", e => { seen.errors = `${seen.errors || ""} ${e.message}`; });
console.error = (...a) => { seen.errors = `${seen.errors || ""} ${a.join(" ")}`; };
</script>"""
RUN = "<script>{{ const value = (() => {{ {} }})(); seen.result = JSON.stringify(value ?? null); }}</script></body>"


def opened(page, script="", width=1400):
    """Open a page, run a script in it, and return its DOM as text and the value that the script returned."""
    probe = page.with_name(f"probe-{page.name}")
    text = page.read_text().replace("<head>", f"<head>{WATCH}", 1)
    probe.write_text(text.replace("</body>", RUN.format(script)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([CHROME, *flags, probe.as_uri()], capture_output=True, text=True, timeout=120)
    tag = re.search(r"<html[^>]*>", done.stdout)[0]
    assert "data-errors" not in tag, tag
    return done.stdout, json.loads(html.unescape(re.search(r'data-result="([^"]*)"', tag)[1]))


@pytest.fixture
def inspected(tmp_path):
    rows = [row | {"answer": "7"} for row in samples(10_000, longest=6)]
    return inspect(save(tmp_path / "x.parquet", rows), shown=10_000)


WIDE = "return document.documentElement.scrollWidth - innerWidth"  # above 0: the page itself scrolls sideways


def test_inspect_draws_a_few_completions_and_keeps_markup_as_text(inspected):
    dom, cards = opened(inspected, "return document.querySelectorAll('.sample').length")
    assert cards == 8
    assert re.search(r'class="tok"[^>]*style="background: rgb', dom)
    assert "<script>alert" not in dom


def test_inspect_orders_colours_and_finds(inspected):
    order = """
      const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
      const kls = () => [...document.querySelectorAll(".sample")].map(e => e.sample.mk);
      const colour = () => document.querySelector(".tok").style.background;
      set("order", "-k"); const high = kls(); set("order", "k"); const low = kls();
      set("order", "-ok"); const right = [...document.querySelectorAll(".sample")].map(e => e.sample.ok);
      set("colour", "a"); const alpha = colour(); set("colour", "k");
      document.getElementById("more").click();
      return {high, low, right, alpha, kl: colour(), drawn: document.querySelectorAll(".sample").length};
    """
    _, result = opened(inspected, order)
    assert result["high"] == sorted(result["high"], reverse=True)
    assert result["low"] == sorted(result["low"])
    assert result["high"][0] > result["low"][0]
    assert all(result["right"])
    assert result["alpha"] != result["kl"]
    assert result["drawn"] == 48


@pytest.mark.parametrize("width", [1400, 500])  # headless Chromium has no narrower window
def test_no_page_scrolls_sideways(tmp_path, width):
    save(tmp_path / "x.parquet", [row | {"answer": "7"} for row in samples(30)])
    settings = CompareConfig(
        model_name_or_path="student",
        teacher_model_name_or_path="teacher",
        prompt_column="question",
        privileged_template="{prompt} {answer}",
        answer_column="answer",
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out"),
    )
    rows = [{"question": f"w{i} <b>w{i + 1}</b>", "answer": "w8"} for i in range(7, 23)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare(settings, FakePair)
    report.write(demo_metrics(), tmp_path / "demo")
    for page in (inspect(tmp_path / "x.parquet"), tmp_path / "out" / "compare.html", tmp_path / "demo" / report.PAGE):
        dom, over = opened(page, WIDE, width)
        assert over <= 0, page.name
        assert "<b>w" not in dom
        assert "<b>M&" not in dom


def test_an_error_of_a_script_is_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<html><head></head><body><script>missing()</script></body></html>")
    with pytest.raises(AssertionError, match="data-errors"):
        opened(page)
