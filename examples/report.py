"""Report of the demo: a short table in the terminal, and one self-contained HTML page.

`python examples/report.py outputs/demo/metrics.json` writes the page again next to the metrics.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from osd.report import charts, pages
from osd.report.charts import STUDENT, TEACHER, THIRD

METRICS, PAGE = "metrics.json", "index.html"
# Columns of osd.core.TokenRecord that the page shows for every token.
TOKEN_FIELDS = ("alpha", "logq", "logp_theta", "logp_teacher")
# Label: key in metrics["counts"].
COUNTS = {"exact match": "correct", "valid JSON": "valid_json", "right values anywhere in the text": "values_anywhere"}

ARMS = {"q*": "q*, the mixture", "student": "the student alone (on-policy)", "teacher": "the teacher alone (off-policy)"}


def write(metrics: dict[str, Any], folder: Path) -> None:
    """Write the page and then the metrics to ``folder``. Each file is written atomically."""
    metrics = _finite(metrics)
    pages.write(folder / PAGE, render(metrics))
    pages.write(folder / METRICS, json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON has neither (a mean over no tokens is NaN)."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(metrics: dict[str, Any]) -> str:
    """Render the page from the contents of metrics.json."""
    filters = {
        "shade": shade,
        "percent": lambda share: f"{share:.0%}",
        "probability": probability,
        "shown": shown,
        "tip": tip,
    }
    return pages.render(
        "report.html.j2",
        folder=Path(__file__).parent,
        filters=filters,
        m=metrics,
        count_labels=COUNTS,
        plots=plots(metrics["history"]),
        scale=[i / 20 for i in range(21)],
        runs=[metrics, *metrics["others"]],
        arms=ARMS,
        decided=decided(metrics["probes"]),
    )


# -- one completion, token by token -------------------------------------------------------------------------------------


def shade(alpha: float) -> str:
    """Return the background of a token: the student's colour below α = 1/2, the teacher's above, stronger towards 0 and 1."""
    strength = abs(2 * alpha - 1) ** 0.8
    return f"rgb(var(--{'teacher' if alpha > 0.5 else 'student'}) / calc(var(--most) * {strength:.3f}))"


def decided(probes: list[dict[str, Any]], count: int = 6) -> list[dict[str, Any]]:
    """Return the tokens of the first sample from q* on which the two models differ most, in the order of the text."""
    tokens = next((probe["tokens"] for probe in probes if not probe["arm"]), [])
    gaps = {i: abs(t["logp_teacher"] - t["logp_theta"]) for i, t in enumerate(tokens) if None not in t.values()}
    return [tokens[i] for i in sorted(sorted(gaps, key=gaps.__getitem__, reverse=True)[:count])]


def probability(logp: float) -> str:
    """Return exp(logp) as a percentage."""
    share = 100 * math.exp(logp)
    return f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"


def shown(token: str) -> str:
    """Return the text of a token with visible line breaks."""
    return token.replace("\n", "↵\n")


def tip(token: dict[str, Any]) -> str:
    """Return the tooltip of a token; log-probabilities in nats."""
    return (
        f"token   {token['token']!r}\nα       {token['alpha']:.3f}\nlog q*  {token['logq']:.3f}\n"
        f"log π_θ {token['logp_theta']:.3f}\nlog π_t {token['logp_teacher']:.3f}"
    )


# -- plots --------------------------------------------------------------------------------------------------------------


def plots(history: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Plot loss, both divergences and α by step. Returns the title and the SVG of each chart."""
    steps = [entry["step"] for entry in history]
    series = {name: _series(history, name) for name in history[0]}
    drawn = {
        "Loss: KL(teacher ‖ student), nats": _plot_loss,
        "Divergence of q* from each side, nats": _plot_divergences,
        "α, the teacher's weight in q*": _plot_alpha,
    }
    return [(title, charts.svg(partial(_plot, draw, steps, series), width=3.8, height=3.0)) for title, draw in drawn.items()]


