"""Tiny random checkpoints of many architectures, float32, by the kind of KV cache that they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests import exact
from tests.tiny import save_tokenizer

WINDOW = 16  # tokens; far fewer than the prompts of the tests
_SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
_SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
_EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_BIASED_EXPERTS = dict(
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_DELTA = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=128, linear_value_head_dim=128)

# The name of the classes in transformers, and what differs from `_SIZES`.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding window everywhere": ("Mistral", dict(sliding_window=WINDOW)),
    "sliding window and full": ("Gemma3", dict(_SLIDING, query_pre_attn_scalar=32)),
    "soft-capped logits": ("Gemma2", dict(_SLIDING, query_pre_attn_scalar=32, final_logit_softcapping=2.0)),
    "no rotary embedding in full layers": ("Exaone4", _SLIDING),
    "norms after each block": ("Olmo3", _SLIDING),
    "shared KV caches": (
        "Gemma3n",
        dict(
            _SLIDING,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=64,
            laurel_rank=8,
            intermediate_size=[64] * 4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    "head sizes that differ by layer": ("Gemma4", _SLIDING),
    "attention sinks": ("GptOss", dict(_SLIDING, **_EXPERTS)),
    "experts": ("Qwen3Moe", _EXPERTS),
    "chunked attention": (
        "Llama4",
        dict(
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=64,
            attention_chunk_size=32,
            no_rope_layers=[1, 1, 1, 0],
        ),
    ),
    "latent attention": (
        "DeepseekV2",
        dict(
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            **_BIASED_EXPERTS,
            topk_method="greedy",
        ),
    ),
    "short convolution": (
        "Lfm2",
        dict(
            layer_types=["conv", "full_attention"] * 2,
            conv_L_cache=3,
            conv_dim=64,
            conv_dim_out=64,
            block_dim=64,
            block_ff_dim=64,
            block_multiple_of=8,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=False,
            block_norm_eps=1e-5,
        ),
    ),
    "Mamba-2 and attention": (
        "GraniteMoeHybrid",
        dict(
            layer_types=["mamba", "attention"] * 2,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_d_state=16,
            mamba_n_groups=1,
            mamba_expand=2,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=64,
        ),
    ),
    "Mamba-2, attention and MLP in layers of their own": (
        "NemotronH",
        dict(
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
            mamba_num_heads=4,
            mamba_head_dim=32,
            ssm_state_size=16,
            n_groups=1,
            time_step_min=1e-30,  # transformers clamps time steps in a prefill from below, vLLM does not
        ),
    ),
    "Mamba-2 everywhere": (
        "Mamba2",
        dict(intermediate_size=128, num_heads=4, head_dim=32, state_size=16, n_groups=1, expand=2),
    ),
    "gated delta net and attention": (
        "Qwen3Next",
        dict(
            _EXPERTS,
            **_DELTA,
            shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"] * 2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
    ),
}

# Families of recent models by the names that people know, those that need a GPU first; otherwise like `ARCHITECTURES`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Jamba": (
        "Jamba",
        dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=16, mamba_dt_rank=4),
    ),
    "Nemotron 3": (
        "NemotronH",
        dict(
            ARCHITECTURES["Mamba-2, attention and MLP in layers of their own"][1],
            layers_block_type=["mamba", "attention", "moe", "mamba"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=32,
            n_group=1,
            topk_group=1,
        ),
    ),
    "Qwen3-Next": ARCHITECTURES["gated delta net and attention"],
    "Qwen3.5": ("Qwen3_5", dict(_DELTA, layer_types=["linear_attention", "full_attention"] * 2)),
    "Qwen3.5 MoE": (
        "Qwen3_5Moe",
        dict(
            _DELTA,
            **_EXPERTS,
            shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
    ),
    "Phi-4": ("Phi3", {}),
    "SmolLM3": ("SmolLM3", dict(no_rope_layers=[1, 1, 1, 0])),
    "Seed-OSS": ("SeedOss", dict(attention_dropout=0.0, residual_dropout=0.0)),
    "Hunyuan": ("HunYuanDenseV1", {}),
    "Ministral 3": ("Ministral3", {}),
    "GLM-4": ("Glm4", {}),
    "GLM-4.5": ("Glm4Moe", dict(_BIASED_EXPERTS, use_qk_norm=True)),
    "Ernie 4.5": ("Ernie4_5", {}),
    "Ernie 4.5 MoE": (
        "Ernie4_5_Moe",
        dict(_EXPERTS, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=3),
    ),
    "Llama 4": ARCHITECTURES["chunked attention"],
    "DeepSeek-V3": (
        "DeepseekV3",
        dict(
            ARCHITECTURES["latent attention"][1],
            head_dim=64,
            q_lora_rank=32,
            n_group=2,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
        ),
    ),
    "LFM2 MoE": (
        "Lfm2Moe",
        dict(_EXPERTS, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3, num_dense_layers=1),
    ),
    "Falcon-H1": (
        "FalconH1",
        dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_expand=1),
    ),
    "Granite 4 with experts": (
        "GraniteMoeHybrid",
        dict(ARCHITECTURES["Mamba-2 and attention"][1], num_local_experts=4, num_experts_per_tok=2),
    ),
    "OLMo 2": ("Olmo2", {}),
    "OLMoE": ("Olmoe", _EXPERTS),
    "Granite MoE": ("GraniteMoe", _EXPERTS),
    "Mixtral": ("Mixtral", _EXPERTS),
    "Exaone MoE": (
        "ExaoneMoe",
        dict(
            _SLIDING,
            **_EXPERTS,
            num_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            is_moe_layer=[False, True, True, True],
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        ),
    ),
    "Hunyuan MoE": ("HunYuanMoEV1", dict(num_experts=4, moe_topk=2)),
    "Arcee": ("Arcee", {}),
    "Minitron": ("Nemotron", {}),
    "StableLM": ("StableLm", {}),
}

_VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
# Multimodal checkpoints: the name of the classes in transformers, the language model's configuration, the encoder's, the rest.
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Gemma 3": (
        "Gemma3",
        ARCHITECTURES["sliding window and full"][1],
        _VISION,
        dict(mm_tokens_per_image=4, image_token_index=60, boi_token_index=58, eoi_token_index=59),
    ),
    "Qwen 3.5": (
        "Qwen3_5",
        dict(_DELTA, layer_types=["linear_attention", "full_attention"] * 2),
        dict(_VISION, depth=1, num_heads=2, out_hidden_size=64, num_position_embeddings=16),
        dict(image_token_id=60, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59),
    ),
    "Mistral 3": (
        "Mistral3",
        dict(model_type="mistral"),
        dict(_VISION, model_type="pixtral"),
        dict(image_token_index=60, tie_word_embeddings=False),
    ),
    "SmolVLM": ("SmolVLM", dict(model_type="llama"), _VISION, dict(image_token_id=60, scale_factor=2)),
}


def save_multimodal(path: Path, kind: str, seed: int = 3) -> Path:
    """Save a random model of a kind of ``MULTIMODAL`` and its tokenizer at ``path``, and return ``path``."""
    name, text, vision, rest = MULTIMODAL[kind]
    save_tokenizer(path, _SIZES["vocab_size"])
    torch.manual_seed(seed)
    ends = {key: value for key, value in _SIZES.items() if key.endswith("_token_id")}
    config = getattr(transformers, f"{name}Config")(text_config={**_SIZES, **text}, vision_config=vision, **ends, **rest)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).float().save_pretrained(path)
    return path


def save_model(path: Path, kind: str, seed: int = 3, **changes: Any) -> Path:
    """Save a random model of a kind of ``ARCHITECTURES`` or ``FAMILIES`` and its tokenizer at ``path``, and return ``path``."""
    if kind in MULTIMODAL:
        return save_multimodal(path, kind, seed)
    name, differs = (ARCHITECTURES | FAMILIES)[kind]
    text = "Text" if hasattr(transformers, f"{name}TextConfig") else ""
    save_tokenizer(path, _SIZES["vocab_size"])
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}{text}Config")(**{**_SIZES, **differs, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    for weight, tensor in model.state_dict().items():
        if weight.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(tensor)  # zeros would hide it
    model.save_pretrained(path)
    return path


def reference(path: Path) -> torch.nn.Module:
    """Load a transformers model in float32, with the attention that computes everything that its configuration names."""
    return exact.reference(path, attn_implementation="eager")
