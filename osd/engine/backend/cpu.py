"""Support for vLLM's model runner V2 on a CPU; nothing here acts on a GPU.

The runner does its bookkeeping in Triton kernels, and Triton's interpreter takes a third of a second for those of one step. So
numpy functions with the same arguments replace the kernels of every step; tests/test_cpu_kernels.py compares them with the
kernels' source in the interpreter. The rarely used kernels (penalties, logit bias, bad words, min-p) stay interpreted.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch


def prepare() -> None:
    """Let vLLM use Triton on this CPU; call it before the modules of vLLM's model runner are imported.

    vLLM takes Triton on a CPU only with a "cpu" backend, which the published Triton lacks; the interpreter stands in for it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        # Triton's own functions were made for a GPU if it was imported before; no kernel of theirs can run here.
        for name in [n for n in sys.modules if n == "triton" or (n.startswith("triton.") and not n.startswith("triton._C"))]:
            del sys.modules[name]
    import triton
    import triton.backends
    import triton.language

    triton.backends.backends["cpu"] = SimpleNamespace(driver=_NoDriver, compiler=None)
    # vLLM was imported before, and took Triton for missing: so in its own worker processes.
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"]:
        for name, value in (("HAS_TRITON", True), ("triton", triton), ("tl", triton.language)):
            if name in vars(module):
                setattr(module, name, value)


class _NoDriver:
    """A driver that counts as active and cannot be made: torch's compiler then goes on as without a GPU."""

    @staticmethod
    def is_active() -> bool:
        return True

    def __init__(self) -> None:
        raise RuntimeError("0 active drivers: Triton's interpreter runs the kernels")


# -- vLLM's kernels in numpy ------------------------------------------------------------------------------------------


def _prefill_inputs(
    input_ids: Any, next_prefill: Any, _s: int, lookahead: int, slots: Any, starts: Any, all_ids: Any, _t: int,
    prefill_len: Any, computed: Any, **_: Any,
) -> None:  # fmt: skip
    ids, following, tokens = input_ids.numpy(), next_prefill.numpy(), all_ids.numpy()
    first, slot_of_row = starts.tolist(), slots.numpy()
    for row, (slot, done, length) in enumerate(
        zip(slot_of_row, computed.numpy()[slot_of_row], prefill_len.numpy()[slot_of_row], strict=True)
    ):
        if done >= length:
            continue
        end = done + first[row + 1] - first[row]
        ids[first[row] : first[row + 1]] = tokens[slot, done:end]
        for n in range(lookahead):
            following[n, slot] = tokens[slot, end + n] if end + n < length else 0


def _positions_and_lengths(
    positions: Any, seq_lens: Any, slots: Any, starts: Any, computed: Any, _max_reqs: int, **_: Any
) -> None:
    rows, first = len(slots), starts.numpy()
    done, length = computed.numpy()[slots.numpy()], np.diff(first[: rows + 1])
    seq_lens.numpy()[:rows] = done + length
    seq_lens.numpy()[rows:] = 0
    total = first[rows]
    positions.numpy()[:total] = np.arange(total) + np.repeat(done.astype(np.int64) - first[:rows], length)


def _combine_tokens(
    input_ids: Any, slots: Any, last: Any, starts: Any, seq_lens: Any, prefill_len: Any, drafts: Any, _s: int, cu_logits: Any,
    logits_indices: Any, NUM_NEW_SAMPLED_TOKENS: int, **_: Any,
) -> None:  # fmt: skip
    rows, slot = len(slots), slots.numpy()
    end, logits = starts.numpy()[1 : rows + 1].astype(np.int64), np.diff(cu_logits.numpy()[: rows + 1])
    place = np.arange(logits.sum()) - np.repeat(np.cumsum(logits) - logits, logits)
    logits_indices.numpy()[:] = np.repeat(end - logits, logits) + place
    length, prefill = seq_lens.numpy()[:rows], prefill_len.numpy()[slot]
    decoding = (length > prefill) & (length - logits >= prefill)
    ids = input_ids.numpy()
    ids[(end - logits)[decoding]] = last.numpy()[slot[decoding], 0]
    for row in np.flatnonzero((length > prefill) & (logits > 1)):
        ids[end[row] - logits[row] + 1 : end[row]] = drafts.numpy()[slot[row], : logits[row] - 1]


def _expand_mapping(slots: Any, expanded: Any, places: Any, cu_logits: Any, **_: Any) -> None:
    first = cu_logits.numpy()[: len(slots) + 1]
    logits = np.diff(first)
    expanded.numpy()[: first[-1]] = np.repeat(slots.numpy(), logits)
    places.numpy()[: first[-1]] = np.arange(first[-1]) - np.repeat(first[:-1], logits)


