"""Prompt pairs: the text, messages or token ids that teacher and student each read before the completion they share.

A prompt is plain text, a conversation (a list of messages with "role" and "content"), or token ids. This module gives each
side its own: a system prompt, a chat template, privileged context that only the teacher sees. It works on tokenizers, not on
models: it returns token ids, and imports neither vLLM, TRL nor torch.

    row ──teacher_prompt()──▶ prompt ──for_side()──▶ prompt with its system message ──encode()──▶ token ids
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from string import Formatter
from typing import Any, cast

from osd.prompt_checks import (
    Message,
    Prompt,
    check_not_rendered,
    check_prompt,
    check_special_tokens,
    conversation,
    is_conversation,
    is_token_ids,
)

__all__ = ["Message", "Prompt", "check_prompt", "is_conversation", "is_token_ids"]

PROMPT_COLUMN = "prompt"
TEACHER_PROMPT_COLUMN = "teacher_prompt"
PRIVILEGED_COLUMN = "privileged_context"

# Used when a dataset has a `privileged_context` column and no template is given.
DEFAULT_PRIVILEGED_TEMPLATE = "{prompt}\n\nReference, for you only:\n{privileged_context}"


def for_side(prompt: Prompt, *, system_prompt: str | None = None, chat: bool = False) -> str | list[dict[str, Any]]:
    """Give a prompt one side's system prompt.

    The system message of a conversation is replaced; the conversation is cleaned as by
    :func:`osd.prompt_checks.conversation`. Plain text has no roles: with `chat` it becomes a conversation of one user
    message, and without it the system prompt goes before it, separated by an empty line.

    Raises:
        ValueError: the prompt is empty, or neither text nor messages, or has assistant messages only.
    """
    check_prompt(prompt)
    if is_token_ids(prompt):
        raise ValueError(f"a prompt of token ids cannot be rendered; give text or a list of messages: {prompt!r:.200}")
    if isinstance(prompt, str):
        if chat:
            return for_side([{"role": "user", "content": prompt}], system_prompt=system_prompt)
        return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt
    messages = conversation(cast(Sequence[Message], prompt))
    if not system_prompt:
        return messages
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system_prompt}, *rest]


def encode(tokenizer: Any, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """Return the token ids of one prompt, exactly as TRL's trainers tokenize it.

    Text goes through the tokenizer with the special tokens that it adds by itself. A conversation goes through the chat
    template with the generation prompt, and `chat_template_kwargs` reach the template. Token ids are returned as they are.

    Raises:
        ValueError: a conversation that the chat template of the tokenizer refuses, or a tokenizer without a template; a prompt
            of no tokens.
    """
    return encode_all(tokenizer, [prompt], **chat_template_kwargs)[0]


def pinned_date(tokenizer: Any, now: datetime) -> dict[str, Any]:
    """Return the chat template argument that makes `strftime_now` print `now`; empty if the chat template does not call it.

    A template that prints today's date would give the prompts of one run two dates when it passes midnight or is resumed.
    """
    called = "strftime_now" in str(getattr(tokenizer, "chat_template", None))
    return {"strftime_now": now.strftime} if called else {}


def encode_all(tokenizer: Any, prompts: Sequence[Prompt], **chat_template_kwargs: Any) -> list[list[int]]:
    """Encode each of these prompts, in as few tokenizer calls as possible: a fast tokenizer spreads a call over the cores.

    Raises:
        ValueError: as `encode`.
    """
    for prompt in prompts:
        check_prompt(prompt)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [conversation(cast(Sequence[Message], prompt)) for prompt in prompts if is_conversation(prompt)]
    of_texts = iter(_tokenize(tokenizer, texts) if texts else ())
    of_chats = iter(_apply_chat_template(tokenizer, chats, chat_template_kwargs) if chats else ())
    token_ids = [
        list(next(of_texts if isinstance(prompt, str) else of_chats)) if not is_token_ids(prompt) else list(map(int, prompt))  # type: ignore[arg-type]
        for prompt in prompts
    ]
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if not ids:
            raise ValueError(f"the prompt {prompt!r:.200} has no tokens; a model needs at least one to continue from")
    check_special_tokens(tokenizer, token_ids)
    return token_ids


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if tokenizer is None:
        raise ValueError("the engine has no tokenizer (skip_tokenizer_init); give prompts as token ids")
    return _of_all(
        lambda some: tokenizer(text=some)["input_ids"], texts, "the tokenizer does not take this text ({error}): {item!r:.200}"
    )


def _apply_chat_template(tokenizer: Any, conversations: list[list[dict[str, Any]]], kwargs: dict[str, Any]) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, so a conversation cannot be "
            "rendered; give plain-text prompts, or a model with a chat template"
        )
    for messages in conversations:
        check_not_rendered(tokenizer, messages)
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **kwargs}
    return _of_all(
        lambda some: tokenizer.apply_chat_template(some, **kwargs)["input_ids"],
        conversations,
        "the chat template does not take this conversation ({error}): {item!r:.200}",
    )


def _of_all(call: Callable[[list[Any]], list[list[int]]], items: list[Any], complaint: str) -> list[list[int]]:
    """Call a tokenizer once for all items; if it fails, raise a ValueError that names the item.

    Templates and tokenizers raise errors of many types: a template that refuses a system message (TemplateError), one that
    adds text to a number (TypeError), half of a surrogate pair.
    """
    try:
        return call(items)
    except Exception:
        for item in items:
            try:
                call([item])
            except Exception as error:
                raise ValueError(complaint.format(error=error, item=item)) from error
        raise


# -- what only the teacher reads ----------------------------------------------------------------------------------------


def template_fields(template: str) -> frozenset[str]:
    """Return the names of the columns that a template uses.

    Raises:
        ValueError: a field that is not a plain column name, or braces that are not a field.
    """
    try:
        fields = [(name, form) for _, name, form, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(_template_help(template, str(error))) from None
    for name, form in fields:
        # Attribute and index access would reach into Python objects, and "{}" names no column.
        if not name.isidentifier():
            raise ValueError(_template_help(template, f"{{{name}}} is not a column name"))
        if form and "{" in form:
            raise ValueError(_template_help(template, f"{{{name}:{form}}} has a field in a field"))
    return frozenset(name for name, _ in fields)


def _template_help(template: str, problem: str) -> str:
    return (
        f"the template {template!r} is not valid: {problem}. A field is a column name in braces, as in "
        "{prompt}; a literal brace is written twice, as in \\boxed{{}}"
    )


def privileged_template_for(columns: Iterable[str], template: str | None) -> str | None:
    """Return the template that builds the teacher's prompts from rows with these columns; None if none is needed.

    Call it with the columns of a dataset before anything is loaded: it finds every mistake that rows could reveal later.

    Raises:
        ValueError: no `prompt` column; a template that names a missing column; two ways to build the teacher's prompt.
    """
    columns = list(columns)
    if PROMPT_COLUMN not in columns:
        raise ValueError(f"the dataset has no {PROMPT_COLUMN!r} column; its columns are {sorted(columns)}")
    if TEACHER_PROMPT_COLUMN in columns:
        if template is not None:
            raise ValueError(
                f"the dataset has a {TEACHER_PROMPT_COLUMN!r} column and privileged_template={template!r} is set: the "
                "teacher can read one or the other; drop the column or the template"
            )
        return None
    if template is None:
        return DEFAULT_PRIVILEGED_TEMPLATE if PRIVILEGED_COLUMN in columns else None
    missing = sorted(template_fields(template) - set(columns))
    if missing:
        raise ValueError(
            f"the template {template!r} names {', '.join(map(repr, missing))}, which the dataset does not have; "
            f"its columns are {sorted(columns)}"
        )
    return template


def teacher_prompt(row: Mapping[str, Any], template: str | None = None) -> Prompt:
    """Return the teacher's prompt of a dataset row, before its system prompt.

    - With a `teacher_prompt` column: that.
    - With a template: the template's text in place of `prompt`. In a conversation it replaces the last user message, which
      `{prompt}` stands for.
    - Otherwise: `prompt`.

    Raises:
        ValueError: a field of the template that is missing from this row or None in it; blank text in all of the template's
            columns; a `prompt` that is none; no user message to fill.
    """
    if TEACHER_PROMPT_COLUMN in row:
        if row[TEACHER_PROMPT_COLUMN] is None:
            raise ValueError(f"{TEACHER_PROMPT_COLUMN!r} is empty (None) in this row; write it, or drop the row")
        return row[TEACHER_PROMPT_COLUMN]
    prompt: Any = row.get(PROMPT_COLUMN)
    check_prompt(prompt)
    if template is None:
        return prompt
    _check_not_blank(template, row)
    if isinstance(prompt, str):
        return fill(template, row)
    if is_token_ids(prompt):
        raise ValueError(f"a prompt of token ids has no text for the template {template!r}; give text or messages")
    last = _last_user_message(prompt)
    filled = {**prompt[last], "content": fill(template, {**row, PROMPT_COLUMN: prompt[last]["content"]})}
    return [*prompt[:last], filled, *prompt[last + 1 :]]


def _check_not_blank(template: str, row: Mapping[str, Any]) -> None:
    """Refuse a row whose teacher would silently read no more than the student: an empty cell of a CSV file, say."""
    names = sorted(template_fields(template) - {PROMPT_COLUMN})
    if names and all(isinstance(row.get(name), str) and not row[name].strip() for name in names):
        raise ValueError(
            f"{', '.join(map(repr, names))} is blank in this row, but the teacher's template needs it; write it or drop the row"
        )


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Return the template's text with the columns of a row in place of its fields.

    Raises:
        ValueError: a field that is missing from this row, or None in it, or that its format (``{price:.2f}``) does not fit.
    """
    absent = sorted(name for name in template_fields(template) if row.get(name) is None)
    if absent:
        raise ValueError(
            f"the template {template!r} needs {', '.join(map(repr, absent))}, which this row does not have "
            f"(its columns are {sorted(row)}): {dict(row)!r:.200}"
        )
    try:
        return template.format(**row)
    except Exception as error:  # a value's own __format__ may raise anything
        raise ValueError(f"the template {template!r} does not fit this row ({error}): {dict(row)!r:.200}") from error


def _last_user_message(messages: Sequence[Message]) -> int:
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] == "user":
            return i
    raise ValueError(f"the conversation has no user message for the privileged template to fill: {messages!r:.200}")
