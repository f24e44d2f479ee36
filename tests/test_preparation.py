"""OSDTrainer before and after its engine starts: what is refused early, honoured, given back, and saved."""

import json
import os
from functools import partial

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from osd.train import OSDConfig, OSDTrainer
from osd.train import trainer as trainer_module
from osd.train.saving import repair_generation_config
from tests.tiny import CHAT_TEMPLATE, spoil_weights, tiny_engine_kwargs, tiny_model
from tests.training import ROWS, build_trainer, logged, watch

pytestmark = pytest.mark.gpu


@pytest.fixture
def make(engine, tiny_pair, tmp_path):
    return partial(build_trainer, engine, tiny_pair[1], tmp_path)


def unstarted(tmp_path, tiny_pair, *, model=None, processing_class=None, rows=ROWS, **given):
    """A trainer that is expected to fail before its engine starts."""
    settings = {"output_dir": str(tmp_path), "teacher_model_name_or_path": str(tiny_pair[0]), **given}
    args = OSDConfig(use_cpu=True, bf16=False, report_to="none", **settings)
    data = Dataset.from_list(rows)
    return OSDTrainer(model or str(tiny_pair[1]), args=args, train_dataset=data, processing_class=processing_class)


# -- refused before a model loads ---------------------------------------------------------------------------------------


@pytest.fixture
def unloadable(tmp_path):
    """Two models whose weights cannot be loaded."""
    pair = tiny_model(tmp_path / "teacher", seed=1), tiny_model(tmp_path / "student", seed=2)
    for path in pair:
        spoil_weights(path)
    return pair


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_completion_length": 512},
            "=512 leaves no room for a prompt in the teacher's context of 512",
        ),
        (
            {"vllm_max_model_length": 16, "max_completion_length": 14},
            "16 of 16 rows .* is row 0: the teacher's prompt has 3",
        ),
        ({"push_to_hub": True}, "push_to_hub=True needs a token: set hub_token"),
        ({"engine_kwargs": {"max_model_len": 1024}}, "max_model_len"),
        (
            {"vllm_tensor_parallel_size": 2, "max_completion_length": 8},
            "tensor_parallel_size=2 .*: 1 training processes do not make groups of 2",
        ),
        (
            {"teacher_signal": "topk", "teacher_topk": 65},
            "teacher_topk=65 is out of range: both models share 64 token ids; use 1 to 64",
        ),
        ({"vllm_tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide the 2 attention heads of teacher="),
    ],
)
def test_refused_before_a_model_loads(tmp_path, unloadable, monkeypatch, given, message):
    monkeypatch.setattr("osd.train.saving.get_token", lambda: None)
    with pytest.raises(ValueError, match=message):
        unstarted(tmp_path, unloadable, **given)


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, unloadable):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir='.*file/run' cannot be written"):
        unstarted(tmp_path, unloadable, output_dir=str(tmp_path / "file" / "run"))


def test_a_student_without_a_path_is_refused(tmp_path, tiny_pair):
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_pair[1]).config)
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM without a path"):
        unstarted(tmp_path, tiny_pair, model=model)


def test_a_processing_class_of_another_vocabulary_is_refused(tmp_path, unloadable):
    tokenizer = AutoTokenizer.from_pretrained(unloadable[1])
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match=r"different tokenizers: id 64 is None to the teacher and 'more'"):
        unstarted(tmp_path, unloadable, processing_class=tokenizer)


# -- honoured -----------------------------------------------------------------------------------------------------------


def test_the_students_revision_reaches_its_engine(tmp_path):
    args = OSDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"revision": "v2"})
    assert args.pair_kwargs()["student_kwargs"] == {"revision": "v2"}


def ends(trainer):
    """Last tokens of the completions of a run that ended by themselves."""
    seen = []
    watch(trainer, lambda _: seen.extend(trainer.vllm_generation.last_batch.completions))
    trainer.train()
    return {completion.token_ids[-1] for completion in seen if completion.finish_reason == "stop"}


