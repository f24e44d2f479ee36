"""One completion as a line of the data: its schema, its statistics, and the filters that may remove it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from osd.core import RECORD_FIELDS
from osd.data import grading
from osd.data.requests import Request
from osd.data.settings import GenerateConfig
from osd.data.strict_json import canonical

Sample = dict[str, Any]

# The record's columns are lists with one entry per token, natural logarithms; osd.core.RECORD_FIELDS says what each is.
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # of the row
        ("sample", pa.int32()),  # number among the row's samples
        ("student_prompt", pa.string()),  # as it was tokenized, chat template and all
        ("teacher_prompt", pa.string()),
        ("completion", pa.string()),  # without special tokens
        ("answer", pa.string()),  # of the answer column, or null
        ("finish_reason", pa.string()),  # stop or length
        ("num_tokens", pa.int32()),
        *((f"alpha_{name}", pa.float32()) for name in ("mean", "std", "min", "max")),
        ("kl_theta_mean", pa.float32()),  # mean over the tokens of KL(q* ‖ π_θ)
        ("kl_teacher_mean", pa.float32()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),  # their texts; joined, the completion with its special tokens
        *((name, pa.list_(pa.float32())) for name in RECORD_FIELDS),
        ("student_prompt_ids", pa.list_(pa.int32())),
        ("teacher_prompt_ids", pa.list_(pa.int32())),
        ("teacher_template", pa.int32()),  # which of the teacher templates, or null
        ("student_model", pa.string()),
        ("teacher_model", pa.string()),
        ("weights_version", pa.int32()),
        ("seed", pa.int64()),  # of this sample
        ("config_hash", pa.string()),
        ("source", pa.string()),  # the input row, as strict JSON
    ]
)


def sample_of(request: Request, completion: Any, tokenizer: Any, run: dict[str, str]) -> Sample:
    """Return one completion as a line of data.

    Args:
        completion: an `osd.data.pair.Completion` with its record.
        run: the columns that are equal in the whole run: student_model, teacher_model, config_hash.
    """
    record = {name: completion.record.values_TR[:, i].tolist() for i, name in enumerate(RECORD_FIELDS)}
    alpha = record["alpha"]
    return {
        "id": request.row.id,
        "sample": request.sample,
        "student_prompt": request.student.text,
        "teacher_prompt": request.teacher.text,
        "completion": completion.text,
        "answer": request.answer,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
        "alpha_mean": _mean(alpha),
        "alpha_std": statistics.pstdev(alpha) if alpha else None,
        "alpha_min": min(alpha, default=None),
        "alpha_max": max(alpha, default=None),
        "kl_theta_mean": _mean(record["kl_theta"]),
        "kl_teacher_mean": _mean(record["kl_teacher"]),
        "token_ids": completion.token_ids,
        "tokens": pieces(tokenizer, completion.token_ids),
        **record,
        "student_prompt_ids": request.student.token_ids,
        "teacher_prompt_ids": request.teacher.token_ids,
        "teacher_template": request.template,
        "weights_version": completion.weights_version,
        "seed": request.seed,
        "source": canonical(request.row.source),
        **run,
    }


def pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; "" for a token that only begins a character, whose last token gets it.

    Never raises: a token that has no text gives "".
    """
    from tokenizers.decoders import DecodeStream

    fast = getattr(tokenizer, "_tokenizer", None)
    if fast is None:
        return [_text(tokenizer.decode, [token]) or "" for token in token_ids]
    stream, texts = DecodeStream(skip_special_tokens=False), []
    for token in token_ids:
        text = _text(stream.step, fast, token)
        if text is None:
            # "Invalid prefix encountered". Byte-fallback tokenizers (Llama 2, Gemma) decode a run of bytes as a whole: half a
            # character after a newline turns that newline, which was returned already, into U+FFFD. Begin anew, as vLLM does.
            stream = DecodeStream(skip_special_tokens=False)
            text = _text(stream.step, fast, token)
        texts.append(text or "")
    return texts


def _text(decode: Callable[..., str | None], *args: Any) -> str | None:
    """Call a decoder: "" if it has no text yet, None if it raises."""
    try:
        return decode(*args) or ""
    except Exception:
        return None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# -- filters ------------------------------------------------------------------------------------------------------------

Filter = Callable[[Sample], bool]


def filters(settings: GenerateConfig) -> dict[str, Filter]:
    """Return the filters that are set, in the order of their use. Each returns whether to keep a sample."""
    least, reasons, most = settings.filter_min_tokens, settings.filter_finish_reasons, settings.filter_max_kl
    found: dict[str, Filter] = {}
    if least is not None:
        found["filter_min_tokens"] = lambda sample: sample["num_tokens"] >= least
    if reasons is not None:
        found["filter_finish_reasons"] = lambda sample: sample["finish_reason"] in reasons
    if settings.filter_answer is not None:
        holds = grading.matcher(settings.answer_match if settings.filter_answer == "match" else "contains")
        found["filter_answer"] = lambda sample: holds(sample["completion"], sample["answer"])
    if most is not None:
        found["filter_max_kl"] = lambda sample: (sample["kl_theta_mean"] or 0.0) <= most
    return found


def removed_by(sample: Sample, asked: dict[str, Filter]) -> str | None:
    """Return the name of the first filter that removes a sample, or None if it is kept."""
    return next((name for name, keep in asked.items() if not keep(sample)), None)
