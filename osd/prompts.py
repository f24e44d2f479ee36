"""Prompt pairs: what the teacher and the student each read before the completion that they share.

A prompt is plain text or a conversation (a list of messages with "role" and "content"). This module gives each side its
own: a system prompt, a chat template, privileged context that only the teacher sees. It knows tokenizers, not models:
token ids come out, and nothing here imports vLLM, TRL or torch.

    row ──teacher_prompt()──▶ prompt ──for_side()──▶ prompt with its system message ──encode()──▶ token ids
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

PROMPT_COLUMN = "prompt"
TEACHER_PROMPT_COLUMN = "teacher_prompt"
PRIVILEGED_COLUMN = "privileged_context"

# Used when a dataset has a `privileged_context` column and no template is given.
DEFAULT_PRIVILEGED_TEMPLATE = "{prompt}\n\nReference, for you only:\n{privileged_context}"


def is_conversation(prompt: Any) -> bool:
    """Whether `prompt` is a list of messages (as opposed to plain text)."""
    return not isinstance(prompt, str) and isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)


def for_side(prompt: Prompt, *, system_prompt: str | None = None, chat: bool = False) -> Prompt:
    """Give a prompt one side's system prompt.

    A conversation's own system message is replaced. Plain text has no roles: with `chat` it becomes a conversation of
    one user message, and without it the system prompt goes before it, separated by an empty line.

    Raises:
        ValueError: the prompt is empty, or neither text nor messages.
    """
    check_prompt(prompt)
    if isinstance(prompt, str):
        if chat:
            return for_side([{"role": "user", "content": prompt}], system_prompt=system_prompt)
        return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt
    if not system_prompt:
        return list(prompt)
    rest = prompt[1:] if prompt[0]["role"] == "system" else prompt
    return [{"role": "system", "content": system_prompt}, *rest]


def check_prompt(prompt: Any) -> None:
    """Refuse what cannot be a prompt.

    Raises:
        ValueError: an empty prompt, or something that is neither text nor a list of text messages.
    """
    if prompt is None or (isinstance(prompt, (str, Sequence)) and not len(prompt)):
        raise ValueError(f"the prompt is empty ({prompt!r}); give text, or a list of messages")
    if isinstance(prompt, str):
        return
    if not is_conversation(prompt) or not all("role" in m and "content" in m for m in prompt):
        raise ValueError(
            f"a prompt is text or a list of messages with 'role' and 'content', not {type(prompt).__name__}: {prompt!r:.200}"
        )
    for message in prompt:
        if message["content"] is not None and not isinstance(message["content"], str):
            raise ValueError(f"only text messages are supported; this one has content {message['content']!r:.200}")


def encode(tokenizer: Any, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """Token ids of one prompt, exactly as TRL's trainers tokenize it.

    Text goes through the tokenizer with the special tokens that it adds by itself. A conversation goes through the chat
    template with the generation prompt, and `chat_template_kwargs` reach the template.

    Raises:
        ValueError: a conversation that the tokenizer's chat template refuses, or a tokenizer that has none; a prompt of no
            tokens.
    """
    return encode_all(tokenizer, [prompt], **chat_template_kwargs)[0]


def encode_all(tokenizer: Any, prompts: Sequence[Prompt], **chat_template_kwargs: Any) -> list[list[int]]:
    """`encode` of each of these prompts, in as few calls as that takes: a fast tokenizer spreads a call over the cores.

    Raises:
        ValueError: as `encode`.
    """
    for prompt in prompts:
        check_prompt(prompt)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    conversations = [[dict(message) for message in prompt] for prompt in prompts if not isinstance(prompt, str)]
    of_texts = iter(tokenizer(text=texts)["input_ids"] if texts else ())
    of_chats = iter(_apply_chat_template(tokenizer, conversations, chat_template_kwargs) if conversations else ())
    token_ids = [list(next(of_texts if isinstance(prompt, str) else of_chats)) for prompt in prompts]
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if not ids:
            raise ValueError(f"the prompt {prompt!r:.200} has no tokens; a model needs at least one to continue from")
    return token_ids


def _apply_chat_template(tokenizer: Any, conversations: list[list[dict[str, Any]]], kwargs: dict[str, Any]) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, so a conversation cannot be "
            "rendered; give plain-text prompts, or a model with a chat template"
        )
    from jinja2 import TemplateError

    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **kwargs}
    try:
        return tokenizer.apply_chat_template(conversations, **kwargs)["input_ids"]
    except TemplateError:
        for chat in conversations:  # some templates refuse a system message, or two user messages in a row
            try:
                tokenizer.apply_chat_template(chat, **kwargs)
            except TemplateError as error:
                raise ValueError(f"the chat template does not take this conversation ({error}): {chat!r:.200}") from error
        raise


# -- what only the teacher reads ----------------------------------------------------------------------------------------


def template_fields(template: str) -> frozenset[str]:
    """Names of the columns that a template uses.

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
    """The template that builds the teacher's prompts from rows with these columns; None if none is needed.

    Call it with a dataset's columns before anything is loaded: it finds every mistake that rows could reveal later.

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
    """The teacher's prompt of a dataset row, before its system prompt.

    It is the row's `teacher_prompt`; or its `prompt` with the template's text in place of it (of a conversation: in place
    of the last user message, which is also what `{prompt}` stands for); or plainly its `prompt`.

    Raises:
        ValueError: a field of the template that is missing from this row or None in it; no user message to fill.
    """
    if TEACHER_PROMPT_COLUMN in row:
        return row[TEACHER_PROMPT_COLUMN]
    prompt = row[PROMPT_COLUMN]
    if template is None:
        return prompt
    if isinstance(prompt, str):
        return fill(template, {**row, PROMPT_COLUMN: prompt})
    last = _last_user_message(prompt)
    filled = {**prompt[last], "content": fill(template, {**row, PROMPT_COLUMN: prompt[last]["content"]})}
    return [*prompt[:last], filled, *prompt[last + 1 :]]


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template's text with a row's columns in place of its fields.

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
    except (TypeError, ValueError) as error:
        raise ValueError(f"the template {template!r} does not fit this row ({error}): {dict(row)!r:.200}") from error


def _last_user_message(messages: Sequence[Message]) -> int:
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] == "user":
            return i
    raise ValueError(f"the conversation has no user message for the privileged template to fill: {messages!r:.200}")
