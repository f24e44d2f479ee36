"""The pages of `osd inspect`, `osd compare` and the demo in headless Chromium. Skipped where no browser is installed."""

from __future__ import annotations

import html
import json
import os
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

# Loaded before the page's own script: errors are collected in an attribute of the document (of the outer one, if framed).
WATCH = """<script>
const seen = parent.document.documentElement.dataset;
addEventListener("error", e => { seen.errors = `${seen.errors || ""} ${e.message}`; });
console.error = (...a) => { seen.errors = `${seen.errors || ""} ${a.join(" ")}`; };
</script>"""
RUN = "<script>{{ const value = (() => {{ {} }})(); seen.result = JSON.stringify(value ?? null); }}</script></body>"


def opened(page, script="", width=1400, dark=False):
    """Open a page, run a script in it, and return its DOM as text and the value that the script returned."""
    probe = page.with_name(f"probe-{page.name}")
    text = page.read_text().replace("<head>", f"<head>{WATCH}", 1).replace("</body>", RUN.format(script))
    if width < 500:  # headless Chromium has no narrower window
        text = f'<html><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(text)}"></iframe></html>'
    probe.write_text(text)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", scheme, "--dump-dom"]
    done = subprocess.run([CHROME, *flags, probe.as_uri()], capture_output=True, text=True, timeout=120)
    tag = re.search(r"<html[^>]*>", done.stdout)[0]
    assert "data-errors" not in tag, tag
    return done.stdout, json.loads(html.unescape(re.search(r'data-result="([^"]*)"', tag)[1]))


@pytest.fixture
def inspected(tmp_path):
    rows = [row | {"answer": "7"} for row in samples(10_000, longest=6)]
    return inspect(save(tmp_path / "x.parquet", rows), shown=10_000)


def test_inspect_opens_ten_thousand_completions_and_keeps_markup_as_text(inspected):
    script = "return [DATA.samples.length, document.querySelectorAll('.sample').length, performance.now() / 1000]"
    dom, (known, cards, seconds) = opened(inspected, script)
    assert (known, cards) == (10_000, 8)
    assert re.search(r'class="tok"[^>]*style="background: rgb', dom)
    assert "<script>alert" not in dom
    if "CI" not in os.environ:  # a shared runner's time says nothing
        assert seconds < 5


def test_inspect_says_what_the_data_is_worth_before_completions_and_numbers(inspected):
    order = "return [...document.querySelectorAll('.verdict, #list, .figures')].map(e => e.className || e.id)"
    _, parts = opened(inspected, order)
    assert parts == ["card verdict", "list", "card figures"]


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


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of inspect, compare and the demo; markup in their data."""
    folder = tmp_path_factory.mktemp("pages")
    save(folder / "x.parquet", [row | {"answer": "7"} for row in samples(30)])
    settings = CompareConfig(
        model_name_or_path="student",
        teacher_model_name_or_path="teacher",
        prompt_column="question",
        privileged_template="{prompt} {answer}",
        answer_column="answer",
        input=str(folder / "in.jsonl"),
        output=str(folder / "out"),
    )
    rows = [{"question": f"w{i} <b>w{i + 1}</b>", "answer": "w8"} for i in range(7, 23)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare(settings, FakePair)
    report.write(demo_metrics(), folder / "demo")
    return inspect(folder / "x.parquet"), folder / "out" / "compare.html", folder / "demo" / report.PAGE


# Above 0: the page itself scrolls sideways. Second: its width, to see that it was as asked.
WIDE = "return [document.documentElement.scrollWidth - innerWidth, innerWidth]"


@pytest.mark.parametrize("width", [1400, 400])
def test_no_page_scrolls_sideways(pages, width):
    for page in pages:
        dom, (over, inner) = opened(page, WIDE, width)
        assert inner == width
        assert over <= 0, page.name
        assert "<b>w" not in dom
        assert "<b>M&" not in dom


# The lowest contrast (WCAG 2) of a text with what is behind it, and the text.
CONTRAST = r"""
  const rgba = text => { const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * under[i]);
  const behind = e => e ? over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * r + .7152 * g + .0722 * b; };
  let least = [21, ""];
  for (const e of document.querySelectorAll("main *:not(svg *)")) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join("").trim();
    if (!text || !e.checkVisibility()) continue;
    const under = behind(e), lights = [light(over(rgba(getComputedStyle(e).color), under)), light(under)].sort((a, b) => b - a);
    const contrast = (lights[0] + .05) / (lights[1] + .05);
    if (contrast < least[0]) least = [contrast, `${e.className} ${text}`];
  }
  return [...least, getComputedStyle(document.body).backgroundColor];
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_is_legible(pages, dark):
    for page in pages:
        _, (contrast, text, background) = opened(page, CONTRAST, dark=dark)
        assert background == ("rgb(21, 23, 26)" if dark else "rgb(247, 247, 245)")
        assert contrast >= 4.5, (page.name, text)  # WCAG 2, level AA


def test_an_error_of_a_script_is_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<html><head></head><body><script>missing()</script></body></html>")
    with pytest.raises(AssertionError, match="data-errors"):
        opened(page)
