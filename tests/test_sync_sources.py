"""Live students of every kind that one process can have, and those that do not belong to their engine."""

import copy
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from osd.generation import OSDGeneration
from osd.weight_sync import checked, expected_shapes
from tests.test_generation import NOISE, STUDENT_PROMPTS, disagreement, gaps_over_training, perturb
from tests.tiny import tiny_engine_kwargs, tiny_model
from tests.training import ROWS, build_trainer, logged

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def engine(tiny_pair):
    from osd.engine.engine import PairConfig, PairEngine

    teacher, student = map(str, tiny_pair)
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs())) as engine:
        yield engine


@pytest.fixture
def student(tiny_pair):
    return AutoModelForCausalLM.from_pretrained(tiny_pair[1]).eval()


@pytest.fixture
def generation_of(engine, tiny_pair):
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[1])
    return lambda model: OSDGeneration(model, Accelerator(), tokenizer, pair=engine, max_completion_length=8)


def gap_after_sync(generation, model):
    """How far the engine's student is from `model`, in nats."""
    generation.sync_weights()
    generation.generate(STUDENT_PROMPTS, None, 1)
    return disagreement(model, STUDENT_PROMPTS, generation.last_batch.completions, "logp_theta")


def with_lora(student, **settings):
    """Under an adapter that does something: B is zero when it is made."""
    model = get_peft_model(student, LoraConfig(**{**LORA.to_dict(), **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return model


# -- sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["lora", "dora", "a saved head", "embeddings"],
)
def test_an_adapter_is_merged_on_the_way(generation_of, student, settings):
    plain = copy.deepcopy(student)
    model = with_lora(student, **settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generation = generation_of(model)
    for _ in range(3):
        assert gap_after_sync(generation, model) < NOISE
    assert disagreement(plain, STUDENT_PROMPTS, generation.last_batch.completions, "logp_theta") > 100 * NOISE
    for name, parameter in model.named_parameters():  # to the bit: the frozen weights must not creep
        assert torch.equal(parameter, before[name]), name


@pytest.fixture
def pushed(engine, monkeypatch):
    """The names that each sync pushed."""
    syncs, load = [], engine.load_student_weights

    def watched(named_tensors, **kwargs):
        syncs.append([])
        return load(((syncs[-1].append(name), (name, tensor))[1] for name, tensor in named_tensors), **kwargs)

    monkeypatch.setattr(engine, "load_student_weights", watched)
    return syncs


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["lora", "dora", "saved head"]
)
def test_only_what_the_adapter_changes_is_pushed_again(generation_of, student, pushed, settings):
    names = {name for name, _ in student.named_parameters()}
    model = with_lora(student, **settings)
    generation = generation_of(model)
    for step in range(3):
        assert gap_after_sync(generation, model) < NOISE
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) * 0.1)
    changing = (*LORA.target_modules, *settings.get("modules_to_save", []))
    changed = {name for name in names if name.removesuffix(".weight").endswith(changing)}
    assert [set(names) for names in pushed] == [names, changed, changed]


def test_everything_is_pushed_when_a_frozen_weight_or_the_engine_is_not_as_it_was(generation_of, student, pushed, engine):
    model = with_lora(student)
    generation = generation_of(model)
    gap_after_sync(generation, model)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.norm.weight").mul_(1.1)
    assert gap_after_sync(generation, model) < NOISE
    other = with_lora(AutoModelForCausalLM.from_pretrained(engine.config.student))
    gap_after_sync(generation_of(other), other)
    assert gap_after_sync(generation, model) < NOISE
    generation.sync_weights()
    assert [len(names) for names in pushed] == [len(pushed[0])] * 4 + [6]


def test_a_part_of_the_student_is_refused_without_the_rest_before_it(generation_of, student, engine):
    model = with_lora(student)
    generation = generation_of(model)
    generation.sync_weights()
    with pytest.raises(ValueError, match="the first sync had not"):
        engine.load_student_weights([("nothing", torch.zeros(1))], partial=True)
    with pytest.raises(ValueError, match="push them all once"):
        engine.load_student_weights([], partial=True)
    assert gap_after_sync(generation, model) < NOISE


def test_the_adapters_tensors_do_not_change_after_they_were_yielded(generation_of, student):
    """An engine may collect them all before it copies any."""
    model = with_lora(student)
    generation = generation_of(model)
    kept = list(generation._iter_named_params())
    merged = copy.deepcopy(model).merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(dict(kept)[name], parameter.detach())
    assert {name for name, _ in kept} == {name for name, _ in merged.named_parameters()}


