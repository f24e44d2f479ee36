"""JSON that every parser reads: no NaN, no infinities, dates and decimals as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def strict(value: Any, digits: int | None = None) -> Any:
    """Copy a value with null in place of numbers that JSON does not have, and with text as keys.

    Args:
        digits: round floats to so many; None: leave them as they are.
    """
    if isinstance(value, float):
        return None if not math.isfinite(value) else value if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {str(key): strict(item, digits) for key, item in value.items()}
    return [strict(item, digits) for item in value] if isinstance(value, (list, tuple)) else value


def finite(value: Any) -> Any:
    """Copy a value as `strict` does, with floats rounded to nine digits, which hold every float32."""
    return strict(value, 9)


def canonical(value: Any) -> str:
    """Write JSON that is the same for equal values."""
    return json.dumps(strict(value), sort_keys=True, ensure_ascii=False, allow_nan=False, default=str)


def json_text(value: Any) -> str:
    """Write indented JSON, for a file that people read too."""
    return json.dumps(strict(value), indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def json_line(value: Mapping[str, Any]) -> bytes:
    """Write one line of JSON."""
    text = json.dumps(strict(value), ensure_ascii=False, allow_nan=False, default=str)
    return (text + "\n").encode("utf-8", "replace")
