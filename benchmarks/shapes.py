"""Model folders that hold nothing but a config.json: speed needs an architecture, not trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# Qwen2.5 as published. `tiny` and `small` are for trying the benchmark out; like 1.5B and 14B, they differ in padded ids.
SHAPES: dict[str, tuple[int, ...]] = {
    "tiny": (64, 128, 2, 2, 1, 512),
    "small": (128, 256, 3, 4, 2, 576),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "3B": (2048, 11008, 36, 16, 2, 151936),
    "7B": (3584, 18944, 28, 28, 4, 152064),
    "14B": (5120, 13824, 48, 40, 8, 152064),
    "32B": (5120, 27648, 64, 40, 8, 152064),
}
UNTIED = ("7B", "14B", "32B")  # the smaller ones use their embeddings as output layer


def config(name: str) -> dict[str, Any]:
    """The config.json of Qwen2.5 in this size.

    Raises:
        ValueError: a size that is not in SHAPES.
    """
    if name not in SHAPES:
        raise ValueError(f"no shape is called {name!r}; choose from {', '.join(SHAPES)}")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **dict(zip(COLUMNS, SHAPES[name], strict=True)),
        "tie_word_embeddings": name not in UNTIED,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "bfloat16",
    }


def parse_pair(pair: str) -> tuple[str, str]:
    """'3B+1.5B' -> teacher, student.

    Raises:
        ValueError: anything but two known sizes.
    """
    names = pair.split("+")
    if len(names) != 2:
        raise ValueError(f"pair {pair!r}: name a teacher and a student, like 3B+1.5B")
    for name in names:
        config(name)
    return names[0], names[1]


def write_model(name: str, folder: Path) -> Path:
    """Make a model folder of this shape under ``folder``; returns it."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config(name), indent=2))
    return path
