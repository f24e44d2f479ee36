"""Teachers and students of other architectures: output layers by any name, renamed weights, remote code."""

import json
from contextlib import nullcontext

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from osd.engine.engine import PairConfig, PairEngine
from osd.train.divergence import token_logprobs
from osd.train.lm_head import head_of
from osd.validate_models import StudentLayout
from tests.architectures import save_model
from tests.tiny import save_tokenizer, tiny_engine_kwargs, tiny_model
from tests.training import NOISE, build_trainer, disagreement, gaps_over_training

pytestmark = pytest.mark.gpu

PROMPTS = [[7, 8, 9], [10, 11]]
SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
KINDS = {
    "Gemma2": dict(final_logit_softcapping=2.0, sliding_window=256, head_dim=32, query_pre_attn_scalar=32),
    "Cohere": dict(logit_scale=0.25, tie_word_embeddings=True),
    "GPTNeoX": dict(rotary_pct=1.0),
    "Granite": dict(logits_scaling=3.0, embedding_multiplier=4.0),
    "Phi": {},
}


def model_of(path, kind):
    save_tokenizer(path, 64)
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("Cohere", "GPTNeoX") else []) for kind in KINDS]
)
def test_the_recorded_states_and_the_engines_layer_give_the_teachers_distribution(tiny_pair, tmp_path, kind):
    teacher = model_of(tmp_path, kind)
    kwargs = tiny_engine_kwargs()
    with PairEngine(PairConfig(teacher=teacher, student=str(tiny_pair[1]), engine_kwargs=kwargs)) as engine:
        reference = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").eval()
        head = head_of(*engine.teacher_lm_head(), reference.config)
        prompts = [pair_prompt(ids) for ids in PROMPTS]
        completions = engine.generate(prompts, sampling={"max_tokens": 8}, hidden=True)
        for completion in completions:
            hidden_TH = completion.record.teacher_hidden_TH.to(head.weight_VH)
            logp_T = token_logprobs(hidden_TH, head, torch.tensor(completion.token_ids, device=hidden_TH.device), 1.0).cpu()
            torch.testing.assert_close(logp_T, completion.record.logp_teacher, rtol=0, atol=NOISE)
        assert disagreement(reference, PROMPTS, completions, "logp_teacher") < NOISE


def pair_prompt(ids):
    from osd.engine.engine import PairPrompt

    return PairPrompt(teacher_token_ids=ids, student_token_ids=ids)


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
class MyConfig(LlamaConfig):
    model_type = "my_llama"
class MyModel(LlamaModel):
    config_class = MyConfig
class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""
CLASSES = {"AutoConfig": "my.MyConfig", "AutoModel": "my.MyModel", "AutoModelForCausalLM": "my.MyForCausalLM"}


def remote_model(path, classes):
    tiny_model(path, seed=2)
    (path / "my.py").write_text(REMOTE_CODE)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "my_llama", "architectures": ["MyForCausalLM"], "auto_map": classes}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_a_student_of_remote_code_is_trained(tiny_pair, tmp_path):
    fields = {
        "teacher_model_name_or_path": str(tiny_pair[0]),
        "trust_remote_code": True,
        "model_init_kwargs": {"trust_remote_code": True},
        "engine_kwargs": tiny_engine_kwargs(),
    }
    part = remote_model(tmp_path / "part", {name: place for name, place in CLASSES.items() if name != "AutoModel"})
    with pytest.raises(ValueError, match=r"loads remote code as an AutoModel, which auto_map in config\.json does not name"):
        build_trainer(None, part, tmp_path, **fields)
    trainer = build_trainer(None, remote_model(tmp_path / "student", CLASSES), tmp_path, **fields)
    try:
        assert max(gaps_over_training(trainer)) < NOISE
    finally:
        trainer.close()


@pytest.mark.parametrize("kind", ["sliding window and full", "Mamba-2 and attention"])
def test_a_student_with_windows_or_states_is_trained(tiny_pair, tmp_path, kind):
    student = str(save_model(tmp_path / "student", kind))
    kwargs = tiny_engine_kwargs(enable_prefix_caching=torch.cuda.is_available())  # for vLLM's Mamba-2 on a CPU
    with PairEngine(PairConfig(teacher=str(tiny_pair[0]), student=student, engine_kwargs=kwargs)) as engine:
        assert max(gaps_over_training(build_trainer(engine, student, tmp_path))) < NOISE


def test_a_student_with_experts_is_trained_and_wrong_experts_are_seen(tmp_path, monkeypatch):
    teacher, student = (str(save_model(tmp_path / name, "experts", seed)) for name, seed in (("teacher", 3), ("student", 4)))
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs())) as engine:
        assert max(gaps_over_training(build_trainer(engine, student, tmp_path))) < NOISE
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")  # experts are pushed once
        assert max(gaps_over_training(build_trainer(engine, student, tmp_path, peft_config=lora))) < NOISE
        stored = safetensors.torch.load_file(f"{student}/model.safetensors")
        with pytest.raises(ValueError, match=r"the weight sync has \d+ of the \d+ weights of model\.layers\.1\.mlp\.experts"):
            engine.load_student_weights((n, t) for n, t in stored.items() if "layers.1.mlp.experts.2.up_proj" not in n)
        engine.load_student_weights(stored.items())
        # Planted: experts in another order.
        right = StudentLayout.as_on_disk
        monkeypatch.setattr(StudentLayout, "as_on_disk", lambda layout, name, tensor: right(layout, name, turned(tensor)))
        with pytest.raises(RuntimeError, match="the engine's student is not the student in training"):
            build_trainer(engine, student, tmp_path).train()
        monkeypatch.undo()
        # Planted: experts loaded over those that vLLM has rearranged.
        monkeypatch.setattr("osd.engine.backend.student_weights.loading_experts", lambda *args, **kwargs: nullcontext())
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="the engine's student is not the student in training"):
                build_trainer(engine, student, tmp_path).train()


def turned(tensor):
    return tensor.roll(1, 0) if tensor.dim() == 3 else tensor


def test_a_gpt_neox_student_is_trained_from_another_teacher_and_a_wrong_head_is_seen(tmp_path, monkeypatch):
    teacher, student = str(tiny_model(tmp_path / "teacher")), model_of(tmp_path / "student", "GPTNeoX")
    with PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs())) as engine:
        assert max(gaps_over_training(build_trainer(engine, student, tmp_path))) < NOISE
        lora = LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM")
        assert max(gaps_over_training(build_trainer(engine, student, tmp_path, peft_config=lora))) < NOISE
        # Planted: an architecture that scales its logits under a name that OSD does not know.
        monkeypatch.setattr("osd.train.lm_head.logit_scale", lambda config: 2.0)
        with pytest.raises(RuntimeError, match=r"differ from those it sampled with by .* Use teacher_signal='topk' or"):
            build_trainer(engine, student, tmp_path).train()
