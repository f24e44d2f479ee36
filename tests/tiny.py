"""Builders of tiny random models with a tokenizer, whose distributions can be computed exactly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos> ' + m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos> assistant ' }}{% endif %}"
)


def save_tokenizer(path: Path, vocab: int, *, eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """Save a word-level tokenizer of ``vocab`` ids at ``path``: special tokens, three roles, then ``w7``, ``w8``, ..."""
    words = [*SPECIAL, "system", "user", "assistant"]
    words += [f"w{i}" for i in range(len(words), vocab)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token=eos, unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return tokenizer


def tiny_model(
    path: Path, *, vocab: int = 64, seed: int = 0, scale: float = 0.3, tokenizer_vocab: int | None = None, **config: Any
) -> Path:
    """Save a random two-layer Llama in float32 and its tokenizer at ``path``, and return ``path``.

    ``scale`` is the standard deviation of the weights: 0.3 gives distributions far from uniform and far from one-hot.
    """
    save_tokenizer(path, tokenizer_vocab or vocab)
    settings = dict(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=scale,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**settings, **config})).float().save_pretrained(path)
    return path


def tiny_engine_kwargs(**overrides: Any) -> dict[str, Any]:
    """Return engine arguments that start a tiny pair in seconds.

    OSD_TEST_CUDA_GRAPHS=1 compiles the models and captures CUDA graphs. Scheduling is async, as on GPUs; for CPUs see
    tests/async_cpu.py.
    """
    settings = dict(
        dtype="float32",
        enforce_eager=os.environ.get("OSD_TEST_CUDA_GRAPHS") != "1",
        max_model_len=256,
        block_size=32,
        max_num_seqs=64,
        kv_cache_memory_bytes=64 << 20,
        gpu_memory_utilization=0.2,  # vLLM requires this share to be free at start-up
        async_scheduling=True,
        seed=0,
    )
    return {**settings, **overrides}


def spoil_weights(path: Path) -> None:
    """Replace a model's weights by a whole file of a wrong shape: loading the model fails."""
    save_file({"lm_head.weight": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
