"""Tasks of the study: rows made from fixed seeds, the prompts of both sides, and when a completion is right.

The student reads an instruction and a message. Of a privileged task the teacher also reads the reference answer, as one or
two earlier turns of the conversation, and a request to give it again. Training, validation and held-out rows are the same in
every run: validation rows choose learning rates and lengths, held-out rows are only reported.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from examples import bookings

SPLITS = {"train": 1024, "validation": 128, "held_out": 448}
AGAIN = "Correct. Give the same answer again."
Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        system: the instruction.
        make: endless rows ("message" and "answer") of a split.
        right: whether a completion has the reference's result.
        max_new_tokens: the longest completion; references are shorter.
        shown: how often the teacher reads the reference; 0: both sides read the same prompt.
    """

    name: str
    system: str
    make: Callable[[str], Iterator[Row]]
    right: Callable[[str, str], bool]
    max_new_tokens: int
    shown: int = 2

    def rows(self, split: str, limit: int | None = None) -> list[Row]:
        """Return the different rows of a split, or the first `limit`; those of the splits before it are left out."""
        seen: set[str] = set()
        rows: list[Row] = []
        for name, size in SPLITS.items():
            rows = []
            for row in self.make(name):
                if seen.isdisjoint(keys := {row["message"], row["answer"]}):
                    seen |= keys
                    rows.append(row)
                if len(rows) == size:
                    break
            if name == split:
                return rows[:limit]
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")

    def student_prompt(self, row: Row) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": row["message"]}]

    def teacher_prompt(self, row: Row) -> list[dict[str, str]]:
        turns = [{"role": "assistant", "content": row["answer"]}, {"role": "user", "content": AGAIN}]
        return self.student_prompt(row) + self.shown * turns

    def columns(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Return the columns that OSDTrainer and `osd compare` read."""
        return [
            {"prompt": self.student_prompt(row), "teacher_prompt": self.teacher_prompt(row), "answer": row["answer"]}
            for row in rows
        ]

    @property
    def grader(self) -> str:
        """`right` as `module:function`, for `osd compare`."""
        return f"{self.right.__module__}:{self.right.__name__}"


def check_unseen(train: list[dict[str, Any]], measured: list[dict[str, Any]]) -> None:
    """Refuse measured rows that the trained ones contain, by the content of message or answer; arguments as of `columns`.

    Raises:
        RuntimeError: naming the first of them.
    """
    trained = {row["prompt"][-1]["content"] for row in train} | {row["answer"] for row in train}
    for number, row in enumerate(measured):
        for part in (row["prompt"][-1]["content"], row["answer"]):
            if part in trained:
                raise RuntimeError(f"measured row {number} is in the training data: {part!r}")


def digest(rows: list[dict[str, Any]]) -> str:
    """Return a hash of the rows' content, which the result of every run states."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def last_line_is_right(completion: str, answer: str) -> bool:
    """Return True if the last lines agree: the result of a worked solution."""
    lines = completion.strip().splitlines()
    return bool(lines) and lines[-1].strip() == answer.splitlines()[-1]


def all_is_right(completion: str, answer: str) -> bool:
    return completion.strip() == answer


# -- bookings: the demo's task, with its sentences and values in new combinations -----------------------------------------

DATE = re.compile(r"(?:the )?\d{1,2}(?:st|nd|rd|th)? (?:of )?[A-Z][a-z]+ \d{4}|[A-Z][a-z]+ \d{1,2}(?:st|nd|rd|th)?, \d{4}")


def booking_rows(split: str) -> Iterator[Row]:
    """Recombine sentences, guests, cities and dates of the demo's files, each of its own split."""
    source = bookings.load("train" if split == "train" else "held_out")
    answers = [json.loads(row["answer"]) for row in source]
    dates = [DATE.search(row["message"]) for row in source]
    written = [found[0] for found in dates if found]
    sentences = [
        row["message"].replace(answer["guest"], "{guest}").replace(answer["city"], "{city}").replace(date, "{date}")
        for row, answer, date in zip(source, answers, written, strict=True)
    ]
    parts = {key: sorted({answer[key] for answer in answers}) for key in ("guest", "city")}
    forms = sorted({(text, answer["date"]) for text, answer in zip(written, answers, strict=True)})
    draw, sentences = random.Random(f"bookings {split}"), sorted(set(sentences))
    while True:
        text, date = draw.choice(forms)
        values = {"guest": draw.choice(parts["guest"]), "city": draw.choice(parts["city"])}
        message = draw.choice(sentences).format(**values, date=text)
        yield {"message": message, "answer": json.dumps({**values, "date": date}, ensure_ascii=False)}


# -- long_sums: a running total with its working ---------------------------------------------------------------------------


def sum_rows(terms: int) -> Callable[[str], Iterator[Row]]:
    """Return the maker of running totals from 0 to 99 with so many terms; one wrong step spoils the rest."""

    def make(split: str) -> Iterator[Row]:
        draw = random.Random(f"sums {terms} {split}")
        while True:
            total = draw.randint(10, 99)
            asked, lines = [f"Start with {total}."], []
            for _ in range(terms):
                add = draw.random() < 0.5 if 10 <= total <= 89 else total < 10
                value = draw.randint(2, min(40, 99 - total if add else total))
                asked.append(f"{'Add' if add else 'Subtract'} {value}.")
                after = total + value if add else total - value
                lines.append(f"{total} {'+' if add else '-'} {value} = {after}")
                total = after
            yield {"message": " ".join(asked), "answer": "\n".join([*lines, f"Result: {total}"])}

    return make


# -- shifts: sentences to a table with 24-hour times -----------------------------------------------------------------------

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = {
    "train": "Ada Ben Carl Dora Emil Finn Greta Hugo Ida Jan Kira Leo Mara Nils Otto Pia Rosa Sven Tara Udo".split(),  # noqa: SIM905
    "measured": "Amy Bob Chloe Dan Eva Fred Gina Hank Iris Jack Kate Liam Maud Ned Olga Paul Ruth Sam Tom Vera".split(),  # noqa: SIM905
}
FORMS = (
    "{name} works on {day} from {start} to {end}.",
    "On {day} {name} is in from {start} until {end}.",
    "{name} takes {day}, {start} to {end}.",
)


def clock(hour: int) -> str:
    return "noon" if hour == 12 else f"{hour % 12 or 12} {'am' if hour < 12 else 'pm'}"


def names_of(split: str) -> list[str]:
    return NAMES["train" if split == "train" else "measured"]


def shift_rows(split: str) -> Iterator[Row]:
    draw = random.Random(f"shifts {split}")
    while True:
        asked, lines = [], []
        for day, name in zip(draw.sample(DAYS, 2), draw.sample(names_of(split), 2), strict=True):
            start = draw.randint(6, 15)
            end = start + draw.randint(2, 8)
            asked.append(draw.choice(FORMS).format(name=name, day=day, start=clock(start), end=clock(end)))
            lines.append(f"{day[:3]} {start:02}:00-{end:02}:00 {name}")
        yield {"message": " ".join(asked), "answer": "\n".join(lines)}


# -- contacts: an address that is spelled out, to one line -----------------------------------------------------------------

SURNAMES = "Abbott Baker Castle Dawson Ellis Fisher Grant Harper Irving Jarvis Knight Lawson Mercer Norton Oakley".split()  # noqa: SIM905
HOSTS = ("acorn", "brook", "cedar", "delta", "ember", "fjord", "grove", "harbor")
ENDINGS = ("com", "org", "net", "io")
CONTACTS = (
    "Write to {user} at {host} dot {ending} if you need {name}; the phone is {phone}.",
    "{name} can be reached on {phone} or by mail, {user} at {host} dot {ending}.",
    "My name is {name}, my number is {phone} and my mail is {user} at {host} dot {ending}.",
)


def contact_rows(split: str) -> Iterator[Row]:
    draw = random.Random(f"contacts {split}")
    while True:
        first, last = draw.choice(names_of(split)), draw.choice(SURNAMES)
        host, ending, digits = draw.choice(HOSTS), draw.choice(ENDINGS), f"{draw.randrange(10**6):06}"
        user = draw.choice((first, last, f"{first} dot {last}")).lower()
        values = {
            "name": f"{first} {last}",
            "user": user,
            "host": host,
            "ending": ending,
            "phone": f"{digits[:3]} {digits[3:]}",
        }
        mail = f"{user.replace(' dot ', '.')}@{host}.{ending}"
        yield {
            "message": draw.choice(CONTACTS).format(**values),
            "answer": f"{last}, {first} <{mail}> {digits[:3]}-{digits[3:]}",
        }


WORKED = "Keep a running total. Write one calculation per line, and in the last line 'Result: ' and the total."
TASKS = {
    task.name: task
    for task in (
        Task(name="bookings", system=bookings.SYSTEM, make=booking_rows, right=bookings.score, max_new_tokens=40, shown=1),
        Task(
            name="shifts",
            system="List the shifts, one per line, like this: Mon 09:00-17:00 Name",
            make=shift_rows,
            right=all_is_right,
            max_new_tokens=48,
        ),
        Task(
            name="contacts",
            system="Write the contact in one line, like this: Surname, Name <mail@host.com> 123-456",
            make=contact_rows,
            right=all_is_right,
            max_new_tokens=40,
        ),
        Task(
            name="long_sums",
            system=WORKED,
            make=sum_rows(8),
            right=last_line_is_right,
            max_new_tokens=128,
            shown=0,
        ),
    )
}
