"""Support for vLLM's model runner V2 on a CPU; nothing here acts on a GPU.

The runner does its bookkeeping in Triton kernels, and Triton's interpreter takes a third of a second for those of one step. So
numpy functions with the same arguments replace the kernels of every step; tests/test_cpu_kernels.py compares them with the
kernels' source in the interpreter. The rarely used kernels (penalties, logit bias, bad words, min-p) stay interpreted.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy import ndarray as Array


def prepare() -> None:
    """Let vLLM use Triton on this CPU; call it before the modules of vLLM's model runner are imported.

    vLLM takes Triton on a CPU only with a "cpu" backend, which the published Triton lacks; the interpreter stands in for it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        # If Triton was imported before, its functions were made for a GPU and cannot run here.
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
# A function has those parameters of its kernel that it needs, under the kernel's names without `_ptr`.


def _prefill_inputs(
    input_ids: Array, next_prefill_tokens: Array, num_lookahead: int, idx_mapping: Array, query_start_loc: Array,
    all_token_ids: Array, prefill_lens: Array, num_computed_tokens: Array,
) -> None:  # fmt: skip
    first = query_start_loc.tolist()
    slots = zip(idx_mapping, num_computed_tokens[idx_mapping], prefill_lens[idx_mapping], strict=True)
    for row, (slot, done, length) in enumerate(slots):
        if done >= length:
            continue
        end = done + first[row + 1] - first[row]
        input_ids[first[row] : first[row + 1]] = all_token_ids[slot, done:end]
        for n in range(num_lookahead):
            next_prefill_tokens[n, slot] = all_token_ids[slot, end + n] if end + n < length else 0


def _positions_and_lengths(
    pos: Array, seq_lens: Array, idx_mapping: Array, query_start_loc: Array, num_computed_tokens: Array
) -> None:
    rows = len(idx_mapping)
    done, length = num_computed_tokens[idx_mapping], np.diff(query_start_loc[: rows + 1])
    seq_lens[:rows] = done + length
    seq_lens[rows:] = 0
    total = query_start_loc[rows]
    pos[:total] = np.arange(total) + np.repeat(done.astype(np.int64) - query_start_loc[:rows], length)


def _combine_tokens(
    input_ids: Array, idx_mapping: Array, last_sampled_tokens: Array, query_start_loc: Array, seq_lens: Array,
    prefill_len: Array, draft_tokens: Array, cu_num_logits: Array, logits_indices: Array,
) -> None:  # fmt: skip
    rows = len(idx_mapping)
    end, logits = query_start_loc[1 : rows + 1].astype(np.int64), np.diff(cu_num_logits[: rows + 1])
    place = np.arange(logits.sum()) - np.repeat(np.cumsum(logits) - logits, logits)
    logits_indices[:] = np.repeat(end - logits, logits) + place
    length, prefill = seq_lens[:rows], prefill_len[idx_mapping]
    decoding = (length > prefill) & (length - logits >= prefill)
    input_ids[(end - logits)[decoding]] = last_sampled_tokens[idx_mapping[decoding], 0]
    for row in np.flatnonzero((length > prefill) & (logits > 1)):
        input_ids[end[row] - logits[row] + 1 : end[row]] = draft_tokens[idx_mapping[row], : logits[row] - 1]


def _expand_mapping(idx_mapping: Array, expanded_idx_mapping: Array, expanded_local_pos: Array, cu_num_logits: Array) -> None:
    first = cu_num_logits[: len(idx_mapping) + 1]
    logits, total = np.diff(first), first[-1]
    expanded_idx_mapping[:total] = np.repeat(idx_mapping, logits)
    expanded_local_pos[:total] = np.arange(total) - np.repeat(first[:-1], logits)


def _sampled_and_rejected(
    num_sampled: Array, num_rejected: Array, seq_lens: Array, cu_num_logits: Array, idx_mapping: Array, prefill_len: Array
) -> None:
    rows = len(idx_mapping)
    in_prefill = seq_lens[:rows] < prefill_len[idx_mapping]
    num_sampled[:rows][in_prefill] = 0
    num_rejected[:rows] = np.where(in_prefill, 0, np.diff(cu_num_logits[: rows + 1]) - num_sampled[:rows])


def _post_update(
    idx_mapping: Array, num_computed_tokens: Array, last_sampled_tokens: Array, output_bin_counts: Array | None,
    sampled_tokens: Array, num_sampled: Array, num_rejected: Array, query_start_loc: Array | None, all_token_ids: Array,
    total_len: Array,
) -> None:  # fmt: skip
    rows, real = len(idx_mapping), idx_mapping >= 0
    delta = (0 if query_start_loc is None else np.diff(query_start_loc[: rows + 1])) - num_rejected[:rows]
    num_computed_tokens[idx_mapping[real]] += delta[real]
    kept = num_sampled[:rows]
    for place in range(int(kept.max(initial=0))):
        has = real & (kept > place)
        drawn, new = idx_mapping[has], sampled_tokens[has, place]
        last_sampled_tokens[drawn, 0] = new
        all_token_ids[drawn, total_len[drawn]] = new
        total_len[drawn] += 1
        if output_bin_counts is not None:
            output_bin_counts[drawn, new] += 1


