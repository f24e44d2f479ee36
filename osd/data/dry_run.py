"""`--dry_run`: print the prompts of both sides for the first rows. Loads tokenizers, no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from osd.data.generate import StartPair, read_rows
from osd.data.requests import RequestBuilder
from osd.data.settings import CompareConfig, GenerateConfig

ROWS = 3


def dry_run(settings: GenerateConfig | CompareConfig, start_pair: Any) -> Iterator[str]:
    """Yield the prompts of the first rows, as text for the terminal.

    Raises:
        ValueError: settings that do not fit the input, models that do not exist or do not fit together.
    """
    rows = read_rows(settings, limit=min(ROWS, settings.limit or ROWS))
    if not rows.columns:  # no row could be read
        yield from (f"row {row.number}: rejected: {row.error}\n" for row in rows.rows)
        return
    builder = RequestBuilder(settings, rows.columns)
    starter: StartPair = start_pair
    with starter(settings) as pair:  # type: ignore[arg-type]
        builder.use_tokenizers(pair.teacher_tokenizer, pair.student_tokenizer)
        for row in rows.rows:
            name = f"row {row.number} (id {row.id})"
            try:
                request = builder.build(row, 0)
            except ValueError as error:
                yield f"{name}: rejected: {error}\n"
                continue
            sides = (pair.student_tokenizer, request.student.token_ids, pair.teacher_tokenizer, request.teacher.token_ids)
            answer = "" if request.answer is None else f"\n  answer: {request.answer}"
            yield f"{described(name, *sides)}{answer}\n"


def described(name: str, student: Any, student_ids: Sequence[int], teacher: Any, teacher_ids: Sequence[int]) -> str:
    """Describe a row by its two prompts, decoded from their token ids with all special tokens.

    Args:
        student, teacher: the tokenizers.
    """
    sides = (("student", student, student_ids), ("teacher", teacher, teacher_ids))
    return "\n".join([name, *(_side(*side) for side in sides)])


def _side(name: str, tokenizer: Any, token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    return f"  {name}, {len(token_ids)} tokens:\n" + "\n".join(f"    {line}" for line in text.split("\n"))
