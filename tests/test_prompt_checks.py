"""Prompts as data sets have them: None keys, final assistant turns, special tokens twice, rows that are no prompts."""

import warnings

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from osd import prompt_checks
from osd.prompt_checks import check_template_kwargs, compare_templates, conversation, is_token_ids
from osd.prompts import encode, encode_all, for_side, teacher_prompt
from tests.tiny import CHAT_TEMPLATE, save_tokenizer

USER = {"role": "user", "content": "w7 w8"}
ANSWER = {"role": "assistant", "content": "w9"}
# Published templates ask for the presence of a key: a None that Parquet added would be written as "None".
NAMES = (
    "{% for m in messages %}{{ m['role'] }}{% for k in ('name', 'tool_calls') if k in m %} {{ m[k] }}{% endfor %}"
    " {{ m['content'] }} {% endfor %}"
)
CALL = {"id": "w1", "function": {"name": "w2", "arguments": {"city": "w3"}}}
OTHER_CALL = {"id": "w1", "function": {"name": "w2", "arguments": {"day": "w4"}}}
ROWS = [
    [USER],
    [{**USER, "name": "w40"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER],
    [USER, {"role": "assistant", "content": "", "tool_calls": [OTHER_CALL]}, USER],
]


@pytest.fixture(autouse=True)
def new_run():
    prompt_checks.forget_warnings()


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path, 64)


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in found]


# -- None keys ----------------------------------------------------------------------------------------------------------


def test_none_keys_of_datasets_do_not_reach_templates(tokenizer):
    tokenizer.chat_template = NAMES
    filled = Dataset.from_list([{"prompt": row} for row in ROWS])["prompt"]
    assert filled[0] != ROWS[0]  # None was added, nested too
    for row, given in zip(ROWS, filled, strict=True):
        assert for_side(given) == conversation(given) == row
        assert (
            encode(tokenizer, given) == encode(tokenizer, row) == encode(tokenizer, for_side(teacher_prompt({"prompt": given})))
        )


