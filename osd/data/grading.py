"""Grading of a completion against a reference answer: `answer_match` of `osd generate`, `osd compare` and `osd inspect`.

`final`, the default, reads the one answer that a completion ends with and compares it as a number, a choice, text or
mathematics. A final answer is what the last ``\\boxed{}`` holds, else what follows the last ``####``, else what follows the
last "the answer is", else what the last sentence states. An answer that is denied ("is not 408") is no final answer.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from math import sqrt
from typing import Any

Matcher = Callable[[str, str], bool]  # (completion, reference answer) -> whether the completion is right

_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?(?<![\w.^])(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?:/\d+(?:\.\d+)?)?(?![\w^]|\.\d)",
    re.IGNORECASE | re.ASCII,  # digits after a Chinese character are a number
)
_STATED = re.compile(
    r"(?:\banswer\b(?:[^.\n:=]{0,80}?\b(?:is|are|was|were|be|equals)\b|[\"']?\s*[:=])|答案(?:是|为|：|:))"
    r"(?![\s:=]*(?:found|obtained|calculated|computed|derived|given by|as follows)\b)[\s:=]*(?:that\s)?",
    re.IGNORECASE,
)
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals|gives|makes|get|say|choose|pick)\b|['’]s\b|[:=是为])\s*", re.IGNORECASE
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|than|least|most|except|between|wrong|incorrect)|n['’]t)\b"
    r"(?:\W+(?!but\b|rather\b)\w+){0,3}\W*$",
    re.IGNORECASE,
)
_DENIAL_AFTER = re.compile(r"\W*(?:is|was|are)(?:\s+(?:not|wrong|incorrect)\b|n['’]t\b)", re.IGNORECASE)
_REASON = re.compile(r"[,;:.(]?\s+\(?(?:since|because|as|due to|which|where|so that|i\.e\.)\s.*", re.IGNORECASE | re.DOTALL)
_FILLER = re.compile(
    r"^(?:(?:therefore|thus|hence|so|then|indeed|clearly|of course|exactly|precisely|simply|just|about|approximately|"
    r"option|choice|in|at|on|(?-i:[Tt]he|an?))\b[\s,:]*(?=.))+",
    re.IGNORECASE,
)
_APPOSITION = re.compile(
    r"(?:the|an?|it|they|this|that|which|who|where|not|but|so|in|with|for|or rather|i\.e\.)\b", re.IGNORECASE
)
_CHOICE = re.compile(r"(?:option|choice|answer)?\s*[(\[]?([A-Za-z])[)\]]?\.?", re.IGNORECASE)
_CHOSEN = re.compile(r"(?:^|\b(?i:option|choice|answer)\s+)[(\[]?([A-Z])[)\]]? is (?:the )?(?:\w+ )?(?:correct|right|answer)\b")
_LABEL = re.compile(r"^[(\[]?([A-Za-z])[)\].:]+\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)\s+|(?<=[。！？])|\n+")  # not after an initial
_END = " .!?:;,。！？"
_LONGEST_FORMULA = 400  # characters; what is longer is no final answer, and costs sympy minutes


def matcher(how: str = "final") -> Matcher:
    """Return the function that grades by `answer_match`.

    Raises:
        ValueError: an unknown name, or a function that cannot be imported.
    """
    if ":" in how:
        return _imported(how)
    if how not in MATCHERS:
        raise ValueError(f"answer_match={how!r} is unknown; use {', '.join(MATCHERS)}, or module:function of your own")
    return MATCHERS[how]


def matches(completion: str, answer: str) -> bool:
    """Return whether the completion's final answer, or all of it, is the reference answer."""
    wanted, completion = reference(answer), _after_thinking(completion)
    if _plain(completion).casefold() == _plain(wanted).casefold():
        return bool(_plain(wanted))
    marked = _marked(completion)
    if marked is not None:
        return _same(marked, wanted)
    given = _stated(completion)
    if given is not None:
        return any(_same(part, wanted) for part in _clauses(given))
    return _unstated(completion, wanted)


def contains(completion: str, answer: str) -> bool:
    """Return whether the reference answer occurs in the completion, not as a part of a longer word or number."""
    wanted = re.escape(_plain(reference(answer)))
    return re.search(rf"(?<![\w.]){wanted}(?!\w|\.\d)", _plain(completion)) is not None


def exact(completion: str, answer: str) -> bool:
    """Return whether the completion is the reference answer, apart from white space around it."""
    return completion.strip() == reference(answer)


def math(completion: str, answer: str) -> bool:
    """Return whether the completion's final answer equals the reference answer as mathematics, by `math_verify`."""
    given = final(completion)
    if given is not None and not _is_mathematics(given):
        given = _last_number(given)
    return given is not None and _same_mathematics(given, reference(answer))


def regex(completion: str, answer: str) -> bool:
    """Return whether the reference answer, a regular expression, is found in the completion."""
    return re.search(answer, completion) is not None


