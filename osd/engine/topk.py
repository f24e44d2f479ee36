"""The k largest log-probabilities of a policy at each token, and the mass of the rest: supervision of fixed size per token.

A row has 2k + 1 float32 columns: k ids, their log-probabilities in descending order, and the log-probability of all other ids
together (minus infinity if k is the whole vocabulary). float32 holds ids up to 2^24 exactly.

N tokens, V vocabulary, k ids of a row, X columns of a row (2k + 1), C rows of a chunk, O outcomes: k ids and the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osd.engine.mixture import GREEDY_BELOW

_CHUNK_LOGITS = 1 << 25  # float32 logits that are copied at a time, 128 MiB


def columns(k: int) -> int:
    """Return the number of columns of a row, X."""
    return 2 * k + 1


def top_k(logits_NV: Tensor, temperature_N: Tensor, k: int) -> Tensor:
    """Return the rows of softmax(logits / temperature), float32 [N, X]; temperature 0 counts as 1, as in the record.

    The mass of the rest is summed over its ids. One minus the others would lose the small masses of a confident policy.
    """
    divisor_N1 = torch.where(temperature_N < GREEDY_BELOW, 1.0, temperature_N)[:, None]
    rows_NX = torch.empty(len(logits_NV), columns(k), device=logits_NV.device)
    size = max(1, _CHUNK_LOGITS // logits_NV.shape[1])
    for start in range(0, len(logits_NV), size):
        chunk = slice(start, start + size)
        z_CV = logits_NV[chunk].float() / divisor_N1[chunk]
        total_C1 = z_CV.logsumexp(-1, keepdim=True)
        top_Ck, id_Ck = z_CV.topk(k)
        rest_C1 = z_CV.scatter_(-1, id_Ck, float("-inf")).logsumexp(-1, keepdim=True)
        rows_NX[chunk] = torch.cat([id_Ck.float(), top_Ck - total_C1, rest_C1 - total_C1], -1)
    return rows_NX


def ids_and_logprobs(rows_NX: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into ids, int64 [N, k], and log-probabilities of the outcomes, [N, O]: those ids, and the rest."""
    k = rows_NX.shape[-1] // 2
    return rows_NX[..., :k].long(), rows_NX[..., k:]
