"""Fused Triton kernels for mixing, drawing and recording. Importing this package needs neither Triton nor a GPU.

If `available(device)` and `supports(config)` are true, osd.kernels.fused.mix_and_draw replaces osd.mixing.mix, a draw and
osd.mixing.record_rows at about the cost of reading the logits.
"""

import functools
import importlib.util

import torch

from osd.core import MixingConfig


@functools.cache
def available(device: torch.device | str) -> bool:
    """Return True if the kernels run on this device: an NVIDIA or AMD GPU, with Triton installed."""
    return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None


def supports(config: MixingConfig) -> bool:
    """Return True if the kernels implement this configuration. osd.mixing implements every configuration."""
    return config.mixture == "geometric" and config.alpha_method in ("kl_symmetry", "fixed")