MATCHERS: dict[str, Matcher] = {"final": matches, "exact": exact, "contains": contains, "math": math, "regex": regex}


def check_reference(answer: str, how: str) -> None:
    """Refuse a reference answer that cannot be matched.

    Raises:
        ValueError: it should be a regular expression and does not compile.
    """
    if how == "regex":
        try:
            re.compile(answer)
        except re.error as error:
            raise ValueError(
                f"its answer {answer!r} is not a regular expression ({error}), as answer_match=regex needs"
            ) from error


def stated(answer: str) -> bool:
    """Return True if a reference answer has content; ``####`` or ``\\boxed{}`` alone have none."""
    return bool(_plain(reference(answer)))


def reference(answer: str) -> str:
    """Return a reference answer without its reasoning, where ``\\boxed{}`` or ``####`` separates the two."""
    marked = _marked(answer)
    return answer.strip() if marked is None else marked


def final(text: str) -> str | None:
    r"""Return the final answer of a text: see the module's docstring; None if it states none."""
    text = _after_thinking(text)
    marked = _marked(text)
    if marked is not None:
        return marked
    given = _stated(text)
    if given is not None:
        return _clauses(given)[-1]
    sentence = _last_sentence(text)
    return _last_number(text) or (None if _is_denial(sentence) else _clauses(sentence)[-1] or None)


def wilson(right: float, total: float) -> list[float]:
    """Return the 95 % Wilson score interval of a share: [low, high]; [0, 1] of nothing.

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if total <= 0:
        return [0.0, 1.0]
    z, share = 1.959964, right / total
    centre = share + z * z / (2 * total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


# -- comparing two answers ----------------------------------------------------------------------------------------------


def _same(given: str, wanted: str) -> bool:
    """Compare a final answer with a reference: text, choice, number, mathematics."""
    plain, target = _plain(given), _plain(wanted)
    if not plain or not target:
        return False
    if _bare(plain) == _bare(target) or _bare(_LABEL.sub("", plain)) == _bare(target):
        return True
    if (letter := _letter(target)) is not None:
        label = _LABEL.match(plain)
        return letter == (_letter(plain) or (label and label[1].upper()))
    number = _value(target)
    if number is not None and "\\" not in given:
        found = {_value(match[0]) for match in _NUMBER.finditer(plain.rsplit("=", 1)[-1])}
        return found == {number} and not _DENIED.search(plain[: _NUMBER.search(plain).start()])  # type: ignore[union-attr]
    return (number is not None or _is_mathematics(wanted)) and _same_mathematics(given, wanted)


def _bare(text: str) -> str:
    return _FILLER.sub("", text.casefold()).strip("\"'“”‘’`()[]{} ")


def _letter(text: str) -> str | None:
    """Return the choice that a text is ("(B)", "option b"), or None."""
    found = _CHOICE.fullmatch(text.strip())
    return found[1].upper() if found else None


def _value(text: str) -> Fraction | None:
    """Return the number that a text is, or None."""
    if re.search(r"e[-+]?\d{4}", text):
        return None  # its digits would not fit in memory
    above, _, below = text.strip().removesuffix("%").strip().partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _is_mathematics(text: str) -> bool:
    """Tell a formula from prose: it has a sign or a LaTeX command, and no word of three letters outside commands."""
    bare = re.sub(r"\\[a-zA-Z]+", " ", text)
    return bool(re.search(r"\\[a-zA-Z]|[\^=+*/√π({]", text)) and not re.search(r"[^\W\d_]{3,}", bare)


def _same_mathematics(given: str, wanted: str) -> bool:
    """Compare two formulas with `math_verify`. Its time limits use SIGALRM, which only the main thread may set."""
    if max(len(given), len(wanted)) > _LONGEST_FORMULA:
        return False
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a limit
    limit = 3 if threading.current_thread() is threading.main_thread() else None
    read = [
        parse(f"${_formula(text)}$", fallback_mode="no_fallback", parsing_timeout=limit, raise_on_error=False)  # type: ignore[arg-type]
        for text in (wanted, given)
    ]
    return bool(verify(read[0], read[1], timeout_seconds=limit, raise_on_error=False))


# -- finding the answer in a text ---------------------------------------------------------------------------------------


def _after_thinking(text: str) -> str:
    """Drop a reasoning model's thoughts."""
    return text.rsplit("</think>", 1)[-1]


