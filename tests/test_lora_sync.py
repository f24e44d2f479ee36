"""Adapters of a live student: merged as PEFT merges them, frozen weights untouched, and refused where no engine can follow."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from osd.adapters import check_mergeable, merge_by_peft, plain_weights
from osd.generation import OSDGeneration
from tests.tiny import tiny_engine_kwargs, tiny_model
from tests.training import NOISE, STUDENT_PROMPTS, build_trainer, disagreement, gaps_over_training

Q = "model.layers.0.self_attn.q_proj.weight"


def llama(*, dtype=torch.float32, tied=False):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_bias=True, tie_word_embeddings=tied, **sizes)).to(dtype)


def adapted(model, *, name="default", **settings):
    """The model under an adapter that does something: B is zero when it is made."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    torch.manual_seed(1)
    return moved(get_peft_model(model, LoraConfig(**settings), adapter_name=name).eval())


def moved(model, seed=3):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=rng).to(parameter) * 0.3)
    return model


# -- merging ------------------------------------------------------------------------------------------------------------

ADAPTERS = {
    "lora": {},
    "all linear layers, rank-stabilised": {"target_modules": "all-linear", "r": 8, "use_rslora": True},
    "ranks and scalings of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "an adapter's bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "some tokens": {"trainable_token_indices": [3, 5]},
    "another name": {"name": "mine", "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_merged_as_peft_merges_them(settings, dtype):
    model, wide = adapted(llama(dtype=dtype), **settings), dtype == torch.float32
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    merged = {weight.name: weight.merged() for weight in plain_weights(model)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"merging moved {name}"
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert merged.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(merged[name], parameter.detach(), rtol=1e-6 if wide else 2**-7, atol=1e-6, msg=name)
    changed = {name for name, parameter in llama(dtype=dtype).named_parameters() if not torch.equal(parameter, merged[name])}
    assert changed <= {weight.name for weight in plain_weights(model) if weight.changes}


def test_several_active_adapters_add_up():
    model = adapted(llama())
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    moved(model)
    expected = dict(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"]).named_parameters())
    for weight in plain_weights(model):
        torch.testing.assert_close(weight.merged(), expected[weight.name].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cast", [True, False], ids=["A and B in float32", "A and B in bfloat16"])
def test_bfloat16_weights_are_rounded_once(cast):
    plain = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    model = moved(get_peft_model(llama(dtype=torch.bfloat16), plain, autocast_adapter_dtype=cast))
    [weight] = [weight for weight in plain_weights(model) if weight.name == Q]
    layer = weight.layer
    a, b = (pair["default"].weight.detach().double() for pair in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.detach().double() + layer.scaling["default"] * (b @ a)
    assert (weight.merged().double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_transposed_layers_are_merged_transposed():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    model = adapted(GPT2LMHeadModel(config), target_modules=["c_attn"], fan_in_fan_out=True)
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for weight in plain_weights(model):
        torch.testing.assert_close(weight.merged(), expected[weight.name].detach(), rtol=0, atol=1e-6)


def test_merged_and_disabled_adapters_are_not_merged_again():
    model = adapted(llama())
    whole = {weight.name: weight.merged() for weight in plain_weights(model)}
    model.merge_adapter()
    torch.testing.assert_close({w.name: w.merged() for w in plain_weights(model)}[Q], whole[Q])
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close({w.name: w.merged() for w in plain_weights(model)}[Q], llama().get_parameter(Q).detach())


def test_a_scaling_that_is_left_out_is_seen():
    """Planted: the comparison with PEFT's merge can fail."""
    model = adapted(llama())
    [layer] = [weight.layer for weight in plain_weights(model) if weight.name == Q]
    whole = merge_by_peft(layer, "weight")
    layer.scaling["default"] = 1.0
    assert (merge_by_peft(layer, "weight") - whole).abs().max() > 0.01


# -- adapters that no engine can follow ---------------------------------------------------------------------------------


def test_what_is_trained_outside_the_weights_is_refused():
    model = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"trains prompt_encoder.*no weight of the plain model can express"):
        check_mergeable(model)


def test_a_layer_that_cannot_be_merged_is_refused(monkeypatch):
    model = adapted(llama(), use_dora=True)
    check_mergeable(model)
    [layer] = {type(weight.layer) for weight in plain_weights(model) if weight.layer is not None}
    monkeypatch.setattr(layer, "merge", lambda self: 1 / 0)
    with pytest.raises(ValueError, match=r"q_proj.weight \(peft.tuners.lora.layer.Linear\) cannot be merged into a copy"):
        check_mergeable(model)


# -- tied embeddings ----------------------------------------------------------------------------------------------------

TIED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
UNTYING = {
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "tokens of their own": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("tied")
    return tiny_model(root / "teacher", seed=1), tiny_model(root / "student", seed=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(pair):
    from osd.engine.engine import PairConfig, PairEngine

    teacher, student = map(str, pair)
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs())) as engine:
        yield engine


@pytest.fixture
def generation_of(engine, pair):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    return lambda model: OSDGeneration(model, Accelerator(), tokenizer, pair=engine, max_completion_length=8)


@pytest.mark.parametrize("settings", UNTYING.values(), ids=UNTYING)
def test_an_adapter_that_unties_shared_embeddings_is_refused(generation_of, pair, settings):
    model = adapted(AutoModelForCausalLM.from_pretrained(pair[1]), **settings)
    with pytest.raises(ValueError, match=r"unties the student's lm_head.weight.*set ensure_weight_tying=True"):
        generation_of(model)


@pytest.mark.parametrize(
    "settings",
    [
        TIED,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj", "k_proj"]},
    ],
    ids=["saved embeddings", "embeddings", "some tokens", "neither"],
)
def test_an_adapter_that_keeps_them_tied_is_synced(generation_of, pair, settings):
    model = adapted(AutoModelForCausalLM.from_pretrained(pair[1]), **settings)
    generation = generation_of(model)
    for seed in range(3):
        generation.sync_weights()
        generation.generate(STUDENT_PROMPTS, None, 1)
        assert disagreement(model, STUDENT_PROMPTS, generation.last_batch.completions, "logp_theta") < NOISE
        moved(model, seed)


@pytest.mark.parametrize("settings", [TIED, {"trainable_token_indices": [3, 5]}], ids=["saved embeddings", "some tokens"])
def test_training_tied_embeddings_under_an_adapter(engine, pair, tmp_path, settings):
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    trainer = build_trainer(engine, pair[1], tmp_path, peft_config=lora)
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    assert max(gaps_over_training(trainer)) < NOISE
    assert not torch.equal(trainer.model.get_input_embeddings().weight, before)
