"""Live students of every kind that one process can have, and those that do not belong to their engine."""

import copy
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from osd import sync_check
from osd.generation import OSDGeneration
from osd.validate_models import check_models, check_student_can_train, student_layout
from osd.weight_sync import checked
from tests.tiny import tiny_model
from tests.training import NOISE, ROWS, STUDENT_PROMPTS, build_trainer, disagreement, gaps_over_training, logged, perturb

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def student(tiny_pair):
    return AutoModelForCausalLM.from_pretrained(tiny_pair[1]).eval()


@pytest.fixture
def generation_of(engine, tiny_pair):
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[1])
    return lambda model: OSDGeneration(model, Accelerator(), tokenizer, pair=engine, max_completion_length=8)


def gap_after_sync(generation, model):
    """Distance of the engine's student from `model`, in nats."""
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
    with pytest.raises(ValueError, match="no module or parameter named 'nothing'"):
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


@pytest.mark.parametrize("settings", [{"trainable_token_indices": [3]}, {"name": "mine", "modules_to_save": ["lm_head"]}])
def test_adapters_that_trl_cannot_name_in_shards_are_refused(generation_of, student, monkeypatch, settings):
    monkeypatch.setattr(OSDGeneration, "_sharded", True)
    generation_of(with_lora(copy.deepcopy(student), modules_to_save=["lm_head"]))
    settings = dict(settings)
    name = settings.pop("name", "default")
    model = get_peft_model(student, LoraConfig(**{**LORA.to_dict(), **settings}), adapter_name=name)
    with pytest.raises(ValueError, match="cannot be synced from a sharded student"):
        generation_of(model)


# -- the check after a sync ---------------------------------------------------------------------------------------------


def scaled_logits(student):
    """Planted: the live student computes something else with the same tensors."""
    head = student.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: 2 * logits)
    return student


def test_a_live_student_that_computes_something_else_is_refused(generation_of, student):
    generation = generation_of(scaled_logits(student))
    with pytest.raises(RuntimeError, match=r"not the student in training: .* differ by .* nats on average"):
        generation.sync_weights()
    with pytest.raises(RuntimeError, match="call sync_weights"):
        generation.generate(STUDENT_PROMPTS, None, 1)
    generation.check_sync = False
    generation.sync_weights()


def test_an_adapter_that_the_engine_does_not_follow_is_refused_once_it_does_something(generation_of, student, monkeypatch):
    """Planted: A and B never reach the engine. B is zero at the first sync."""
    monkeypatch.setattr("osd.adapters.merge_plain", lambda layer: layer.base_layer.weight.detach())
    model = get_peft_model(student, LORA)
    generation = generation_of(model)
    generation.sync_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * 0.1)
    with pytest.raises(RuntimeError, match="not the student in training"):
        generation.sync_weights()


def test_rounding_to_sixteen_bits_is_not_a_difference(generation_of, student, monkeypatch):
    """The live student in bfloat16, which is further from the float32 engine than two bfloat16 students are apart."""
    model = student.to(torch.bfloat16)
    check, gaps = sync_check._gap, []
    monkeypatch.setattr(sync_check, "_gap", lambda *args: gaps.append(check(*args)) or gaps[-1])
    generation = generation_of(copy.deepcopy(model).float())  # the engine gets the same values
    monkeypatch.setattr(sync_check, "_live_logits", partial(lambda live, _, ids: live(model, ids), sync_check._live_logits))
    monkeypatch.setattr(sync_check, "_is_32_bit", lambda *args: False)
    generation.sync_weights()
    [(mean, _)] = gaps
    assert 1e-4 < mean < sync_check._LIMIT_16_BIT / 2


def test_checks_come_after_syncs_one_two_four(generation_of, student, monkeypatch):
    seen = []
    monkeypatch.setattr("osd.weight_sync.check_same_student", lambda *_: seen.append(generation._syncs))
    generation = generation_of(student)
    for _ in range(9):
        generation.sync_weights()
    assert seen == [1, 2, 4, 8]


def test_a_check_leaves_the_student_and_the_random_state_alone(generation_of, student):
    student.train()
    student.model.layers[0].eval()
    modes, state = [module.training for module in student.modules()], torch.get_rng_state()
    generation_of(student).sync_weights()
    assert [module.training for module in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


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
        (partial(tiny_model, num_hidden_layers=1), r"lacks 9 parameters of .*model.layers.1"),
        (partial(tiny_model, vocab=72), r"has shape \[72, 64\], and \[64, 64\] in .* if its embeddings were resized"),
    ],
    ids=["renamed", "another width", "a layer more", "a layer less", "resized embeddings"],
)
def test_a_student_that_is_not_the_engines_is_refused(generation_of, student, tmp_path, change, message):
    model = AutoModelForCausalLM.from_pretrained(change(tmp_path)) if isinstance(change, partial) else change(student)
    with pytest.raises(ValueError, match=message):
        generation_of(model)


def test_a_student_that_changes_its_parameters_later_is_refused_and_nothing_is_sampled(generation_of, student, tmp_path):
    generation = generation_of(student)
    generation.model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path, num_hidden_layers=1))
    # One message of an engine that has had a full sync before, the other of one that has not.
    with pytest.raises(ValueError, match=r"left (out \d+ tensors|.* of the student's parameters as they were)"):
        generation.sync_weights()
    with pytest.raises(RuntimeError, match="sync_weights"):
        generation.generate(STUDENT_PROMPTS, None, 1)
    assert gap_after_sync(generation_of(student), student) < NOISE


