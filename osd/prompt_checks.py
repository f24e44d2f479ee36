"""Checks of prompts: their form, what Parquet adds to messages, final assistant turns, and special tokens that appear twice.

Every entry renders prompts through :mod:`osd.prompts`, which calls these. Each warning is given once per run:
:func:`forget_warnings` begins a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]

ASSISTANT_ROLES = ("assistant", "model")
# Columns that multimodal data keeps its images, videos and sounds in.
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
# Arguments of `apply_chat_template` that are the same for every prompt.
FIXED_TEMPLATE_KWARGS = (
    *("conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"),
    *("return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask"),
)

_warned: set[tuple[str, str]] = set()


def forget_warnings() -> None:
    """Forget which warnings were given, so that a new run gives each of them again."""
    _warned.clear()


def _warn_once(kind: str, about: str, text: str) -> None:
    if (kind, about) not in _warned:
        _warned.add((kind, about))
        warnings.warn(text, stacklevel=2)


# -- the form of a prompt -----------------------------------------------------------------------------------------------


def is_conversation(prompt: Any) -> bool:
    """Return True for a list of messages (as opposed to text or token ids)."""
    return not isinstance(prompt, str) and isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)


def is_token_ids(prompt: Any) -> bool:
    """Return True for a list of token ids (as opposed to text or messages)."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)) or not prompt:
        return False
    types = set(map(type, prompt))
    return all(issubclass(kind, Integral) and kind is not bool for kind in types) and min(prompt) >= 0


def check_prompt(prompt: Any) -> None:
    """Refuse what cannot be a prompt.

    Raises:
        ValueError: an empty prompt, or something that is neither text nor token ids nor a list of text messages.
    """
    if prompt is None or (isinstance(prompt, (str, Sequence)) and not len(prompt)):
        raise ValueError(f"the prompt is empty ({prompt!r}); give text, or a list of messages")
    if isinstance(prompt, str) or is_token_ids(prompt):
        return
    if not is_conversation(prompt):
        raise ValueError(
            f"a prompt is text or a list of messages with 'role' and 'content', not {type(prompt).__name__}: {prompt!r:.200}"
        )
    for message in prompt:
        _check_message(message)


def _check_message(message: Message) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or ("content" not in message and not message.get("tool_calls")):
        renamed = "; rename 'from' to 'role' and 'value' to 'content'" if {"from", "value"} <= message.keys() else ""
        raise ValueError(
            "a prompt is text or a list of messages with 'role' and 'content', both text; this message is "
            f"{dict(message)!r:.200}{renamed}"
        )
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"the message {dict(message)!r:.200} has no content; write its text, or remove the message")
    if content is not None and not isinstance(content, str):
        raise ValueError(
            f"only text messages are supported; this one has content {content!r:.200}. Write a text as one string; OSD distils "
            "text, so remove rows with images, videos or sounds"
        )


def check_text_only(row: Mapping[str, Any]) -> None:
    """Refuse a row with an image, a video or a sound, which neither model would see.

    Raises:
        ValueError: naming the column.
    """
    for column in MEDIA_COLUMNS:
        value = row.get(column)
        if value is not None and not (isinstance(value, Sequence) and not len(value)):
            raise ValueError(
                f"it has {column!r} ({value!r:.80}), and OSD distils text, so neither model would see it. Remove such rows, or "
                "the column if prompts do not need it"
            )