def test_only_tensors_that_stay_are_copied_at_once(generation_of, student, engine, monkeypatch):
    """A gathered shard is gone when the next one is asked for."""
    seen, load = [], engine.load_student_weights
    monkeypatch.setattr(
        engine, "load_student_weights", lambda *args, at_once, **kwargs: (seen.append(at_once), load(*args, **kwargs))[1]
    )
    generation_of(student).sync_weights()
    with monkeypatch.context() as patch:
        patch.setattr(OSDGeneration, "_sharded", True)
        generation_of(student).sync_weights()
    generation_of(with_lora(student)).sync_weights()
    assert seen == [True, False, False]


def test_a_compiled_student(generation_of, student):
    perturb(student)
    assert gap_after_sync(generation_of(torch.compile(student)), student) < NOISE


def test_a_gradient_checkpointed_student(generation_of, student):
    student.gradient_checkpointing_enable()
    perturb(student)
    assert gap_after_sync(generation_of(student), student) < NOISE


def test_an_adapter_under_fsdp1_is_refused_before_an_engine_starts(generation_of, student, monkeypatch):
    """TRL would merge its flat shards, and fail on their shapes."""
    fsdp1 = SimpleNamespace(fsdp_version=1, is_fsdp=True, is_zero3=False)
    monkeypatch.setattr("trl.generation.vllm_generation.DistributedBackend", lambda accelerator: fsdp1)
    with pytest.raises(ValueError, match="fsdp_version=1 with a PEFT adapter"):
        generation_of(with_lora(student))
    generation_of(student)


# -- LoRA in training ---------------------------------------------------------------------------------------------------


def test_lora_training_samples_from_the_merged_student_and_trains_the_adapter_alone(engine, tiny_pair, tmp_path):
    trainer = build_trainer(engine, tiny_pair[1], tmp_path, peft_config=LORA, max_steps=3, save_strategy="steps", save_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    gaps = gaps_over_training(trainer)
    assert len(gaps) == 3
    assert max(gaps) < NOISE
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name

    resumed = build_trainer(engine, tiny_pair[1], tmp_path, peft_config=LORA, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == pytest.approx(logged(trainer, "loss"), rel=1e-5)
    for (name, one), (_, other) in zip(resumed.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)


# -- students that do not belong to their engine ------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Wrapped, r"'inner.model.embed_tokens.weight' is not one of .*which has 'model.embed_tokens.weight'.*a wrapper has"),
        (partial(tiny_model, hidden_size=32), r"'model.embed_tokens.weight' has shape \[64, 32\], and \[64, 64\] in"),
        (partial(tiny_model, num_hidden_layers=3), r"'model.layers.2.*' is not one of .* or the architectures differ"),
        # One message of an engine that has had a full sync before, the other of one that has not.
        (partial(tiny_model, num_hidden_layers=1), r"left (out \d+ tensors|.* of the student's parameters as they were)"),
        (partial(tiny_model, vocab=72), r"has shape \[72, 64\], and \[64, 64\] in .* if its embeddings were resized"),
    ],
    ids=["renamed", "another width", "a layer more", "a layer less", "resized embeddings"],
)
def test_a_student_that_is_not_the_engines_is_refused_and_nothing_is_sampled(generation_of, student, tmp_path, change, message):
    model = AutoModelForCausalLM.from_pretrained(change(tmp_path)) if isinstance(change, partial) else change(student)
    generation = generation_of(model)
    with pytest.raises(ValueError, match=message):
        generation.sync_weights()
    with pytest.raises(RuntimeError, match="sync_weights"):
        generation.generate(STUDENT_PROMPTS, None, 1)
    assert gap_after_sync(generation_of(student), student) < NOISE


def test_an_untied_head_of_a_tied_engine_is_refused(tmp_path, student):
    """vLLM would drop it without a word, and sample from the embeddings."""
    shapes = expected_shapes(str(tiny_model(tmp_path, tie_word_embeddings=True)), {})
    with pytest.raises(ValueError, match=r"'lm_head.weight' is not one of 'tied'"):
        list(checked(student.named_parameters(), shapes, "tied"))


def test_an_architecture_that_transformers_cannot_build_is_not_checked(tiny_pair):
    assert expected_shapes(str(tiny_pair[1]), {"hf_overrides": {"num_hidden_layers": 1}}) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert expected_shapes(str(tiny_pair[1]), {})["lm_head.weight"] == (64, 64)


def test_training_a_student_with_more_layers_than_the_engines_is_refused(engine, tmp_path):
    trainer = build_trainer(engine, tiny_model(tmp_path / "deeper", num_hidden_layers=3), tmp_path, ROWS)
    with pytest.raises(ValueError, match="is not one of"):
        trainer.train()