def test_a_tool_call_needs_no_content():
    message = {"role": "assistant", "tool_calls": [CALL]}
    for given in (message, {**message, "content": None}):
        assert conversation([USER, given, USER])[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for empty in (None, []):
        assert conversation([{**USER, "tool_calls": empty}]) == [USER]


# -- final assistant turns ----------------------------------------------------------------------------------------------


def test_final_assistant_turns_are_removed_on_every_path(tokenizer):
    given = [USER, ANSWER, USER, ANSWER, ANSWER]
    kept = [USER, ANSWER, USER]
    ids = encode(tokenizer, kept)
    assert for_side(given) == kept
    assert for_side(given, system_prompt="w5")[1:] == kept
    assert encode_all(tokenizer, [given, kept]) == [ids, ids]
    assert for_side(teacher_prompt({"prompt": given, "a": "w6"}, "{prompt} {a}"))[-1]["content"] == "w7 w8 w6"
    assert given[-1] == ANSWER


def test_one_warning_names_the_final_assistant_turn():
    messages = caught(lambda: [for_side([USER, ANSWER]) for _ in range(3)])
    assert len(messages) == 1
    assert "end with an assistant message" in messages[0]


def test_a_conversation_of_answers_only_is_refused():
    with pytest.raises(ValueError, match="assistant messages only"):
        for_side([ANSWER])


# -- special tokens -----------------------------------------------------------------------------------------------------


def adding(tokenizer, template):
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def test_bos_twice_is_one_warning_with_the_fix(tokenizer):
    adding(tokenizer, "<bos> $A")
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    messages = caught(lambda: [encode(tokenizer, rendered) for _ in range(3)])
    assert len(messages) == 1
    assert "'<bos>' twice" in messages[0]
    assert "token ids" in messages[0]
    assert not caught(lambda: encode_all(tokenizer, ["w7", [USER]]))


def test_eos_at_the_end_of_prompts_is_one_warning_with_the_fix(tokenizer):
    adding(tokenizer, "$A <eos>")
    messages = caught(lambda: encode_all(tokenizer, ["w7", "w8"]))
    assert len(messages) == 1
    assert "add_eos_token=False" in messages[0]
    assert not caught(lambda: encode(tokenizer, [USER]))


def test_a_rendered_text_inside_a_message_is_one_warning(tokenizer):
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    messages = caught(lambda: [encode(tokenizer, for_side(rendered, chat=True)) for _ in range(2)])
    assert len(messages) == 1
    assert "rendered twice" in messages[0]


# -- chat templates -----------------------------------------------------------------------------------------------------


def test_different_chat_templates_are_one_warning(tokenizer, tmp_path):
    other = save_tokenizer(tmp_path / "other", 64)
    assert not caught(lambda: compare_templates(tokenizer, other))
    other.chat_template = "w3 " + CHAT_TEMPLATE
    assert len(caught(lambda: [compare_templates(tokenizer, other) for _ in range(2)])) == 1


def test_a_template_argument_that_nothing_reads_is_a_warning(tokenizer, tmp_path):
    reader = save_tokenizer(tmp_path / "reader", 64)
    reader.chat_template = "{% if enable_thinking %}w20 {% endif %}" + CHAT_TEMPLATE
    thinking = {"enable_thinking": True}
    assert any("no effect" in text for text in caught(lambda: compare_templates(tokenizer, tokenizer, thinking, thinking)))
    assert not any("no effect" in text for text in caught(lambda: compare_templates(reader, reader, thinking, thinking)))


def test_fixed_template_arguments_are_refused():
    with pytest.raises(ValueError, match=r"chat_template_kwargs\['tokenize'\] is set by OSD"):
        check_template_kwargs({"tokenize": False})


# -- rows that are no prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        7,
        1.5,
        ["w7"],
        {"role": "user", "content": "w7"},
        [{"from": "human", "value": "w7"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["w7"]}],
        [{"role": None, "content": "w7"}],
        [{"role": 7, "content": "w7"}],
        [[USER]],
        [USER, None],
        [True],
        [-1],
    ],
)
@pytest.mark.parametrize("template", [None, "{prompt} {answer}"])
def test_every_odd_prompt_is_a_value_error(tokenizer, prompt, template):
    with pytest.raises(ValueError, match=r"prompt|message"):
        encode(tokenizer, for_side(teacher_prompt({"prompt": prompt, "answer": "w8"}, template)))


def test_sharegpt_keys_are_named():
    with pytest.raises(ValueError, match="rename 'from' to 'role' and 'value' to 'content'"):
        for_side([{"from": "human", "value": "w7"}])


def test_an_error_of_a_template_names_the_conversation(tokenizer):
    bad = [{"role": "user", "content": "w9"}]
    template = "{% if messages[0]['content'] == 'w9' %}{{ 1 + none }}{% endif %}w3"  # a TypeError
    with pytest.raises(ValueError, match=r"does not take this conversation.*w9"):
        encode_all(tokenizer, [[USER], bad], chat_template=template)


def test_an_error_of_a_tokenizer_names_the_text(tokenizer):
    with pytest.raises(ValueError, match="does not take this text"):
        encode_all(tokenizer, ["w7", "w7 \ud83e"])


def test_an_empty_teacher_prompt_names_its_column():
    with pytest.raises(ValueError, match="'teacher_prompt' is empty"):
        teacher_prompt({"prompt": "w7", "teacher_prompt": None})


# -- token ids ----------------------------------------------------------------------------------------------------------


def test_token_ids_are_read_as_they_are(tokenizer):
    assert encode_all(tokenizer, [[7, 8], "w9", (10,), [USER]])[:3] == [[7, 8], [9], [10]]
    assert not any(map(is_token_ids, ("w7", [], [True], [-1], [7, "w8"], [USER], 7, None)))
    with pytest.raises(ValueError, match="token ids cannot be rendered"):
        for_side([7, 8])
