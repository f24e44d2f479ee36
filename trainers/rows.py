"""Render the rows of a dataset for both sides, and find the rows that cannot be trained on before a model loads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from datasets import IterableDataset
from torch.utils.data import Subset
from tqdm.auto import tqdm

from osd.prompt_checks import Prompt, check_text_only, compare_templates, is_conversation
from osd.prompts import (
    PRIVILEGED_COLUMN,
    PROMPT_COLUMN,
    TEACHER_PROMPT_COLUMN,
    encode_all,
    for_side,
    pinned_date,
    privileged_template_for,
    teacher_prompt,
)
from osd.train.alpha_schedule import wants_mixing

if TYPE_CHECKING:
    from osd.train.config import OSDConfig

Row = Mapping[str, Any]

_CHUNK = 256  # rows rendered by one call: a fast tokenizer spreads them over the cores
_FIX = "correct or remove these rows, or set drop_bad_rows=True to train on the others"


@dataclass(kw_only=True)
class Renderer:
    """Both prompts of a row as token ids.

    Attributes:
        student_tokenizer, teacher_tokenizer: each side's own, with its chat template.
        args: the options for prompts and lengths.
        context: the longest sequence of "teacher" and "student", in tokens.
        longer: what to do for a longer one.
        started: when the run began; chat templates that print a date print this one.
    """

    student_tokenizer: Any
    teacher_tokenizer: Any
    args: OSDConfig
    context: Mapping[str, int]
    longer: str = "raise vllm_max_model_length"
    started: datetime = field(default_factory=datetime.now)
    _warned: bool = field(default=False, init=False)
    _private: frozenset[str] | None = field(default=None, init=False)  # columns that only the teacher reads, of the first row

    def student_prompt(self, row: Row) -> Prompt:
        """Return the student's prompt with its system message."""
        args = self.args
        return for_side(row[PROMPT_COLUMN], system_prompt=args.student_system_prompt, chat=args.enable_chat_template)

    def teacher_prompt(self, row: Row) -> Prompt:
        """Return the teacher's prompt with its system message and privileged context."""
        args = self.args
        private = frozenset(c for c in (TEACHER_PROMPT_COLUMN, PRIVILEGED_COLUMN) if row.get(c) is not None)
        self._private = private if self._private is None else self._private
        if missing := sorted(self._private - private):  # a stream's rows need not have the same columns
            raise ValueError(f"the row has no {missing[0]!r}, which earlier rows have; give every row one, or none")
        prompt = teacher_prompt(row, privileged_template_for(row, args.privileged_template))
        return for_side(prompt, system_prompt=args.teacher_system_prompt, chat=args.enable_chat_template)

    def student_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of prompts of the student."""
        return encode_all(self.student_tokenizer, prompts, **self.template_kwargs(self.student_tokenizer))

    def teacher_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the token ids of the teacher's prompts of these rows."""
        prompts = [self.teacher_prompt(row) for row in rows]
        return encode_all(self.teacher_tokenizer, prompts, **self.template_kwargs(self.teacher_tokenizer))

    def template_kwargs(self, tokenizer: Any) -> dict[str, Any]:
        """Return the arguments of a side's chat template."""
        return {**pinned_date(tokenizer, self.started), **(self.args.chat_template_kwargs or {})}  # type: ignore[dict-item]

    # -- rows that cannot be trained on -------------------------------------------------------------------------------

    def usable(self, dataset: Any, name: str) -> Any:
        """Return the dataset without the rows that cannot be trained on.

        Args:
            dataset: of rows, a stream of them, or None.
            name: of the dataset, for messages.

        Raises:
            ValueError: such rows without `drop_bad_rows`, counted, the first named by its index. A stream raises it when it
                reaches the first of them.
        """
        if isinstance(dataset, IterableDataset):
            return dataset.filter(lambda row, number: self._keeps(row, number, name), with_indices=True)
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            return dataset
        bad = self.problems(dataset)
        if not bad:
            return dataset
        first = min(bad)
        found = f"{len(bad)} of {len(dataset)} rows of the {name} cannot be used; the first is row {first}: {bad[first]}"
        if not self.args.drop_bad_rows or len(bad) == len(dataset):
            raise ValueError(f"{found}. {_FIX[0].upper()}{_FIX[1:]}")
        warnings.warn(f"drop_bad_rows: {found}", stacklevel=4)
        good = [index for index in range(len(dataset)) if index not in bad]
        return dataset.select(good) if hasattr(dataset, "select") else Subset(dataset, good)

    def _keeps(self, row: Row, number: int, name: str) -> bool:
        problem = self.problem(row)
        if problem is None:
            return True
        found = f"row {number} of the {name} cannot be used: {problem}"
        if not self.args.drop_bad_rows:
            raise ValueError(f"{found}. {_FIX[0].upper()}{_FIX[1:]}")
        warnings.warn(f"drop_bad_rows: {found}", stacklevel=2)
        return False

    def problems(self, rows: Any) -> dict[int, str]:
        """Return the reason for each row that cannot be trained on, by its index."""
        bad: dict[int, str] = {}
        starts = range(0, len(rows), _CHUNK)
        for start in tqdm(starts, desc="checking rows", delay=2, disable=self.args.disable_tqdm):
            chunk = [rows[index] for index in range(start, min(start + _CHUNK, len(rows)))]
            try:
                reasons = self._reasons(chunk)
            except Exception:  # a row's content can raise anything in a template; which row, the next line finds
                reasons = [self.problem(row) for row in chunk]
            bad |= {start + i: reason for i, reason in enumerate(reasons) if reason is not None}
        return bad

    def problem(self, row: Row) -> str | None:
        """Return the reason why a row cannot be trained on, or None."""
        try:
            [reason] = self._reasons([row])
        except ValueError as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return reason

    def _reasons(self, rows: Sequence[Row]) -> list[str | None]:
        for row in rows:
            check_text_only(row)
            wants_mixing(row)
        prompts = [self.student_prompt(row) for row in rows]
        student, teacher = self.student_ids(prompts), self.teacher_ids(rows)
        self._warn_about_templates(rows, prompts, student, teacher)
        return [
            self._too_long("teacher", of_teacher) or self._too_long("student", of_student)
            for of_teacher, of_student in zip(teacher, student, strict=True)
        ]

    def _too_long(self, side: str, ids: list[int]) -> str | None:
        length: int = self.args.sampling_kwargs().get("max_tokens") or self.args.max_completion_length  # type: ignore[assignment]
        if len(ids) + length <= self.context[side]:
            return None
        return (
            f"the {side}'s prompt has {len(ids)} tokens, and with max_completion_length={length} that is over its context of "
            f"{self.context[side]} tokens; shorten it, lower max_completion_length or {self.longer}"
        )

    def _warn_about_templates(self, rows: Sequence[Row], prompts: list[Prompt], student: Any, teacher: Any) -> None:
        """Warn once if both sides read the same prompt as different tokens."""
        if any(map(is_conversation, prompts)):
            kwargs = self.args.chat_template_kwargs or {}
            compare_templates(self.teacher_tokenizer, self.student_tokenizer, kwargs, kwargs)  # type: ignore[arg-type]
        for row, prompt, of_student, of_teacher in zip(rows, prompts, student, teacher, strict=True):
            if self._warned or of_student == of_teacher or not isinstance(prompt, str) or prompt != self.teacher_prompt(row):
                continue
            self._warned = True
            student_text, teacher_text = (
                tokenizer.decode(ids, skip_special_tokens=False)
                for tokenizer, ids in ((self.student_tokenizer, of_student), (self.teacher_tokenizer, of_teacher))
            )
            warnings.warn(
                "teacher and student tokenize the same text differently, each with its own tokenizer: the student reads "
                f"{student_text!r:.300}, the teacher reads {teacher_text!r:.300}. If that is not intended, use one tokenizer "
                "for both (processing_class is the student's alone)",
                stacklevel=6,
            )
