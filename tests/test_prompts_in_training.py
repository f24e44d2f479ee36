"""Conversations as data sets have them, in training: neither side reads None keys or the reference answer."""

import pytest
from datasets import Dataset

from osd import prompt_checks
from osd.train import OSDConfig
from osd.train.rows import Renderer
from tests.tiny import save_tokenizer

NAMED = "{% for m in messages %}{{ m['role'] }}{% if 'name' in m %} {{ m['name'] }}{% endif %} {{ m['content'] }} {% endfor %}"
ROWS = [
    {"prompt": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w50"}], "answer": "w50"},
    {"prompt": [{"role": "user", "content": "w8", "name": "w40"}, {"role": "assistant", "content": "w51"}], "answer": "w51"},
]


@pytest.mark.parametrize("template", [None, "{prompt} {answer}"])
def test_each_side_reads_its_prompt_without_nones_and_answers(tmp_path, template):
    prompt_checks.forget_warnings()
    teacher, student = (save_tokenizer(tmp_path / side, 64) for side in ("teacher", "student"))
    teacher.chat_template = NAMED
    args = OSDConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, privileged_template=template)
    renderer = Renderer(student_tokenizer=student, teacher_tokenizer=teacher, args=args, context={})
    rows = list(Dataset.from_list(ROWS))
    assert rows[0]["prompt"][0]["name"] is None
    with pytest.warns(UserWarning, match="end with an assistant message"):
        read = renderer.teacher_ids(rows)
    extra = [[], []] if template is None else [[50], [51]]
    assert read == [[5, 7, *extra[0]], [5, 40, 8, *extra[1]]]
    assert renderer.student_ids([renderer.student_prompt(row) for row in rows]) == [[1, 5, 7, 2, 1, 6], [1, 5, 8, 2, 1, 6]]