def _sampled_and_rejected(
    num_sampled: Any, num_rejected: Any, seq_lens: Any, cu_logits: Any, slots: Any, prefill_len: Any, **_: Any
) -> None:
    rows = len(slots)
    in_prefill = seq_lens.numpy()[:rows] < prefill_len.numpy()[slots.numpy()]
    sampled, logits = num_sampled.numpy(), np.diff(cu_logits.numpy()[: rows + 1])
    sampled[:rows][in_prefill] = 0
    num_rejected.numpy()[:rows] = np.where(in_prefill, 0, logits - sampled[:rows])


def _post_update(
    slots: Any, computed: Any, last: Any, bins: Any, _s: int, tokens: Any, _t: int, num_sampled: Any, num_rejected: Any,
    starts: Any, all_ids: Any, _u: int, total_len: Any, *_drafts: Any, **_: Any,
) -> None:  # fmt: skip
    rows, slot = len(slots), slots.numpy()
    real = slot >= 0
    delta = (
        -num_rejected.numpy()[:rows] if starts is None else np.diff(starts.numpy()[: rows + 1]) - num_rejected.numpy()[:rows]
    )
    computed.numpy()[slot[real]] += delta[real]
    kept, at = num_sampled.numpy()[:rows], total_len.numpy()
    for place in range(int(kept.max(initial=0))):
        has = real & (kept > place)
        drawn, new = slot[has], tokens.numpy()[has, place]
        last.numpy()[drawn, 0] = new
        all_ids.numpy()[drawn, at[drawn]] = new
        at[drawn] += 1
        if bins is not None:
            bins.numpy()[drawn, new] += 1


def _grammar_mask(
    logits: Any, _l: int, mapping: Any, cu_logits: Any, bitmask: Any, _b: int, vocab_size: int, MASK_STRIDE: int, **_: Any
) -> None:
    rows, first = logits.numpy(), cu_logits.numpy()
    forbidden = np.unpackbits(bitmask.numpy().view(np.uint8), axis=1, bitorder="little")[:, :vocab_size] == 0
    for mask, index in zip(forbidden, mapping.tolist(), strict=True):
        request, position = divmod(index, MASK_STRIDE)
        if position < first[request + 1] - first[request]:
            rows[first[request] + position, mask] = float("-inf")


def _zero_blocks(addresses: Any, strides: Any, sizes: Any, blocks: Any, **_: Any) -> None:
    for address, stride, size in zip(addresses.tolist(), strides.tolist(), sizes.tolist(), strict=True):  # of 4 bytes each
        for block in blocks.tolist():
            ctypes.memset(address + 4 * block * stride, 0, 4 * size)


def _table(addresses: Any, strides: Any, group: int, rows: int) -> np.ndarray:
    """Return the block table of a group, int32 [rows, stride], whose address a kernel is given."""
    pointer = ctypes.cast(int(addresses[group]), ctypes.POINTER(ctypes.c_int32))
    return np.ctypeslib.as_array(pointer, (rows, int(strides[group])))


def _gather_tables(
    slots: Any, sources: Any, targets: Any, strides: Any, _n: Any, _s: int, rows: int, grid: tuple[int, ...], **_: Any
) -> None:
    slot = slots.numpy()
    for group in range(grid[0]):
        table = _table(targets, strides, group, grid[1])
        table[:rows] = _table(sources, strides, group, slot.max(initial=0) + 1)[slot]  # entries beyond a row's are never read
        table[rows:] = 0


