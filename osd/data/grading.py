"""Does a completion give the reference answer?"""

from __future__ import annotations

import re

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?%?"
_STATED = re.compile(r"answer\s*(?:is|:|=)\s*(.+?)(?:\.\s|\.?$|\n)", re.IGNORECASE)


def stated(answer: str) -> bool:
    """Whether a reference answer says anything: ``####`` or ``\\boxed{}`` alone do not."""
    return bool(_plain(reference(answer)))


def contains(completion: str, answer: str) -> bool:
    """Whether the answer stands in the completion, not as a part of a longer word or number."""
    wanted = re.escape(_plain(reference(answer)))
    return re.search(rf"(?<![\w.]){wanted}(?!\w|\.\d)", _plain(completion)) is not None


def matches(completion: str, answer: str) -> bool:
    """Whether the completion's final answer, or all of it, is the reference answer: the same number, or the same text."""
    wanted = reference(answer)
    return any(given is not None and _same(given, wanted) for given in (final(completion), completion))


def _same(given: str, wanted: str) -> bool:
    given, wanted = _plain(given), _plain(wanted)
    try:
        return float(given.rstrip("%")) == float(wanted.rstrip("%"))
    except ValueError:
        return given.casefold() == wanted.casefold()


def reference(answer: str) -> str:
    """A reference answer without its reasoning, where ``\\boxed{}`` or ``####`` tells the two apart."""
    boxed = _last_boxed(answer)
    marked = boxed if boxed is not None else answer.rsplit("####", 1)[1] if "####" in answer else answer
    return marked.strip()


def final(text: str) -> str | None:
    r"""The final answer that a text states: in the last ``\boxed{}``, after the last ``####``, after the last "answer is",
    or its last number; None if it states none."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n")[0]
    stated = _STATED.findall(text)
    if stated:
        return stated[-1].strip()
    numbers = re.findall(_NUMBER, text)
    return numbers[-1] if numbers else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return None


def _plain(text: str) -> str:
    """Without what only decorates an answer: dollar signs, thousands separators, emphasis, a final full stop."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("$", "").replace("*", ""))
    return " ".join(text.split()).removesuffix(".")
