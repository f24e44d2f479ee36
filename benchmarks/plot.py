"""Plot of the ratio to teacher-only vLLM against batch size, from results of benchmarks/sampling.py.

    python benchmarks/plot.py RESULT.json [MORE.json ...] [--output sampling.svg]

Each pair and machine gets one panel; several results of the same pair and machine are merged. Writes SVG and PNG.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Python adds only benchmarks/ to the path of a script

from benchmarks.summary import SYSTEMS, Result, merge, summarise

# Okabe and Ito's colours: distinguishable with colour blindness and in print.
STYLES = {
    "nested": ("#D55E00", "s"),
    "transformers": ("#E69F00", "^"),
    "paired": ("#0072B2", "o"),
    "sum": ("#777777", ""),
    "teacher": ("#000000", ""),
    "student": ("#009E73", "v"),
}
LABELS = SYSTEMS | {"sum": "both models, one after the other"}


def curves(result: Result) -> dict[str, list[tuple[int, float]]]:
    """Return (sequences, ratio to teacher-only) points of each system, and of teacher-only plus student-only."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in STYLES}
    shapes = [r for r in summarise(result)["ratios"] if r["statistic"] == "ms_per_step"]
    for row in shapes:
        over = dict(row["over_teacher"])
        if over.get("student"):
            over["sum"] = 1 + over["student"]
        for name, value in over.items():
            if value:
                found[name].append((row["batch_size"], value))
    return {name: points for name, points in found.items() if points}


def group(results: list[Result]) -> list[Result]:
    """Merge the results of each pair and machine."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["pair"], result["hardware"]["device"]), []).append(result)
    return [merge(found) for found in groups.values()]


def draw(axes: Any, result: Result) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    lines = curves(result)
    for name, points in lines.items():
        colour, marker = STYLES[name]
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2.2 if name == "paired" else 1.4,
            linestyle="--" if name in ("sum", "teacher") else "-",
            label=LABELS[name],
            zorder=3 if name == "paired" else 2,
        )
        if name == "paired":
            for x, y in points:
                axes.annotate(f"{y:.2f}×", (x, y), (0, -13), textcoords="offset points", ha="center", fontsize=8, color=colour)
    sizes = sorted({x for points in lines.values() for x, _ in points})
    axes.set(
        xscale="log", yscale="log", xlabel="sequences in the batch", title=f"{result['pair']}, {result['hardware']['device']}"
    )
    axes.xaxis.set_major_locator(NullLocator())
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)


def plot(results: list[Result], output: Path) -> list[Path]:
    """Draw the plot and write it to ``output`` as SVG and PNG. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "osd", "svg.fonttype": "none"}):
        panels = [result for result in group(results) if curves(result)]
        if not panels:
            raise ValueError("nothing to draw: no result has teacher-only and another system at the same batch size")
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(4.6 * len(panels) + 0.6, 3.8), squeeze=False, layout="constrained"
        )
        for panel, result in zip(axes[0], panels, strict=True):
            draw(panel, result)
        axes[0][0].set_ylabel("time per step / teacher-only vLLM")
        handles = {label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        paths = [output.with_suffix(suffix) for suffix in (".svg", ".png")]
        for path in paths:
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="default: beside the first result")
    args = parser.parse_args()
    paths = plot([json.loads(path.read_text()) for path in args.results], args.output or args.results[0])
    print("written to", *paths)


if __name__ == "__main__":
    main()