def _plot(draw: Any, steps: list[int], series: dict[str, list[float]], axes: Any) -> None:
    draw(axes, steps, series)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _series(history: list[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if entry.get(name) is None else entry[name] for entry in history]


def _plot_loss(axes: Any, steps: list[int], series: dict[str, list[float]]) -> None:
    axes.plot(steps, series["loss"], color=THIRD, marker="o", markersize=3)
    axes.set_ylim(0, _top(series["loss"]))


def _plot_divergences(axes: Any, steps: list[int], series: dict[str, list[float]]) -> None:
    # α makes the two equal, so the lines coincide. Dashes make both visible.
    axes.plot(steps, series["osd/q/kl_student"], color=STUDENT, linewidth=3.2, alpha=0.65, label="KL(q* ‖ student)")
    axes.plot(steps, series["osd/q/kl_teacher"], color=TEACHER, linestyle=(0, (3, 2)), label="KL(q* ‖ teacher)")
    axes.set_ylim(0, _top(series["osd/q/kl_student"] + series["osd/q/kl_teacher"], room=1.3))
    axes.legend(loc="upper right")


def _top(values: list[float], room: float = 1.08) -> float:
    """Return the upper end of an axis from 0, with room above the highest value; without a positive value, ``room``."""
    return room * max((value for value in values if value > 0), default=1.0)


def _plot_alpha(axes: Any, steps: list[int], series: dict[str, list[float]]) -> None:
    mean, std = series["osd/alpha/mean"], series["osd/alpha/std"]
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    for lower, upper, opacity, label in (
        (series["osd/alpha/min"], series["osd/alpha/max"], 0.12, "min to max"),
        (low, high, 0.3, "mean ± std"),
    ):
        axes.fill_between(steps, lower, upper, color=TEACHER, alpha=opacity, linewidth=0, label=label)
    axes.plot(steps, mean, color=TEACHER, label="mean")
    axes.set_ylim(0, 1)
    axes.legend(ncols=3, loc="upper center", handlelength=1.2, columnspacing=1.0)


# -- the terminal -------------------------------------------------------------------------------------------------------


def show(metrics: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the table, a few completions, and the paths of the files."""
    console.print(table(metrics))
    for example in metrics["examples"][:3]:
        console.print(f"\n[bold]message[/] {escape(example['message'])}", highlight=False)
        for when in ("before", "after"):
            console.print(f"[dim]{when:7}[/] {escape(' '.join(example[when].split()))}", highlight=False, no_wrap=True)
    seconds = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in metrics["timing"].items())
    console.print(f"\n{metrics['steps']} steps, {metrics['seconds']:.0f} seconds ({seconds})", highlight=False)
    console.print(f"{folder / METRICS}\n{folder / PAGE}", highlight=False)


def table(metrics: dict[str, Any]) -> Table:
    """Build the table of results on the held-out messages before and after, and of the first and last training step."""
    counts, first, last = metrics["counts"], metrics["history"][0], metrics["history"][-1]
    runs = [metrics, *metrics["others"]]
    result = Table(title=f"{counts['after']['total']} held-out messages, student's prompt alone, greedy")
    result.add_column()
    result.add_column("before", justify="right")
    for run in runs:
        result.add_column(f"after, {run['arm']}", justify="right")
    for label, key in COUNTS.items():
        columns = (counts["before"], *(run["counts"]["after"] for run in runs))
        result.add_row(label, *(f"{c[key]}/{c['total']} {c[key] / c['total']:5.0%}" for c in columns))
    result.add_section()
    result.add_row(f"training, {metrics['arm']}", "first step", "last step")
    for label, key in (("loss", "loss"), ("α, mean", "osd/alpha/mean"), ("KL(q* ‖ student), nats", "osd/q/kl_student")):
        result.add_row(label, f"{first[key]:.3f}", f"{last[key]:.3f}")
    return result


if __name__ == "__main__":
    path = Path(sys.argv[1])
    write(json.loads(path.read_text(encoding="utf-8")), path.parent)
