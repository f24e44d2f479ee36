"""Quantized teachers: int8 weights and activations (compressed-tensors), which vLLM's CPU build runs in float32."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from osd.engine.engine import PairPrompt
from osd.train.divergence import token_logprobs
from osd.train.lm_head import head_of
from tests.exact import completion_logits, reference
from tests.tiny import tiny_model
from tests.training import build_trainer, logged

pytestmark = pytest.mark.gpu

PROMPTS = [PairPrompt(teacher_token_ids=[7, 8, 9] * n, student_token_ids=[10, 11] * n) for n in (1, 4, 20)]
LEVELS = 127


def quantize(path):
    """Replace the matrices of a saved model's layers by int8 with a scale per row."""
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / LEVELS
        weights[name], weights[f"{name}_scale"] = (weights[name] / scale).round().to(torch.int8), scale
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**scheme, "strategy": "channel", "dynamic": False},
        "input_activations": {**scheme, "strategy": "token", "dynamic": True},
    }
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def round_activations(module, args):
    scale = args[0].abs().amax(-1, keepdim=True) / LEVELS
    return ((args[0] / scale).round() * scale,)


def dequantized(path, *, activations):
    """Load a quantized model's weights into a float32 model; with ``activations``, its layers round their inputs too."""
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    model, weights = LlamaForCausalLM(config).float().eval(), load_file(path / "model.safetensors")
    model.load_state_dict({n: w * weights.get(f"{n}_scale", 1) for n, w in weights.items() if not n.endswith("_scale")})
    for name, module in model.named_modules():
        if activations and name.endswith("_proj"):
            module.register_forward_pre_hook(round_activations)
    return model


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory, tiny_pair):
    return quantize(tiny_model(tmp_path_factory.mktemp("int8") / "teacher", seed=1)), tiny_pair[1]


def worst(model, prompts, completions, column):
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        token_T1 = torch.tensor(completion.token_ids)[:, None]
        logp_T = completion_logits(model, prompt, completion.token_ids).log_softmax(-1).gather(-1, token_T1)[:, 0]
        gaps.append((logp_T - getattr(completion.record, column)).abs().max().item())
    return max(gaps)


def test_the_record_of_a_quantized_teacher_is_exact(engine, model_paths):
    completions = engine.generate(PROMPTS, sampling={"max_tokens": 12, "ignore_eos": True}, hidden=True)
    teacher_ids = [prompt.teacher_token_ids for prompt in PROMPTS]
    assert worst(dequantized(model_paths[0], activations=True), teacher_ids, completions, "logp_teacher") < 1e-3
    # A reference that is not quantized in the same way must disagree, or the line above proves nothing.
    assert worst(dequantized(model_paths[0], activations=False), teacher_ids, completions, "logp_teacher") > 0.02
    student_ids = [prompt.student_token_ids for prompt in PROMPTS]
    assert worst(reference(model_paths[1]), student_ids, completions, "logp_theta") < 1e-3
    # The loss of teacher_signal="recorded": recorded states through the engine's own output layer.
    head = head_of(*engine.teacher_lm_head(), AutoConfig.from_pretrained(model_paths[0]))
    for completion in completions:
        hidden_TH = completion.record.teacher_hidden_TH.to(head.weight_VH)
        logp_T = token_logprobs(hidden_TH, head, torch.tensor(completion.token_ids, device=hidden_TH.device), 1.0).cpu()
        torch.testing.assert_close(logp_T, completion.record.logp_teacher, rtol=0, atol=1e-4)


def test_a_student_learns_from_a_quantized_teacher(engine, model_paths, tmp_path):
    trainer = build_trainer(engine, model_paths[1], tmp_path, max_steps=8, teacher_signal="recorded")
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-2:]) < sum(losses[:2])
