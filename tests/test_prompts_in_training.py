"""Conversations as data sets have them, in training: neither side reads None keys or the reference answer."""

import pytest
from datasets import Dataset

from osd.engine.engine import PairConfig, PairEngine
from tests.tiny import tiny_engine_kwargs
from tests.training import build_trainer, watch

NAMED = "{% for m in messages %}{{ m['role'] }}{% if 'name' in m %} {{ m['name'] }}{% endif %} {{ m['content'] }} {% endfor %}"
ROWS = [
    {"prompt": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w50"}], "answer": "w50"},
    {"prompt": [{"role": "user", "content": "w8", "name": "w40"}, {"role": "assistant", "content": "w51"}], "answer": "w51"},
]


@pytest.fixture(scope="module")
def engine(tiny_pair):
    with PairEngine(
        PairConfig(teacher=str(tiny_pair[0]), student=str(tiny_pair[1]), engine_kwargs=tiny_engine_kwargs())
    ) as engine:
        yield engine


@pytest.mark.parametrize("template", [None, "{prompt} {answer}"])
def test_each_side_reads_its_prompt_without_nones_and_answers(engine, tiny_pair, tmp_path, monkeypatch, template):
    monkeypatch.setattr(engine.tokenizer, "chat_template", NAMED)
    read = []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda prompts, **kwargs: read.extend(prompts) or generate(prompts, **kwargs))
    data = Dataset.from_list(ROWS)
    assert data[0]["prompt"][0]["name"] is None
    settings = {"privileged_template": template, "per_device_train_batch_size": 2, "max_steps": 1, "shuffle_dataset": False}
    trainer = build_trainer(engine, tiny_pair[1], tmp_path, data, **settings)
    student = []
    watch(trainer, student.extend)
    with pytest.warns(UserWarning, match="end with an assistant message"):
        trainer.train()
    extra = [[], []] if template is None else [[50], [51]]
    assert sorted(pair.teacher_token_ids for pair in read) == sorted([[5, 7, *extra[0]], [5, 40, 8, *extra[1]]])
    assert sorted(student) == sorted([[1, 5, 7, 2, 1, 6], [1, 5, 8, 2, 1, 6]])
    assert [pair.student_token_ids for pair in read] == student