def test_the_ends_of_the_tokenizer_and_of_the_loaded_student_end_completions(make, tiny_pair):
    likely = {"generation_kwargs": {"logit_bias": {7: 3.0, 9: 3.0}}, "max_completion_length": 32}
    assert not ends(make(**likely)) & {7, 9}
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[1], eos_token="w9")
    model = AutoModelForCausalLM.from_pretrained(tiny_pair[1])
    model.generation_config.eos_token_id = 7
    trainer = make(model=model, processing_class=tokenizer, **likely)
    assert ends(trainer) >= {7, 9}
    assert set(trainer.eos_token_ids) == {2, 7, 9}
    assert logged(trainer, "completions/clipped_ratio")[-1] < 1
    assert set(trainer.model.generation_config.eos_token_id) == {2, 7, 9}  # what the saved student stops at


def test_ignore_eos_ignores_all_of_them(make):
    trainer = make(generation_kwargs={"ignore_eos": True, "logit_bias": {2: 5.0}})
    assert ends(trainer) == set()


def test_completions_match_the_regular_expression(make):
    trainer = make(vllm_structured_outputs_regex="w9w10w1[12]", max_steps=1)
    texts = []
    watch(trainer, lambda _: texts.extend(c.token_ids for c in trainer.vllm_generation.last_batch.completions))
    trainer.train()
    assert {tuple(ids[:3]) for ids in texts} <= {(9, 10, 11), (9, 10, 12)}


@pytest.mark.parametrize("given", [{"vllm_structured_outputs_regex": "(w9"}, {"generation_kwargs": {"structured_outputs": {}}}])
def test_a_wrong_structure_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="structured_outputs"):
        OSDConfig(str(tmp_path), use_cpu=True, bf16=False, **given)


def test_another_template_of_the_student_is_no_secret(make, tiny_pair):
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[1])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant", "user")
    with pytest.warns(UserWarning, match="have different chat templates"):
        make([{"prompt": row["prompt"]} for row in ROWS], processing_class=tokenizer, enable_chat_template=True)


# -- given back ---------------------------------------------------------------------------------------------------------


def own(tmp_path, tiny_pair, **given):
    given = {"teacher_model_name_or_path": str(tiny_pair[0]), "engine_kwargs": tiny_engine_kwargs(), "max_steps": 1, **given}
    return build_trainer(None, tiny_pair[1], tmp_path, **given)


@pytest.mark.parametrize("error", [ValueError("late"), KeyboardInterrupt()])
def test_a_constructor_that_fails_gives_its_engine_back(tmp_path, tiny_pair, monkeypatch, error):
    """Alone in the process: no other engine lives here."""
    from osd.engine.backend.frontend import Frontend

    monkeypatch.setattr(Frontend, "_in_this_process", None)

    def fails(*args):
        raise error

    with monkeypatch.context() as planted:
        planted.setattr(trainer_module, "start_teacher", fails)
        with pytest.raises(type(error)):
            own(tmp_path, tiny_pair)
    with own(tmp_path, tiny_pair) as trainer:
        trainer.train()
    assert trainer.vllm_generation.engine.state.value == "closed"


# -- saved --------------------------------------------------------------------------------------------------------------

UNSAVABLE = {"temperature": 0.1, "top_p": 0.5, "do_sample": False, "eos_token_id": [2, 9], "bos_token_id": 1}


@pytest.mark.parametrize("written", [UNSAVABLE, {"early_stopping": True, "eos_token_id": 2}])
def test_a_generation_config_that_transformers_refuses_loses_no_weights(make, tmp_path, tiny_pair, written):
    path = tiny_model(tmp_path / "student", seed=2)
    (path / "generation_config.json").write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="generation config could not be saved, so"):
        trainer = make(model=str(path), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.model.generation_config.do_sample, trainer.model.generation_config.temperature = False, 0.7  # changed since
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-1"):
        assert (folder / "model.safetensors").is_file()
        assert 2 in GenerationConfig.from_pretrained(folder).eos_token_id if isinstance(written["eos_token_id"], list) else True


def test_a_generation_config_in_order_is_left_alone(recwarn):
    holder = type("Model", (), {"generation_config": GenerationConfig(do_sample=True, temperature=0.5)})()
    before = holder.generation_config.to_dict()
    repair_generation_config(holder)
    assert holder.generation_config.to_dict() == before
    assert not recwarn.list


def test_a_tokenizer_that_cannot_be_saved_is_found_at_the_start(make, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def fails(*args, **kwargs):
        raise TypeError("not JSON serializable")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    with pytest.raises(ValueError, match=r"the student's tokenizer cannot be saved .not JSON serializable."):
        make()


def test_the_check_of_saving_leaves_nothing_behind(make, tmp_path):
    make()
    assert os.listdir(tmp_path) == []
