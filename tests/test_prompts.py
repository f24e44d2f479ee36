"""Prompt pairs: chat templates, system prompts, privileged templates, and every mistake in them as a clear error."""

import pytest

from osd.prompts import (
    DEFAULT_PRIVILEGED_TEMPLATE,
    encode,
    encode_all,
    for_side,
    privileged_template_for,
    teacher_prompt,
    template_fields,
)
from tests.tiny import save_tokenizer

CHAT = [{"role": "user", "content": "w7 w8"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 64)


# -- one side's system prompt and template ------------------------------------------------------------------------------


def test_plain_text_stays_plain_text():
    assert for_side("w7 w8") == "w7 w8"
    assert for_side("w7 w8", system_prompt="w9") == "w9\n\nw7 w8"


def test_plain_text_becomes_a_conversation_on_request():
    assert for_side("w7 w8", chat=True) == CHAT
    assert for_side("w7", system_prompt="w9", chat=True)[0] == {"role": "system", "content": "w9"}


def test_a_system_prompt_replaces_the_conversations_own():
    own = [{"role": "system", "content": "w10"}, *CHAT]
    assert for_side(own, system_prompt="w9") == [{"role": "system", "content": "w9"}, *CHAT]
    assert for_side(CHAT, system_prompt="w9") == [{"role": "system", "content": "w9"}, *CHAT]
    assert for_side(own) == own


def test_the_given_conversation_is_not_changed():
    given = [{"role": "system", "content": "w10"}, *CHAT]
    for_side(given, system_prompt="w9")
    teacher_prompt({"prompt": given, "privileged_context": "w11"}, DEFAULT_PRIVILEGED_TEMPLATE)
    assert given == [{"role": "system", "content": "w10"}, *CHAT]


@pytest.mark.parametrize("prompt", ["", [], None])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="the prompt is empty"):
        for_side(prompt)


@pytest.mark.parametrize("prompt", [7, ["w7"], [{"role": "user"}]])
def test_other_types_are_refused(prompt):
    with pytest.raises(ValueError, match="a prompt is text or a list of messages"):
        for_side(prompt)


def test_images_in_messages_are_refused():
    with pytest.raises(ValueError, match="only text messages are supported"):
        for_side([{"role": "user", "content": [{"type": "image"}]}])


def test_encode_equals_trls_tokenization(tokenizer):
    assert encode(tokenizer, "w7 w8") == tokenizer(text=["w7 w8"])["input_ids"][0] == [7, 8]
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode(tokenizer, CHAT) == rendered["input_ids"] == [1, 5, 7, 8, 2, 1, 6]


def test_encode_all_equals_encode_of_each(tokenizer):
    prompts = ["w7 w8", CHAT, "w9", [*CHAT, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4 w5"}]]
    assert encode_all(tokenizer, prompts) == [encode(tokenizer, prompt) for prompt in prompts]
    assert encode_all(tokenizer, []) == []
    with pytest.raises(ValueError, match="'   ' has no tokens"):
        encode_all(tokenizer, ["w7", "   "])


def test_a_refused_conversation_is_named(tokenizer):
    template = "{% if messages[0]['content'] == 'w9' %}{{ raise_exception('not nine') }}{% endif %}w3"
    with pytest.raises(ValueError, match=r"does not take this conversation \(not nine\).*w9"):
        encode_all(tokenizer, [CHAT, [{"role": "user", "content": "w9"}]], chat_template=template)


def test_chat_template_arguments_reach_the_template(tokenizer):
    template = "{% if think %}w20 {% endif %}" + tokenizer.chat_template
    assert encode(tokenizer, CHAT, chat_template=template, think=True)[0] == 20


def test_a_conversation_without_a_chat_template_is_refused(tmp_path):
    bare = save_tokenizer(tmp_path, 64)
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        encode(bare, CHAT)


def test_a_prompt_of_no_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="has no tokens"):
        encode(tokenizer, "   ")


# -- what only the teacher reads ----------------------------------------------------------------------------------------


def test_the_teacher_reads_its_own_column_or_the_prompt():
    assert teacher_prompt({"prompt": "w7", "teacher_prompt": "w8"}) == "w8"
    assert teacher_prompt({"prompt": "w7"}) == "w7"


def test_a_template_fills_text_and_the_last_user_message():
    template = "{prompt} w9 {answer}"
    assert teacher_prompt({"prompt": "w7", "answer": "w8"}, template) == "w7 w9 w8"
    turns = [*CHAT, {"role": "assistant", "content": "w10"}, {"role": "user", "content": "w11"}]
    filled = teacher_prompt({"prompt": turns, "answer": "w8"}, template)
    assert filled == [*turns[:2], {"role": "user", "content": "w11 w9 w8"}]


def test_braces_in_the_data_are_not_fields():
    assert teacher_prompt({"prompt": "{x}", "answer": "{y}"}, "{prompt} {answer}") == "{x} {y}"


def test_privileged_context_has_a_default_template():
    assert privileged_template_for(["prompt", "privileged_context"], None) == DEFAULT_PRIVILEGED_TEMPLATE
    assert privileged_template_for(["prompt", "other"], None) is None


def test_a_missing_column_names_template_field_and_columns():
    with pytest.raises(ValueError, match="which the dataset does not have") as error:
        privileged_template_for(["prompt", "question"], "{prompt} {answer}")
    for part in ("{prompt} {answer}", "'answer'", "['prompt', 'question']"):
        assert part in str(error.value)


def test_a_dataset_without_prompts_is_refused():
    with pytest.raises(ValueError, match="no 'prompt' column; its columns are"):
        privileged_template_for(["question"], None)


def test_two_ways_to_build_the_teachers_prompt_are_refused():
    with pytest.raises(ValueError, match="drop the column or the template"):
        privileged_template_for(["prompt", "teacher_prompt"], "{prompt}")


def test_a_row_without_the_privileged_value_is_refused():
    with pytest.raises(ValueError, match="needs 'answer', which this row does not have"):
        teacher_prompt({"prompt": "w7", "answer": None}, "{prompt} {answer}")


@pytest.mark.parametrize("template", ["{}", "{0}", "{prompt.x}", "{prompt[0]}", "\\boxed{", "\\boxed{}"])
def test_a_malformed_template_is_refused(template):
    with pytest.raises(ValueError, match="a literal brace is written twice"):
        template_fields(template)


def test_literal_braces_and_fields():
    assert template_fields("\\boxed{{{answer}}} {prompt}") == {"answer", "prompt"}


def test_a_conversation_without_a_user_message_is_refused():
    with pytest.raises(ValueError, match="no user message"):
        teacher_prompt({"prompt": [{"role": "system", "content": "w7"}], "answer": "w8"}, "{answer}")
