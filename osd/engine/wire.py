"""The pair over HTTP: the options of a request and the record of a completion as JSON.

The body of a request to vLLM's completion routes may have an object ``osd`` with the `REQUEST_OPTIONS`. If it asks for the
``record``, each choice of the answer has an object ``osd`` too: the per-token record, one list per column.
`osd.engine.backend.server` is the server, `osd.data.remote` the client.

T tokens of a completion, R record fields, W columns of a returned row.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from osd.core import RECORD_FIELDS, TOKEN_ORIGINS, TokenRecord
from osd.engine.request import PairOptions, check_names

FIELD = "osd"  # of a request's body, and of each choice of an answer
INFO_ROUTE = "/v1/osd"
# Of a trainer, below it; see `osd.engine.backend.training`.
STATE_ROUTE, TRAINER_ROUTE, WEIGHTS_ROUTE, HEAD_ROUTE, SAMPLE_ROUTE = (
    f"{INFO_ROUTE}/{name}" for name in ("state", "trainer", "weights", "teacher_head", "sample")
)
STUDENT_PROMPTS = ("student_prompt", "student_messages", "student_prompt_token_ids")
REQUEST_OPTIONS = (*STUDENT_PROMPTS, "alpha", "mix_tokens", "teacher_only", "record")
VERSION_COLUMN, ORIGIN_COLUMN = "weights_version", "origin"
CACHED_COLUMN = len(RECORD_FIELDS) + 2  # of a returned row; see `split_rows`
FIRST_SIGNAL_COLUMN = CACHED_COLUMN + 1
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
    """Return the engine's options for a request's options, in which the student's prompt is token ids.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """
    ids = options.get("student_prompt_token_ids")
    if isinstance(ids, list) and not all(type(token) is int for token in ids):
        wrong = next(token for token in ids if type(token) is not int)
        raise ValueError(f"{FIELD}.student_prompt_token_ids has {wrong!r:.200}, which is not a token id")
    return returned(PairOptions(**options))


def returned(options: PairOptions) -> PairOptions:
    """Return a request's options as a server runs them: the record travels with the tokens; the worker keeps none."""
    return replace(
        options,
        record=False,
        hidden=False,
        topk=0,
        weights_version=None,
        return_record=options.record or options.return_record,
        # JSON has larger numbers than the message to the engine.
        mix_tokens=None if options.mix_tokens is None else min(options.mix_tokens, 2**62),
    )


# -- the record ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ReturnedRows:
    """The record of a completion as the engine returns it.

    Attributes:
        values_TR: float32, columns as in ``osd.core.RECORD_FIELDS``.
        version_T: the version of the student's weights that drew each token, int64.
        origin_T: how each token came to be, uint8, an index into ``osd.core.TOKEN_ORIGINS``.
        cached: tokens of the student's prompt that were in its prefix cache.
        signal_TX: the teacher's final hidden states, as float32 of the same bits, or its largest log-probabilities
            (`osd.engine.topk`); no columns if neither was asked for.
    """

    values_TR: np.ndarray
    version_T: np.ndarray
    origin_T: np.ndarray
    cached: int
    signal_TX: np.ndarray


def split_rows(rows_TW: np.ndarray) -> ReturnedRows:
    """Split rows, float32: the record's columns, the version, the origin, the cached tokens, the teacher's signal."""
    return ReturnedRows(
        values_TR=rows_TW[:, : len(RECORD_FIELDS)],
        version_T=rows_TW[:, len(RECORD_FIELDS)].astype(np.int64),
        origin_T=rows_TW[:, len(RECORD_FIELDS) + 1].astype(np.uint8),
        cached=int(rows_TW[0, CACHED_COLUMN]) if len(rows_TW) else 0,
        signal_TX=rows_TW[:, FIRST_SIGNAL_COLUMN:],
    )


def record_to_json(rows_TW: np.ndarray) -> dict[str, list[Any]]:
    """Return a returned record as one list of T entries per column.

    Numbers are the shortest that give the same float32 again. NaN becomes null, and minus infinity the text "-inf".
    """
    rows = split_rows(rows_TW)
    columns = {name: [_number(value) for value in rows.values_TR[:, i]] for i, name in enumerate(RECORD_FIELDS)}
    origins = [TOKEN_ORIGINS[index] for index in rows.origin_T]
    return {**columns, VERSION_COLUMN: rows.version_T.tolist(), ORIGIN_COLUMN: origins}


def record_from_json(columns: Mapping[str, Any]) -> TokenRecord:
    """Return the record of a choice's ``osd`` object, bit for bit as the engine made it; no origins without drafts."""
    origins = [TOKEN_ORIGINS.index(origin) for origin in columns[ORIGIN_COLUMN]]
    values = [[math.nan if x is None else float(x) for x in columns[name]] for name in RECORD_FIELDS]
    versions = columns[VERSION_COLUMN]
    return TokenRecord(
        values_TR=torch.tensor(values, dtype=torch.float32).T.contiguous(),
        teacher_hidden_TH=None,
        weights_version=versions[-1] if versions else 0,
        version_T=torch.tensor(versions) if len(set(versions)) > 1 else None,
        origin_T=torch.tensor(origins, dtype=torch.uint8) if any(origins) else None,
    )


def _number(value: np.float32) -> Any:
    if math.isfinite(value):
        return float(str(value))
    return None if math.isnan(value) else _MINUS_INFINITY


# -- frames of bytes ----------------------------------------------------------------------------------------------------

_LENGTH = struct.Struct("<Q")


def pack(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return plain values and tensors in the safetensors format."""
    return save(dict(tensors), metadata={FIELD: json.dumps(described)})


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the plain values and the tensors of :func:`pack`."""
    (length,) = _LENGTH.unpack(data[: _LENGTH.size])
    header = json.loads(data[_LENGTH.size : _LENGTH.size + length])
    return json.loads(header["__metadata__"][FIELD]), load(data)


def framed(data: bytes) -> bytes:
    """Return bytes with their length before them."""
    return _LENGTH.pack(len(data)) + data


def frames(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Return each of the :func:`framed` bytes of a stream, as soon as it is whole.

    Raises:
        ValueError: the stream ends inside a frame.
    """
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        while len(rest) >= _LENGTH.size and len(rest) >= (end := _LENGTH.size + _LENGTH.unpack_from(rest)[0]):
            frame = bytes(rest[_LENGTH.size : end])
            del rest[:end]
            yield frame
    if rest:
        raise ValueError(f"the stream ended {len(rest)} bytes into a frame")


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