def _marked(text: str) -> str | None:
    """Return the content of the last ``\\boxed{}`` or <answer></answer>, else the line after the last ``####``, else None."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    return (text.rsplit("####", 1)[1].strip().splitlines() or [""])[0].strip() if "####" in text else None


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


def _stated(text: str) -> str | None:
    """Return the line that follows the last "the answer is" whose answer is not denied."""
    text = _undecorated(text)
    for found in reversed(list(_STATED.finditer(text))):
        line = (text[found.end() :].splitlines() or [""])[0].strip()
        if line and not _DENIED.search(f"{found[0]} {line.split()[0]} "):
            return line
    return None


def _clauses(line: str) -> list[str]:
    """Return a stated answer in ever shorter readings: its sentence, without a reason, without an aside."""
    sentence = _FILLER.sub("", _SENTENCE_END.split(_undecorated(line).strip(" ,:;"), maxsplit=1)[0])
    reasoned = _REASON.sub("", sentence)
    return [part.strip(" ,:;").rstrip(_END) for part in (sentence, reasoned, _without_aside(reasoned))]


def _without_aside(text: str) -> str:
    """Cut an aside: in brackets, after a dash, or after a comma if it cannot be the next item of a list."""
    found = re.search(r"[,;]\s+|\s\(|\s[-–—]+\s", text)
    if found is None:
        return text
    head, rest = text[: found.start()], text[found.end() :]
    listed = (
        re.search(r"\d", rest) or re.match(r"(?:or|and|then|maybe|perhaps)\b", rest, re.IGNORECASE) or not head[-1:].isdigit()
    )
    return text if found[0][0] == "," and listed and not _APPOSITION.match(rest) else head


def _unstated(completion: str, wanted: str) -> bool:
    """Compare where no answer is announced: the last number, or the last sentence."""
    target = _plain(wanted)
    if _value(target) is not None:
        number = _last_number(completion)
        return number is not None and _value(number) == _value(target)
    verdicts = r"(yes|no|true|false)\b"
    if re.fullmatch(verdicts, target.casefold()) and (word := re.match(rf"\W*{verdicts}", completion.casefold())):
        return word[1] == target.casefold()
    sentence = _REASON.sub("", _last_sentence(completion))
    if _is_denial(sentence):
        return False
    if (letter := _letter(target)) is not None and (found := _CHOSEN.search(sentence)):
        return found[1].upper() == letter
    tail = _COPULA.split(sentence)[-1]
    if any(_same(part, wanted) for part in (sentence, tail, *_clauses(tail))):
        return True
    subject = rf"\W*{re.escape(target.casefold())}\W* (?:is|are|was|were) (?:the|our|my)\b"
    return re.match(subject, _plain(sentence).casefold()) is not None


def _is_denial(sentence: str) -> bool:
    return re.search(r"\b(?:not|never|wrong|incorrect)\b|n['’]t\b", sentence, re.IGNORECASE) is not None


def _last_sentence(text: str) -> str:
    return next((part.strip() for part in reversed(_SENTENCE_END.split(_undecorated(text))) if part.strip()), "")


def _last_number(text: str) -> str | None:
    """Return the last number of the last sentence that has one; numbers in a reason, and denied ones, do not count."""
    for sentence in reversed(_SENTENCE_END.split(_ungrouped(_undecorated(text)))):
        if sentence.rstrip().endswith("?"):
            continue
        for part in (_REASON.sub("", sentence), sentence):
            found = list(_NUMBER.finditer(part))
            if found:
                return next((number[0] for number in reversed(found) if not _is_denied(part, number)), None)
    return None


def _is_denied(text: str, number: re.Match[str]) -> bool:
    before = re.split(r"[,;]", text[: number.start()])[-1]
    return bool(_DENIED.search(before) or _DENIAL_AFTER.match(text[number.end() :]))


def _plain(text: str) -> str:
    """Return a text without decoration and final punctuation; join grouped digits."""
    return " ".join(_ungrouped(_undecorated(text)).split()).rstrip(_END)


def _undecorated(text: str) -> str:
    """Drop emphasis, dollar signs and LaTeX's delimiters and spaces; make every minus an ASCII one."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d)\\[,!;: ](?=\d{3})", "", text)
    text = re.sub(r"\\[()\[\]!;:]|\\left|\\right|\\displaystyle|\\,", " ", text).replace("\\%", "%").replace("\\$", "")
    return re.sub(r"[$*`]|(?<!\w)_+|_+(?!\w)", "", text).translate(_MINUS)


_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2011": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "})


def _ungrouped(text: str) -> str:
    """Join digits that commas group in threes."""
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda found: found[0].replace(",", ""), text)


def _formula(text: str) -> str:
    return _ungrouped(re.sub(r"\\[()\[\],!;:]|\$", "", text).translate(_MINUS)).strip(" .")


# -- a user's own function ----------------------------------------------------------------------------------------------


def _imported(path: str) -> Matcher:
    """Import `module:function`, also from the working directory."""
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"answer_match={path!r} cannot be imported ({error}); give module:function") from error
    if not callable(function):
        raise ValueError(f"answer_match={path!r} is not a function; it is called with the completion and the reference answer")

    def graded(completion: str, answer: str) -> bool:
        try:
            return bool(function(completion, answer))
        except Exception as error:
            raise ValueError(f"answer_match={path!r} raised {type(error).__name__}: {error}") from error

    return graded