def test_a_quantized_live_student_is_refused(generation_of, student):
    student.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the live student is quantized \(model.layers.0.mlp.up_proj.weight\)"):
        generation_of(student)


def test_an_untied_head_of_a_tied_engine_is_refused(tmp_path, student):
    """vLLM would drop it without a word, and sample from the embeddings."""
    layout = student_layout(pair_of(tiny_model(tmp_path, tie_word_embeddings=True)))
    with pytest.raises(ValueError, match=r"'lm_head.weight' is not one of 'tied'"):
        list(checked(student.named_parameters(), layout.shapes, "tied"))


def pair_of(student, **student_kwargs):
    from osd.engine.engine import PairConfig

    return PairConfig(teacher="none", student=str(student), student_kwargs=student_kwargs)


def test_an_architecture_that_transformers_cannot_build_is_not_checked(tiny_pair):
    assert student_layout(pair_of(tiny_pair[1], hf_overrides={"num_hidden_layers": 1})) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert student_layout(pair_of(tiny_pair[1])).shapes["lm_head.weight"] == (64, 64)


def saved_config(folder, kind, **settings):
    """A folder with a configuration and no weights."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2}
    AutoConfig.for_model(kind, **sizes, **settings).save_pretrained(folder)
    return folder


def test_weights_that_transformers_renames_are_pushed_under_their_names_on_disk(tmp_path):
    layout = student_layout(pair_of(saved_config(tmp_path, "gpt_neox", num_hidden_layers=1, intermediate_size=64)))
    assert {name: saved for name, saved in layout.on_disk.items() if (name,) != saved} == {
        "lm_head.weight": ("embed_out.weight",)
    }


@pytest.mark.parametrize(
    ("kind", "settings", "kwargs", "message"),
    [
        ("gpt_oss", {}, {}, r"student='.*' is a gpt-oss: vLLM loads its experts only once.*the teacher may"),
        ("qwen3_moe", {}, {"hf_overrides": {"num_experts": 4}}, r"student='.*' is a mixture of experts.*hf_overrides"),
        ("deepseek_v2", {"n_routed_experts": 1}, {}, r"has latent attention \(MLA\).*the teacher may"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, r"is quantized \(.*gptq.*unquantized"),
        ("llama", {}, {"quantization": "fp8"}, r"is quantized \(fp8\)"),
        ("llama", {}, {"load_format": "bitsandbytes"}, r"is quantized \(bitsandbytes\)"),
        ("hrm_text", {}, {}, r"HrmTextForCausalLM\): transformers rearranges \d+ of its weights"),
    ],
    ids=["gpt-oss", "overrides", "latent attention", "quantized", "by the engine", "while loading", "rearranged"],
)
def test_students_that_cannot_be_synced_are_refused_by_their_configuration(tmp_path, kind, settings, kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_student_can_train(pair_of(saved_config(tmp_path, kind, **settings), **kwargs))


def test_weights_that_transformers_joins_are_split_again(tmp_path):
    path = saved_config(tmp_path, "qwen3_moe", num_hidden_layers=1, num_experts=2, moe_intermediate_size=32)
    layout = student_layout(pair_of(path))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    joined = torch.randn(layout.shapes[name])
    split = layout.as_on_disk(name, joined)
    for expert in range(2):
        for part, half in (("gate", slice(32)), ("up", slice(32, 64))):
            weight = split.pop(f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight")
            assert torch.equal(weight, joined[expert, half])
    assert not split


def test_experts_under_a_dense_teacher_are_refused_for_sampling_too(tiny_pair, tmp_path):
    config = replace(pair_of(saved_config(tmp_path, "qwen3_moe")), teacher=str(tiny_pair[0]))
    with pytest.raises(ValueError, match=r"128 of them\) and teacher='.*' is dense"):
        check_models(config)


def test_a_model_without_files_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"student='': the path is empty.*made in memory.*save_pretrained"):
        check_student_can_train(pair_of(""))


def test_an_architecture_that_vllm_lacks_is_refused_where_only_vllms_are_allowed(tiny_pair, tmp_path):
    path = saved_config(tmp_path, "llama", architectures=["HeliumForCausalLM"])
    config = replace(pair_of(path, model_impl="vllm"), teacher=str(tiny_pair[0]))
    with pytest.raises(ValueError, match=r"student='.*': vLLM has no HeliumForCausalLM.*set vllm_model_impl='auto'"):
        check_models(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdaLoraConfig(total_step=10, task_type="CAUSAL_LM"), "peft_config is AdaLoRA: .*use LoraConfig"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "peft_config is PROMPT_TUNING: its virtual tokens"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused_before_anything_loads(engine, tiny_pair, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(engine, tiny_pair[1], tmp_path, peft_config=config)


def test_training_a_student_with_more_layers_than_the_engines_is_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="is not one of"):
        build_trainer(engine, tiny_model(tmp_path / "deeper", num_hidden_layers=3), tmp_path, ROWS)
