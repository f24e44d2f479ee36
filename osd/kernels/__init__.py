"""Fused Triton kernels; importing this needs neither Triton nor a GPU.

Where `available(device)` and `supports(config)`, osd.kernels.fused.mix_and_draw computes what osd.mixing.mix, a draw and
osd.mixing.record_rows do, at about the cost of reading the logits.
"""

import functools
import importlib.util

import torch

from osd.core import MixingConfig


@functools.cache
def available(device: torch.device | str) -> bool:
    """Whether the kernels run on this device: an NVIDIA or AMD GPU, and Triton installed."""
    return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None


def supports(config: MixingConfig) -> bool:
    """Whether the kernels take this configuration; osd.mixing takes all."""
    return config.mixture == "geometric" and config.alpha_method in ("kl_symmetry", "fixed")
