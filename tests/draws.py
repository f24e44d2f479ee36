"""Draws without models, a function of the seed and the prompts; imports neither torch nor transformers, so that it is quick."""

from __future__ import annotations

import random
from collections.abc import Sequence

from osd.core import RECORD_FIELDS


def draw(seed: int, teacher: Sequence[int], student: Sequence[int], max_tokens: int) -> tuple[list[int], list[list[float]]]:
    """Return token ids of words and a row of the record for each."""
    chance = random.Random(f"{seed} {list(teacher)} {list(student)}")
    ids = [chance.randrange(7, 64) for _ in range(chance.randint(1, max_tokens))]
    rows = [[chance.random() for _ in RECORD_FIELDS] for _ in ids]
    for row in rows:
        row[RECORD_FIELDS.index("logp_theta")] *= -3
        row[RECORD_FIELDS.index("logp_teacher")] *= -2
    return ids, rows
