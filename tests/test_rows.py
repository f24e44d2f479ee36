"""Rows are rendered before a model loads: bad ones are counted, named by index, and dropped if asked."""

import warnings
from datetime import datetime
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from osd.prompt_checks import forget_warnings
from osd.train import OSDConfig
from osd.train.rows import Renderer
from tests.tiny import save_tokenizer

GOOD = [{"prompt": f"w{i}", "answer": f"w{i + 1}"} for i in range(7, 30)]
BAD = {
    "no answer": ({"prompt": "w9", "answer": None}, "needs 'answer'"),
    "no prompt": ({"prompt": None, "answer": "w9"}, "the prompt is empty"),
    "too long for the student": ({"prompt": " ".join(["w9"] * 60), "answer": "w9"}, "student's prompt has 60 tokens"),
    "too long for the teacher": ({"prompt": "w9", "answer": " ".join(["w9"] * 99)}, "teacher's prompt has 100 tokens"),
    "a number": ({"prompt": 7, "answer": "w9"}, "7"),
    "a list of texts": ({"prompt": ["w9"], "answer": "w9"}, "a prompt is text or a list of messages"),
    "another shape": ({"prompt": [{"from": "human", "value": "w9"}], "answer": "w9"}, "rename 'from' to 'role'"),
    "a mix that is a text": ({"prompt": "w9", "answer": "w9", "mix": "no"}, "'mix' has 'no'"),
}


class Rows(TorchDataset):
    """Rows of any kind, which no table of Arrow changes."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.fixture
def renderer(tmp_path):
    tokenizer = save_tokenizer(tmp_path, 64)
    forget_warnings()

    def make(student=None, **given):
        options = {"privileged_template": "{prompt} {answer}", "max_completion_length": 8, **given}
        args = OSDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **options)
        context = {"teacher": 96, "student": 64}
        return Renderer(student_tokenizer=student or tokenizer, teacher_tokenizer=tokenizer, args=args, context=context)

    return make


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_its_index(renderer, name):
    row, reason = BAD[name]
    with pytest.raises(ValueError, match=rf"1 of 24 rows of the training set cannot be used; the first is row 11: .*{reason}"):
        renderer().usable(Rows([*GOOD[:11], row, *GOOD[11:]]), "training set")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_dropped_if_asked(renderer, name):
    row, reason = BAD[name]
    with pytest.warns(UserWarning, match=rf"drop_bad_rows: 2 of 25 rows .* row 0: .*{reason}"):
        kept = renderer(drop_bad_rows=True).usable(Rows([row, *GOOD, row]), "training set")
    assert [kept[i] for i in range(len(kept))] == GOOD


def test_dropping_keeps_the_kind_of_the_dataset(renderer):
    with pytest.warns(UserWarning, match="1 of 24 rows"):
        kept = renderer(drop_bad_rows=True).usable(Dataset.from_list([*GOOD, {"prompt": "", "answer": "w9"}]), "training set")
    assert isinstance(kept, Dataset)
    assert list(kept) == GOOD


def test_all_rows_bad_is_an_error_even_if_they_are_dropped(renderer):
    with pytest.raises(ValueError, match="2 of 2 rows"):
        renderer(drop_bad_rows=True).usable(Rows([{"prompt": ""}] * 2), "training set")


def test_a_stream_stops_at_its_bad_row_or_skips_it(renderer):
    rows = [*GOOD[:3], BAD["no answer"][0], *GOOD[3:]]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    seen = []
    with pytest.raises(ValueError, match=r"row 3 of the training set cannot be used: .*needs 'answer'"):
        seen.extend(renderer().usable(stream, "training set"))
    assert seen == GOOD[:3]
    with pytest.warns(UserWarning, match="drop_bad_rows: row 3 of the training set"):
        assert list(renderer(drop_bad_rows=True).usable(stream, "training set")) == GOOD


def test_a_template_that_raises_rejects_its_row_alone(renderer, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "strict", 64)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + 1 if 'w60' in m.content else m.content }}{% endfor %}"
    rows = Rows([*GOOD, {"prompt": "w60", "answer": "w9"}])
    with pytest.raises(ValueError, match="1 of 24 rows of the training set cannot be used; the first is row 23"):
        renderer(tokenizer, enable_chat_template=True).usable(rows, "training set")


def test_texts_and_conversations_in_one_batch(renderer):
    rows = [{"prompt": "w9", "answer": "w10"}, {"prompt": [{"role": "user", "content": "w9"}], "answer": "w10"}]
    renderer = renderer()
    assert renderer.usable(Rows(rows), "training set").rows == rows
    assert renderer.student_ids([row["prompt"] for row in rows]) == [[9], [1, 5, 9, 2, 1, 6]]


def test_max_tokens_of_generation_kwargs_counts(renderer):
    rows = Rows([{"prompt": " ".join(["w9"] * 50), "answer": "w9"}])
    assert renderer().usable(rows, "training set") is rows
    with pytest.raises(ValueError, match="50 tokens, and with max_completion_length=16"):
        renderer(generation_kwargs={"max_tokens": 16}).usable(rows, "training set")


def test_one_prompt_in_two_tokenizations_warns_once(renderer, tmp_path):
    other = save_tokenizer(tmp_path / "other", 64)
    other.chat_template = other.chat_template.replace("'<bos> ' + m['role']", "m['role']")
    plain = {"privileged_template": None}
    with pytest.warns(UserWarning, match="have different chat templates") as caught:
        renderer(other, **plain, enable_chat_template=True).usable(Rows(GOOD), "training set")
    assert len([w for w in caught if "chat templates" in str(w.message)]) == 1
    adds_bos = SimpleNamespace(decode=other.decode, chat_template=other.chat_template)
    wrapped = lambda text: {"input_ids": [[1, *ids] for ids in other(text)["input_ids"]]}  # noqa: E731
    tokenizer = type("AddsBos", (), {"__call__": lambda self, text: wrapped(text), **vars(adds_bos)})()
    with pytest.warns(UserWarning, match="tokenize the same text differently"):
        renderer(tokenizer, **plain).usable(Rows(GOOD), "training set")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        renderer().usable(Rows(GOOD), "training set")


def test_a_row_of_a_stream_that_lost_its_privilege_is_refused(renderer):
    """The columns of a raw stream are not known in advance: without a check the teacher would read the student's prompt."""
    rows = renderer(privileged_template=None)
    rows.teacher_ids([{"prompt": "w9", "teacher_prompt": "w9 w10"}])
    with pytest.raises(ValueError, match="the row has no 'teacher_prompt', which earlier rows have"):
        rows.teacher_ids([{"prompt": "w9"}])


def test_templates_print_the_date_on_which_the_run_began(renderer):
    """A run that is resumed the next day must not mix prompts of two dates."""
    rows = renderer()
    rows.student_tokenizer.chat_template = "{{ strftime_now('w%d') }} {{ messages[0]['content'] }}"
    chat = [{"role": "user", "content": "w20"}]
    for day in (17, 19):
        rows.started = datetime(2026, 1, day)
        assert rows.student_tokenizer.decode(rows.student_ids([chat])[0]) == f"w{day} w20"
