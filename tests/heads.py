"""Random output layers of small sizes, for tests of the loss."""

from __future__ import annotations

import torch

from osd.train.lm_head import Head

B, T, V, H_S, H_T = 3, 5, 11, 8, 6


def head(rows, hidden, *, seed=0, bias=False, scale=1.0, softcap=None):
    rng = torch.Generator().manual_seed(seed)
    bias_V = torch.randn(rows, generator=rng) if bias else None
    return Head(weight_VH=torch.randn(rows, hidden, generator=rng), bias_V=bias_V, scale=scale, softcap=softcap)
