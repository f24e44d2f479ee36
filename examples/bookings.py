"""The demo's task: a one-sentence booking message in, one line of JSON out.

The student reads an instruction and the message. The teacher reads the same conversation carried on: the reference record
stands in it as an earlier answer, and the last message asks for it again. Held-out messages share no sentence, guest, city
or date with the training messages, and dates have to be converted ("the 3rd of August 2026" becomes 2026-08-03).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SYSTEM = 'Extract the booking as JSON with the keys "guest", "city" and "date" (YYYY-MM-DD).'
AGAIN = "Correct. Give the same JSON again."
FIELDS = {"guest", "city", "date"}
DATA = Path(__file__).parent / "data"

Row = dict[str, str]


def load(name: str) -> list[Row]:
    """Rows of ``bookings_<name>.jsonl`` ("train" or "held_out"): the message, and the answer wanted, as JSON text."""
    return [json.loads(line) for line in (DATA / f"bookings_{name}.jsonl").read_text().splitlines()]


def student_prompt(row: Row) -> list[dict[str, str]]:
    """What the student reads, in training and in evaluation."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["message"]}]


def teacher_prompt(row: Row) -> list[dict[str, str]]:
    """The student's prompt, the reference answer, and the request to give it again."""
    shown = [{"role": "assistant", "content": row["answer"]}, {"role": "user", "content": AGAIN}]
    return student_prompt(row) + shown


def training_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """The two columns that OSDTrainer reads."""
    return [{"prompt": student_prompt(row), "teacher_prompt": teacher_prompt(row)} for row in rows]


def parse(completion: str) -> Row | None:
    """The record that a completion states, or None: it must be one JSON object of exactly the three fields, all text."""
    try:
        value = json.loads(completion)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != FIELDS:
        return None
    return value if all(isinstance(field, str) for field in value.values()) else None


def score(completion: str, answer: str) -> bool:
    """Whether the completion is right in form and in all three values."""
    return parse(completion) == json.loads(answer)


def mentions(completion: str, answer: str) -> bool:
    """Whether all three values stand anywhere in the completion: right but for the form, for a fair look at failures."""
    return all(value in completion for value in json.loads(answer).values())


def measure(completions: list[str], rows: list[Row]) -> dict[str, int]:
    """How many of the completions are correct, have the right form, and mention the right values."""
    pairs = [(completion, row["answer"]) for completion, row in zip(completions, rows, strict=True)]
    return {
        "correct": sum(score(*pair) for pair in pairs),
        "valid_json": sum(parse(completion) is not None for completion, _ in pairs),
        "values_anywhere": sum(mentions(*pair) for pair in pairs),
        "total": len(pairs),
    }