def conversation(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages that chat templates get, the same for both sides and every entry.

    - Keys whose value is None are removed, nested ones too: Parquet and `datasets` add them where another row has the key,
      and templates that ask for a key's presence would write "None" into the prompt.
    - A message with tool calls and no content gets the content "".
    - Final assistant messages are removed, with a warning: they are reference answers of SFT and GKD data, and the completion
      is a new assistant turn.

    Raises:
        ValueError: as :func:`check_prompt`; a conversation of assistant messages only.
    """
    check_prompt(prompt)
    messages = [_cleaned(message) for message in prompt]
    while messages and messages[-1]["role"] in ASSISTANT_ROLES:
        messages.pop()
    if not messages:
        raise ValueError(f"the conversation has assistant messages only; give it a user message: {list(prompt)!r:.200}")
    if len(messages) < len(prompt):
        _warn_once(
            "assistant",
            "",
            "conversations end with an assistant message: it is removed from the prompt of both sides, because the completion "
            "begins a new assistant turn. Remove it from the data; a reference answer belongs in a column of its own, which "
            "the teacher's template can name",
        )
    return messages


def _cleaned(message: Message) -> dict[str, Any]:
    cleaned = without_nones(message)
    if not cleaned.get("tool_calls"):
        cleaned.pop("tool_calls", None)
    return {"content": "", **cleaned}


def without_nones(value: Any) -> Any:
    """Copy nested mappings and lists without the keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nones(item) for item in value]
    return value


# -- chat templates -----------------------------------------------------------------------------------------------------


def check_template_kwargs(kwargs: Mapping[str, Any], *, where: str = "chat_template_kwargs") -> None:
    """Refuse chat template arguments that OSD sets itself.

    Raises:
        ValueError: naming the argument.
    """
    for name in FIXED_TEMPLATE_KWARGS:
        if name in kwargs:
            raise ValueError(f"{where}[{name!r}] is set by OSD; remove it")


def compare_templates(
    teacher: Any, student: Any, teacher_kwargs: Mapping[str, Any] | None = None, student_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Warn once if the chat templates of two tokenizers differ, and once for each argument that a template never reads."""
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (teacher, student)]
    if None not in templates and templates[0] != templates[1]:
        _warn_once(
            "templates",
            "",
            f"the teacher {_name(teacher)!r} and the student {_name(student)!r} have different chat templates. Each side is "
            "rendered with its own, so one conversation becomes two token sequences. If both should read the same, give both "
            "tokenizers one chat_template",
        )
    given = [teacher_kwargs or {}, student_kwargs or {}]
    for name in {**given[0], **given[1]}:
        read = [name in str(template) for template, kwargs in zip(templates, given, strict=True) if name in kwargs]
        if not any(read):
            _warn_once("kwargs", name, f"chat_template_kwargs[{name!r}] has no effect: no chat template reads it")


# -- special tokens -----------------------------------------------------------------------------------------------------


def check_special_tokens(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Warn once per tokenizer of prompts that begin with two BOS tokens, and of prompts that end with EOS."""
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    if bos is not None and any(len(ids) > 1 and ids[0] == ids[1] == bos for ids in prompts):
        _warn_once(
            "bos",
            _name(tokenizer),
            f"prompts begin with the BOS token {tokenizer.bos_token!r} twice ({_name(tokenizer)!r}): the text has one already "
            "(from a chat template) and the tokenizer adds another. Give messages or token ids instead of rendered text, or "
            "remove BOS from the text",
        )
    if eos is not None and any(len(ids) > 1 and ids[-1] == eos for ids in prompts):
        _warn_once(
            "eos",
            _name(tokenizer),
            f"prompts end with the EOS token {tokenizer.eos_token!r} ({_name(tokenizer)!r}), so completions begin after the "
            "end of a text. Set add_eos_token=False in the tokenizer's configuration, or use a chat template that has a "
            "generation prompt",
        )


def check_not_rendered(tokenizer: Any, messages: Sequence[Message]) -> None:
    """Warn once per tokenizer of messages that contain its special tokens: text that was rendered already."""
    if ("rendered", _name(tokenizer)) in _warned:
        return
    special = set(getattr(tokenizer, "all_special_tokens", ())) - {getattr(tokenizer, "unk_token", None)}
    for message in messages:
        found = next((token for token in special if token and token in message["content"]), None)
        if found is not None:
            _warn_once(
                "rendered",
                _name(tokenizer),
                f"a message contains the special token {found!r} of {_name(tokenizer)!r}. If a chat template rendered it "
                "already, it is rendered twice: give the messages themselves, or the text with enable_chat_template=False: "
                f"{message['content']!r:.100}",
            )
            return


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", ""))
