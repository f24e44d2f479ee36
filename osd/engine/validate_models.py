"""Checks on the two models that need no weights: they exist, and they speak the same token ids."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from osd.engine.config import PairConfig


def check_models(config: PairConfig) -> None:
    """Raise before any weights load if the pair cannot work.

    Raises:
        ValueError: a model that cannot be found, or tokenizers that differ (naming the first id that does). Vocabularies
            padded to different sizes are fine: ids beyond the shared ones are never drawn.
    """
    sides = {"teacher": (config.teacher, config.teacher_kwargs), "student": (config.student, config.student_kwargs)}
    for side, (model, kwargs) in sides.items():
        _load(AutoConfig, side, model, {**config.engine_kwargs, **kwargs})
    if any({**config.engine_kwargs, **kwargs}.get("skip_tokenizer_init") for _, kwargs in sides.values()):
        return  # the caller works in token ids, and vouches that they mean the same to both
    vocabularies = [
        _load(AutoTokenizer, side, model, {**config.engine_kwargs, **kwargs}).get_vocab()
        for side, (model, kwargs) in sides.items()
    ]
    check_same_ids(*vocabularies)


def _load(auto_class: Any, side: str, model: str, kwargs: dict[str, Any]) -> Any:
    name = kwargs.get("tokenizer") if auto_class is AutoTokenizer else None
    options = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    try:
        return auto_class.from_pretrained(name or model, **options)
    except (OSError, ValueError) as error:
        what = "tokenizer" if auto_class is AutoTokenizer else "config.json"
        raise ValueError(
            f"{side} model {name or model!r}: no {what} could be loaded ({str(error).splitlines()[0]}). Give a folder with "
            "config.json, weights and tokenizer, or the id of a model that can be downloaded."
        ) from error


def check_same_ids(teacher: dict[str, int], student: dict[str, int]) -> None:
    """Refuse two vocabularies (token -> id) that give an id different meanings.

    Raises:
        ValueError: naming the first id that differs and what it is on each side.
    """
    if teacher == student:
        return
    by_id = [{token_id: token for token, token_id in vocabulary.items()} for vocabulary in (teacher, student)]
    first = min(i for i in by_id[0].keys() | by_id[1].keys() if by_id[0].get(i) != by_id[1].get(i))
    raise ValueError(
        f"teacher and student have different tokenizers: id {first} is {by_id[0].get(first)!r} to the teacher and "
        f"{by_id[1].get(first)!r} to the student. q* mixes the two distributions id by id, so both need the same tokenizer."
    )
