"""Rendering of rows for both sides: column names, templates in turn, system prompts, chat templates, token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from osd.data import grading
from osd.data.option_groups import as_mapping
from osd.data.reader import Row
from osd.data.settings import CompareConfig, GenerateConfig
from osd.prompt_checks import check_text_only, compare_templates, forget_warnings
from osd.prompts import (
    PROMPT_COLUMN,
    Prompt,
    encode,
    fill,
    for_side,
    pinned_date,
    privileged_template_for,
    teacher_prompt,
    template_fields,
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """Prompt of one side: the text as it was tokenized, and its token ids."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to draw.

    Attributes:
        row: the row of the input.
        sample: number among the samples of the row, from 0.
        seed: seed of the draws, a function of the run's seed, the row's id and `sample`.
        template: index of the teacher template, or None without one.
        teacher, student: the prompt of each side.
        answer: the reference answer, or None.
    """

    row: Row
    sample: int
    seed: int
    template: int | None
    teacher: Side
    student: Side
    answer: str | None


class RequestBuilder:
    """Builds requests from rows, after every check that needs only the column names.

    Args:
        settings: the settings of the run.
        columns: the columns of the input.

    Attributes:
        started: local time that chat templates get as the current time (`strftime_now`), the same for the whole run.

    Raises:
        ValueError: a column or field that the input does not have, or two ways to build the teacher's prompt.
    """

    def __init__(self, settings: GenerateConfig | CompareConfig, columns: Iterable[str]) -> None:
        self.settings = settings
        self.names: dict[str, str] = as_mapping(settings.columns)
        self.templates: list[str | None] = []
        self._check_columns(settings, list(columns))
        self.tokenizers: tuple[Any, Any] | None = None
        self.started = datetime.now()

    def _check_columns(self, settings: GenerateConfig | CompareConfig, columns: list[str]) -> None:
        for name, column in (*self.names.items(), ("answer_column", settings.answer_column)):
            if column is not None and column not in columns:
                where = f"columns[{name!r}]" if name in self.names else name
                raise ValueError(f"{where}={column!r} is not a column of the input; its columns are {sorted(columns)}")
            if name in self.names and name in columns and column != name:
                raise ValueError(f"columns[{name!r}]={column!r}: the input has a column {name!r} too; use another name")
        fields = sorted({*columns, *self.names})
        if settings.student_template is None and settings.prompt_column not in fields:
            raise ValueError(
                f"prompt_column={settings.prompt_column!r} is not a column of the input; its columns are {sorted(columns)}. "
                "Name the column with the prompts, or write a student_template"
            )
        for name in template_fields(settings.student_template or ""):
            if name not in fields and not (name == PROMPT_COLUMN and settings.prompt_column in fields):
                raise ValueError(f"student_template names {{{name}}}, which the input does not have; its columns are {fields}")
        for name in ("student_chat_template", "teacher_chat_template"):
            template = getattr(settings, name)
            if template is not None and not _is_jinja(template) and not Path(template).is_file():
                raise ValueError(f"{name}={template!r} is neither a file nor the text of a chat template")
        templates = settings.teacher_template_list()
        given: list[str | None] = [None] if templates is None else list(templates)
        self.templates = [privileged_template_for({*fields, PROMPT_COLUMN}, template) for template in given]

    def use_tokenizers(self, teacher: Any, student: Any) -> None:
        """Render with these tokenizers, under the chat templates of the settings."""
        for tokenizer, template in (
            (teacher, self.settings.teacher_chat_template),
            (student, self.settings.student_chat_template),
        ):
            if template is not None:
                tokenizer.chat_template = template if _is_jinja(template) else Path(template).read_text(encoding="utf-8")
        self.tokenizers = teacher, student
        forget_warnings()

    def build(self, row: Row, sample: int) -> Request:
        """Return the request of one sample of a row.

        Raises:
            ValueError: this row cannot be used; any exception becomes one, because a template may run anything on a row.
        """
        if row.error is not None:
            raise ValueError(row.error)
        try:
            return self._request(row, sample)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"it cannot be rendered ({type(error).__name__}: {error})") from error

    def _request(self, row: Row, sample: int) -> Request:
        assert self.tokenizers is not None
        check_text_only(row.values)
        settings, answer = self.settings, self._answer(row)
        fields = self._fields(row.values)
        index = (_number(row.id) + sample) % len(self.templates)
        template = self.templates[index]
        sides = [
            self._side(tokenizer, prompt, system)
            for tokenizer, prompt, system in (
                (self.tokenizers[0], teacher_prompt(fields, template), settings.teacher_system_prompt),
                (self.tokenizers[1], fields[PROMPT_COLUMN], settings.student_system_prompt),
            )
        ]
        return Request(
            row=row,
            sample=sample,
            seed=sample_seed(settings.seed, row.id, sample),
            template=None if template is None else index,
            teacher=sides[0],
            student=sides[1],
            answer=answer,
        )

    def _fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a row under all their names, and the student's prompt as `prompt`."""
        settings = self.settings
        fields = {**values, **{name: values.get(column) for name, column in self.names.items()}}
        prompt = fields.get(settings.prompt_column)
        if settings.student_template is not None:
            prompt = fill(settings.student_template, {PROMPT_COLUMN: prompt, **fields})
        return {**fields, PROMPT_COLUMN: prompt}

    def _side(self, tokenizer: Any, prompt: Prompt, system: str | None) -> Side:
        settings = self.settings
        kwargs = {**pinned_date(tokenizer, self.started), **as_mapping(settings.chat_template_kwargs)}
        rendered = for_side(prompt, system_prompt=system, chat=settings.enable_chat_template)
        if self.tokenizers is not None and not isinstance(rendered, str):
            compare_templates(*self.tokenizers, kwargs, kwargs)
        token_ids = encode(tokenizer, rendered, **kwargs)
        if isinstance(rendered, str):
            return Side(text=rendered, token_ids=token_ids)
        messages = [dict(message) for message in rendered]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
        return Side(text=text, token_ids=token_ids)

    def _answer(self, row: Row) -> str | None:
        if self.settings.answer_column is None:
            return None
        answer = row.values.get(self.settings.answer_column)
        if answer is None or (isinstance(answer, str) and not grading.stated(answer)):
            if getattr(self.settings, "filter_answer", None):
                raise ValueError(f"it has no {self.settings.answer_column!r} (answer_column), which filter_answer needs")
            return None
        text = _answer_text(answer)
        grading.check_reference(text, self.settings.answer_match)
        return text


def _answer_text(answer: Any) -> str:
    """Return an answer as text: numbers, lists and objects as JSON, others (dates, decimals) as templates print them."""
    if isinstance(answer, (bool, int, float, list, dict)):
        return json.dumps(answer, ensure_ascii=False, default=str)
    return str(answer)


def _is_jinja(template: str) -> bool:
    return "{" in template


def sample_seed(seed: int, row_id: str, sample: int) -> int:
    """Return the seed of one sample: below 2^53, so that every reader of JSON keeps all its digits."""
    return _number(f"{seed}\0{row_id}\0{sample}") >> 11


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
