"""Plots for self-contained pages: SVG without fonts or scripts. Lines and text take the page's light or dark colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

STUDENT, TEACHER, THIRD, FOURTH = "#3b7dd8", "#d9762b", "#4d9a5f", "#8a63b8"
# Matplotlib needs a fixed colour; in the SVG it is replaced by the page's text colour.
INK = "#010203"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "osd",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def svg(draw: Callable[[Any], None], *, width: float = 4.3, height: float = 2.7) -> str:
    """Return the drawing of `draw(axes)` as SVG that fills the width of its element.

    Sizes are in inches and set the proportions: a narrower plot has larger text on the page.
    """
    with plt.rc_context(_STYLE):
        figure = _figure(draw, width, height)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).replace(INK, "currentColor")
    return re.sub(r"<svg[^>]*>", lambda tag: re.sub(r' (width|height)="[^"]*"', "", tag[0]), text, count=1)


def png(draw: Callable[[Any], None], *, width: float = 7.2, height: float = 4.4) -> bytes:
    """Return the drawing as a PNG on white, at 160 dots per inch."""
    with plt.rc_context({**_STYLE, "font.size": 10}):
        figure = _figure(draw, width, height)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
        plt.close(figure)
    return buffer.getvalue()


def _figure(draw: Callable[[Any], None], width: float, height: float) -> Any:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.margins(x=0.01)
    draw(axes)
    return figure
