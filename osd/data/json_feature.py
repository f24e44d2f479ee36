"""A `datasets.Json` column that gives back numbers with all their digits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from datasets import Json


@dataclass
class ExactJson(Json):
    """JSON values of one column; stored, saved and loaded as `datasets.Json`.

    `datasets` 5.2 decodes with pandas' ujson, which keeps 15 digits of a float: 1/3 would come back as 0.33333333333333304.
    Remove this class when `datasets` decodes exactly.
    """

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """Decode one value."""
        return None if value is None else json.loads(value)
