"""The pair over HTTP: the options of a request and the record of a completion as JSON.

The body of a request to vLLM's completion routes may have an object ``osd``: `REQUEST_OPTIONS`. With ``record`` each choice of
the answer has one too: the per-token record, one list per column. `osd.engine.backend.server` is the server,
`osd.data.remote` the client.

T tokens of a completion, R record fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from osd.core import RECORD_FIELDS, TokenRecord
from osd.engine.request import PairOptions, check_names

FIELD = "osd"  # of a request's body, and of each choice of an answer
INFO_ROUTE = "/v1/osd"
STUDENT_PROMPTS = ("student_prompt", "student_messages", "student_prompt_token_ids")
REQUEST_OPTIONS = (*STUDENT_PROMPTS, "alpha", "mix_tokens", "teacher_only", "record")
VERSION_COLUMN = "weights_version"
_MINUS_INFINITY = "-inf"  # JSON has none; null is NaN


def take_options(body: dict[str, Any]) -> dict[str, Any]:
    """Take the pair's options out of a request's body, without those that are null.

    Raises:
        ValueError: an option that is unknown or outside of the object, or the student's prompt in two forms.
    """
    for name in body:
        if name.startswith(f"{FIELD}_"):
            option = name.removeprefix(f"{FIELD}_")
            raise ValueError(f'{name!r} is not a field of a request; write it into the object "{FIELD}": {{"{option}": ...}}')
    options = body.pop(FIELD, None)
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ValueError(f"{FIELD}={options!r:.200} is not an object of options")
    check_names(options, REQUEST_OPTIONS, FIELD)
    options = {name: value for name, value in options.items() if value is not None}
    prompts = [name for name in STUDENT_PROMPTS if name in options]
    if len(prompts) > 1:
        raise ValueError(f"{FIELD} has {' and '.join(prompts)}; give the student's prompt once")
    if prompts and options.get("teacher_only") is True:
        raise ValueError(f"{FIELD}.{prompts[0]} has no effect with teacher_only, which never runs the student; remove one")
    return options


def pair_options(options: Mapping[str, Any]) -> PairOptions:
    """Return the engine's options of those of a request whose student's prompt is token ids.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """
    ids = options.get("student_prompt_token_ids")
    if isinstance(ids, list) and not all(type(token) is int for token in ids):
        wrong = next(token for token in ids if type(token) is not int)
        raise ValueError(f"{FIELD}.student_prompt_token_ids has {wrong!r:.200}, which is not a token id")
    return returned(PairOptions(**options))


def returned(options: PairOptions) -> PairOptions:
    """Return a request's options as a server runs them: the record comes with the tokens, and nobody collects it."""
    return replace(
        options,
        record=False,
        hidden=False,
        weights_version=None,
        return_record=options.record or options.return_record,
        # JSON has larger numbers than the message to the engine.
        mix_tokens=None if options.mix_tokens is None else min(options.mix_tokens, 2**62),
    )


# -- the record ---------------------------------------------------------------------------------------------------------


def record_to_json(rows: np.ndarray) -> dict[str, list[Any]]:
    """Return a record, float32 [T, R + 1], as one list of T entries per column.

    Numbers are the shortest that give the same float32 again. NaN becomes null, and minus infinity the text "-inf".
    """
    columns = {name: [_number(value) for value in rows[:, i]] for i, name in enumerate(RECORD_FIELDS)}
    return {**columns, VERSION_COLUMN: rows[:, -1].astype(int).tolist()}


def record_from_json(columns: Mapping[str, Any]) -> TokenRecord:
    """Return the record of a choice's ``osd`` object, bit for bit as the engine made it."""
    values = [[math.nan if x is None else float(x) for x in columns[name]] for name in RECORD_FIELDS]
    versions = columns[VERSION_COLUMN]
    return TokenRecord(
        values_TR=torch.tensor(values, dtype=torch.float32).T.contiguous(),
        teacher_hidden_TH=None,
        weights_version=versions[-1] if versions else 0,
    )


def _number(value: np.float32) -> Any:
    if math.isfinite(value):
        return float(str(value))
    return None if math.isnan(value) else _MINUS_INFINITY


# -- answers ------------------------------------------------------------------------------------------------------------


def add_records(body: bytes, records: Mapping[int, dict[str, list[Any]]]) -> bytes:
    """Add the records, by index of the choice, to a JSON answer's choices. An answer without choices stays as it is."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    for choice in (answer.get("choices") if isinstance(answer, dict) else None) or ():
        if (record := records.get(choice["index"])) is not None:
            choice[FIELD] = record
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


class EventStream:
    """Adds records to server-sent events: to the event of each choice that says why it finished."""

    def __init__(self, records: Mapping[int, dict[str, list[Any]]]) -> None:
        self.records = records
        self._rest = b""

    def feed(self, data: bytes, *, last: bool) -> bytes:
        """Return what can be sent of the stream so far; events are sent whole."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        out = b"".join(self._event(event) + b"\n\n" for event in events)
        if last:
            out, self._rest = out + self._rest, b""
        return out

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {") or b'"finish_reason":"' not in event:
            return event
        return b"data: " + add_records(event.removeprefix(b"data: "), self.records)