def _grammar_mask(
    logits: Array, logits_indices: Array, cu_num_logits: Array, bitmask: Array, vocab_size: int, MASK_STRIDE: int
) -> None:
    forbidden = np.unpackbits(bitmask.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size] == 0
    for mask, index in zip(forbidden, logits_indices.tolist(), strict=True):
        request, position = divmod(index, MASK_STRIDE)
        if position < cu_num_logits[request + 1] - cu_num_logits[request]:
            logits[cu_num_logits[request] + position, mask] = float("-inf")


def _zero_blocks(seg_addrs: Array, seg_block_strides: Array, seg_page_sizes: Array, block_ids: Array) -> None:
    for address, stride, size in zip(seg_addrs.tolist(), seg_block_strides.tolist(), seg_page_sizes.tolist(), strict=True):
        for block in block_ids.tolist():
            ctypes.memset(address + 4 * block * stride, 0, 4 * size)


def _table(addresses: Array, strides: Array, group: int, rows: int) -> Array:
    """Return the block table of a group, int32 [rows, stride], whose address a kernel is given."""
    pointer = ctypes.cast(int(addresses[group]), ctypes.POINTER(ctypes.c_int32))
    return np.ctypeslib.as_array(pointer, (rows, int(strides[group])))


def _gather_tables(
    batch_idx_to_req_idx: Array, src_block_table_ptrs: Array, dst_block_table_ptrs: Array, block_table_strides: Array,
    num_reqs: int, grid: tuple[int, ...],
) -> None:  # fmt: skip
    slots = batch_idx_to_req_idx
    for group in range(grid[0]):
        source = _table(src_block_table_ptrs, block_table_strides, group, slots.max(initial=0) + 1)
        target = _table(dst_block_table_ptrs, block_table_strides, group, grid[1])
        target[:num_reqs] = source[slots]  # entries beyond a row's blocks are never read
        target[num_reqs:] = 0


def _slot_mappings(
    idx_mapping: Array, query_start_loc: Array, pos: Array, block_table_ptrs: Array, block_table_strides: Array,
    block_sizes: Array, slot_mapping_enabled: Array, slot_mappings: Array, PAD_ID: int,
) -> None:  # fmt: skip
    total = query_start_loc[len(idx_mapping)]
    slot, position = np.repeat(idx_mapping, np.diff(query_start_loc[: len(idx_mapping) + 1])), pos[:total]
    slot_mappings[:] = PAD_ID
    for group in np.flatnonzero(slot_mapping_enabled):
        table, size = _table(block_table_ptrs, block_table_strides, group, idx_mapping.max(initial=0) + 1), block_sizes[group]
        places = table[slot, position // size].astype(np.int64) * size + position % size
        slot_mappings[group, :total] = np.where(slot >= 0, places, PAD_ID)


def _apply_writes(
    output: Array, output_stride: Any, write_indices: Array, write_starts: Array, write_contents: Array, write_cu_lens: Array,
    write_group_ids: Array | None, grid: tuple[int, ...],
) -> None:  # fmt: skip
    begin = 0
    for n in range(grid[0]):
        row, start, end = write_indices[n], write_starts[n], write_cu_lens[n]
        if write_group_ids is None:
            table = output.reshape(len(output), -1)
        else:
            table = _table(output, output_stride, write_group_ids[n], row + 1)
        table[row, start : start + end - begin] = write_contents[begin:end]
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
    """A function in the place of a Triton kernel: ``kernel[grid](...)`` calls it once, with numpy views of the tensors."""

    def __init__(self, kernel: Any, function: Callable[..., None]) -> None:
        self.function, self.taken = function, inspect.signature(function).parameters
        self.names = [name.removesuffix("_ptr") for name in kernel.arg_names]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(self.names, args, strict=False)), **kwargs, "grid": grid}
            arguments = ((name, given[name]) for name in self.taken)
            self.function(**{name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in arguments})

        return launch


def install_kernels() -> None:
    """Replace the kernels of every step, once per process."""
    if not _is_cpu():
        return
    from importlib import import_module

    for path, kernels in KERNELS.items():
        module = import_module(f"vllm.v1.worker.{path}")
        for name, function in kernels.items():
            if not isinstance(kernel := getattr(module, name), _Launcher):
                setattr(module, name, _Launcher(kernel, function))
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


def unpack_weights(model: torch.nn.Module) -> None:
    """Restore the convolutions of recurrent layers, which vLLM packs in place in bfloat16, before new weights are loaded."""
    for module in model.modules():
        if (unpacked := getattr(module, "_cpu_unpacked_conv_weight", None)) is not None:
            module.weight.data = unpacked[:, None]


def pack_weights(model: torch.nn.Module) -> None:
    """Pack the linear layers and convolutions of a model loaded under :func:`keep_weights`, after new weights were loaded."""
    if not _is_cpu():
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if hasattr(module, "cpu_linear") or hasattr(module, "_cpu_unpacked_conv_weight"):
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
    """Keep this process's number of torch threads, which a trainer in it needs, when vLLM starts on a CPU.

    Unless OMP_NUM_THREADS is set, vLLM's worker sets torch to one thread and makes ``torch.set_num_threads`` do nothing.
    """
    from vllm import envs

    if _is_cpu() and not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()
