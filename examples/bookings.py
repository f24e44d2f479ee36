"""Task of the demo: extract a JSON record from a booking message of one sentence.

The student reads an instruction and the message. The teacher reads the same conversation with two more messages: the
reference record as an earlier answer, and a request to give it again. Held-out messages share no sentence, guest, city
or date with the training messages. Dates must be converted ("the 3rd of August 2026" becomes 2026-08-03).

`python examples/bookings.py FOLDER` writes both prompts and the answer of every row for the `osd` commands.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SYSTEM = 'Extract the booking as JSON with the keys "guest", "city" and "date" (YYYY-MM-DD).'
AGAIN = "Correct. Give the same JSON again."
FIELDS = {"guest", "city", "date"}
DATA = Path(__file__).parent / "data"

Row = dict[str, str]


def load(name: str) -> list[Row]:
    """Load the rows of ``bookings_<name>.jsonl`` ("train" or "held_out"): message and reference answer, as JSON text."""
    return [json.loads(line) for line in (DATA / f"bookings_{name}.jsonl").read_text().splitlines()]


def student_prompt(row: Row) -> list[dict[str, str]]:
    """Return the student's prompt for training and evaluation."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["message"]}]


def teacher_prompt(row: Row) -> list[dict[str, str]]:
    """Return the student's prompt followed by the reference answer and the request to give it again."""
    shown = [{"role": "assistant", "content": row["answer"]}, {"role": "user", "content": AGAIN}]
    return student_prompt(row) + shown


def training_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the two columns that OSDTrainer reads."""
    return [{"prompt": student_prompt(row), "teacher_prompt": teacher_prompt(row)} for row in rows]


def parse(completion: str) -> Row | None:
    """Parse a completion. Returns None unless it is one JSON object with exactly the three fields, all strings."""
    try:
        value = json.loads(completion)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != FIELDS:
        return None
    return value if all(isinstance(field, str) for field in value.values()) else None


def score(completion: str, answer: str) -> bool:
    """Return True if the completion has the right form and all three right values."""
    return parse(completion) == json.loads(answer)


def mentions(completion: str, answer: str) -> bool:
    """Return True if all three values occur anywhere in the completion, whatever its form."""
    return all(value in completion for value in json.loads(answer).values())


def measure(completions: list[str], rows: list[Row]) -> dict[str, int]:
    """Count the completions that are correct, have the right form, and mention the right values."""
    pairs = [(completion, row["answer"]) for completion, row in zip(completions, rows, strict=True)]
    return {
        "correct": sum(score(*pair) for pair in pairs),
        "valid_json": sum(parse(completion) is not None for completion, _ in pairs),
        "values_anywhere": sum(mentions(*pair) for pair in pairs),
        "total": len(pairs),
    }


def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl and held_out.jsonl, with the columns prompt, teacher_prompt and answer."""
    [folder] = map(Path, sys.argv[1:] if argv is None else argv)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "held_out"):
        rows = load(name)
        lines = ({**prompts, "answer": row["answer"]} for row, prompts in zip(rows, training_rows(rows), strict=True))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