def _slot_mappings(
    _most: int, slots: Any, starts: Any, positions: Any, addresses: Any, strides: Any, sizes: Any, enabled: Any, _d: Any,
    mappings: Any, _m: int, _r: int, PAD_ID: int, **_: Any,
) -> None:  # fmt: skip
    rows, first = slots.numpy(), starts.numpy()[: len(slots) + 1]
    total = first[-1]
    slot, position = np.repeat(rows, np.diff(first)), positions.numpy()[:total]
    for group, (mapping, size) in enumerate(zip(mappings.numpy(), sizes.tolist(), strict=True)):
        mapping[:] = PAD_ID
        if enabled[group]:
            blocks = _table(addresses, strides, group, rows.max(initial=0) + 1)[slot, position // size]
            mapping[:total] = np.where(slot >= 0, blocks.astype(np.int64) * size + position % size, PAD_ID)


def _apply_writes(
    target: Any, strides: Any, rows: Any, starts: Any, contents: Any, ends: Any, groups: Any, MULTI_GROUP: bool,
    grid: tuple[int, ...], **_: Any,
) -> None:  # fmt: skip
    begin, contents = 0, contents.numpy()
    whole = None if MULTI_GROUP else target.numpy().reshape(len(target), -1)
    for n in range(grid[0]):
        row, start, end = int(rows[n]), int(starts[n]), int(ends[n])
        table = _table(target, strides, int(groups[n]), row + 1) if whole is None else whole
        table[row, start : start + end - begin] = contents[begin:end]
        begin = end


# By module of vllm.v1.worker.
KERNELS: dict[str, dict[str, Callable[..., None]]] = {
    "gpu.input_batch": {
        "_prepare_prefill_inputs_kernel": _prefill_inputs,
        "_prepare_pos_seq_lens_kernel": _positions_and_lengths,
        "_combine_sampled_and_draft_tokens_kernel": _combine_tokens,
        "_expand_idx_mapping_kernel": _expand_mapping,
        "_get_num_sampled_and_rejected_kernel": _sampled_and_rejected,
        "_post_update_kernel": _post_update,
    },
    "gpu.block_table": {"_gather_block_tables_kernel": _gather_tables, "_compute_slot_mappings_kernel": _slot_mappings},
    "gpu.buffer_utils": {"_apply_write_kernel": _apply_writes},
    "gpu.structured_outputs": {"_apply_grammar_bitmask_kernel": _grammar_mask},
    "utils": {"_zero_kv_blocks_kernel": _zero_blocks},
}


class _Launcher:
    """A function in the place of a Triton kernel: ``kernel[grid](...)`` calls it once, with the grid as its last argument."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.function, grid=grid)


def install_kernels() -> None:
    """Replace the kernels of every step, once per process."""
    if not _is_cpu():
        return
    from importlib import import_module

    for module, kernels in KERNELS.items():
        for name, function in kernels.items():
            setattr(import_module(f"vllm.v1.worker.{module}"), name, _Launcher(function))
    # The kernel of top-k and top-p needs more than the interpreter has.
    vars(import_module("vllm.v1.sample.ops.topk_topp_sampler"))["HAS_TRITON"] = False
    RotaryEmbedding: Any = import_module("vllm.model_executor.layers.rotary_embedding.base").RotaryEmbedding
    RotaryEmbedding.forward_cpu = _rotate
    CPURouter: Any = import_module("vllm.model_executor.layers.fused_moe.router.cpu_router").CPURouter
    if CPURouter._compute_routing.__module__ != __name__:
        CPURouter._compute_routing = _with_bias(CPURouter._compute_routing)


def _rotate(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
    """Rotate queries and keys, whether their heads are a dimension of their own or not.

    Symptom: LFM2 is up to 0.9 nats off transformers and DeepSeek-V2 10, also in vLLM alone. Cause: vLLM's kernel for CPUs takes
    every head of queries [tokens, heads, head size] for a token, and gives it another token's position. Versions: 0.32. To be
    removed when the kernel knows heads (tests/test_vllm_contract.py).
    """
    if query.dim() > 2:
        return self.forward_native(positions, query, key)
    from vllm import _custom_ops as ops

    cache = self._match_cos_sin_cache_dtype(query)
    ops.rotary_embedding(positions, query, key, self.head_size, cache, self.is_neox_style)
    return query, key


def _with_bias(route: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``CPURouter._compute_routing`` that adds the bias of experts to softmax scores, too.

    Symptom: Ernie 4.5 MoE chooses other experts than in transformers, also in vLLM alone. Cause: on a CPU vLLM reads
    ``e_score_correction_bias`` with groups of experts only. Versions: 0.32. To be removed when it reads it without
    (tests/test_vllm_contract.py).
    """

    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.e_score_correction_bias is not None and self.scoring_func == "softmax" and not self.use_grouped_topk:
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1  # one group of all experts
        return route(self, *args, **kwargs)

    return routed


# -- the student's weights --------------------------------------------------------------------------------------------


def keep_weights() -> Any:
    """Load a model whose linear layers keep their weights beside the packed ones, so that a sync can load into them.

    Symptom: a shape mismatch in ``load_weights`` after the first load. Cause: on a CPU vLLM packs every linear layer for oneDNN
    and drops the original. Versions: 0.32. To be removed when vLLM can reload packed weights one tensor at a time.
    """
    if not _is_cpu():
        return nullcontext()
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    return mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: pack(layer, False))


def pack_weights(model: torch.nn.Module) -> None:
    """Pack the linear layers of a model that was loaded under :func:`keep_weights`, after new weights were loaded into it."""
    if not _is_cpu():
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, False)


def init_method_of_this_run(init_method: str) -> str:
    """Return an ``init_method`` that differs between the runs of one machine.

    Symptom: two runs under a launcher hang or mix their activations. Cause: on a CPU the ranks of a group exchange them in
    shared memory, which vLLM names after the text behind the last colon of ``init_method``: the same for every ``env://``.
    Versions: 0.32, 0.33. To be removed when the name has the port (tests/test_vllm_contract.py).
    """
    if not _is_cpu() or init_method != "env://":
        return init_method
    return f"{init_method}#:{os.environ['MASTER_PORT']}"  # torch reads no fragment


def keep_torch_threads() -> None:
    """Keep vLLM on a CPU from leaving this process's torch, and a trainer in it, with one thread.

    Unless OMP_NUM_THREADS is set, its worker sets torch to one thread and then makes ``torch.set_num_threads`` do nothing.
    """
    from vllm import envs

    if _is_cpu() and not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()
