"""The numpy functions of osd/engine/backend/cpu.py against vLLM's own kernels, whose source runs in Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import wraps
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from osd.engine.backend import cpu
from osd.engine.backend import worker as _worker  # noqa: F401  (vLLM's CPU worker replaces buffers that need a GPU)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these functions run on a CPU only")

SLOTS, LONGEST, TOKENS, VOCAB, DRAFTS = 12, 64, 96, 50, 3


def fresh(module: str) -> ModuleType:
    """Return a copy of a module of vLLM's runner whose kernels are vLLM's own, whatever this process has replaced."""
    spec = importlib.util.find_spec(f"vllm.v1.worker.{module}")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


class Batch:
    """A random batch: rows in any slots that decode, prefill a piece, the rest or all of a prompt, or were preempted."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        rows = self.integer(1, 8)
        self.slots = torch.randperm(SLOTS, generator=self.generator)[:rows]
        self.prefill_len, self.computed = (torch.zeros(SLOTS, dtype=torch.int32) for _ in range(2))
        lengths = []
        for slot in range(SLOTS):
            self.prefill_len[slot] = prefill = self.integer(1, 40)  # a preempted row's includes what it has sampled
            kind = self.integer(0, 3)
            done = self.integer(prefill, 50) if kind == 0 else self.integer(0, prefill - 1)
            self.computed[slot] = done
            lengths.append(1 if kind == 0 else prefill - done if kind == 1 else self.integer(1, prefill - done))
        lengths = torch.tensor(lengths)[self.slots]
        padding = self.integer(0, 2)
        self.all_ids = self.integers(VOCAB, (SLOTS, LONGEST)).int()
        self.total_len = torch.maximum(self.prefill_len, self.computed + 1)
        self.seq_lens = torch.zeros(SLOTS, dtype=torch.int32)
        self.seq_lens[:rows] = self.computed[self.slots] + lengths
        # A row has drafts after its next token, and after a prompt whose last token it computes.
        ends = self.seq_lens[:rows] >= self.prefill_len[self.slots]
        drafts = torch.where(ends, self.integers(DRAFTS + 1, (rows,)), 0)
        self.seq_lens[:rows] += drafts
        lengths = lengths + drafts
        self.starts = torch.tensor([0, *lengths.cumsum(0), *[lengths.sum()] * padding], dtype=torch.int32)
        self.cu_num_logits = torch.tensor([0, *(drafts + 1).cumsum(0)], dtype=torch.int32)
        self.sampled = self.integers(VOCAB, (rows, DRAFTS + 1))
        self.ready = torch.minimum(self.integers(DRAFTS + 2, (rows,)), drafts + 1).int()

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def integers(self, below: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator)


def prefill_inputs(batch: Batch, wrapper: Callable) -> list[torch.Tensor]:
    input_ids = torch.full((TOKENS * 8,), -7, dtype=torch.int32)
    following = torch.full((1 + batch.integer(0, 1), SLOTS), -7, dtype=torch.int32)
    wrapper(input_ids, following, batch.slots, batch.starts, batch.all_ids, batch.prefill_len, batch.computed)
    return [input_ids, following]


def positions(batch: Batch, wrapper: Callable) -> list[torch.Tensor]:
    positions, seq_lens = torch.full((TOKENS * 8,), -7), torch.full((SLOTS,), -7, dtype=torch.int32)
    wrapper(batch.slots, batch.starts, batch.computed, positions, seq_lens)
    return [positions, seq_lens]


def combine(batch: Batch, wrapper: Callable) -> list[torch.Tensor]:
    input_ids, last = batch.integers(VOCAB, (TOKENS * 8,)).int(), batch.integers(VOCAB, (SLOTS, 1))
    drafts, logits = batch.integers(VOCAB, (SLOTS, DRAFTS)), int(batch.cu_num_logits[-1])
    indices = wrapper(
        input_ids, batch.slots, last, batch.starts, batch.seq_lens, batch.prefill_len, drafts, batch.cu_num_logits, logits
    )
    return [input_ids, indices]


def expand(batch: Batch, wrapper: Callable) -> list[torch.Tensor]:
    return list(wrapper(batch.slots, int(batch.cu_num_logits[-1]), batch.cu_num_logits, DRAFTS + 1))


def counts(batch: Batch, wrapper: Callable) -> list[torch.Tensor]:
    return list(wrapper(batch.ready.clone(), batch.seq_lens, batch.cu_num_logits, batch.slots, batch.prefill_len))


def post_update(batch: Batch, wrapper: Callable) -> list[torch.Tensor]:
    rejected = torch.where(batch.ready > 0, 0, batch.integers(2, batch.ready.shape)).int()
    skipped = batch.integers(4, batch.slots.shape) == 0
    bins = batch.integers(3, (SLOTS, VOCAB)).int() if batch.integer(0, 1) else None
    starts = batch.starts if batch.integer(0, 2) else None
    last = batch.integers(VOCAB, (SLOTS, 1))
    state = [batch.computed.clone(), last, batch.all_ids.clone(), batch.total_len.clone()]
    computed, last, all_ids, total_len = state
    slots = torch.where(skipped, -1, batch.slots)
    wrapper(slots, computed, last, bins, batch.sampled, batch.ready, rejected, starts, all_ids, total_len)
    return state if bins is None else [*state, bins]


# The function of vLLM's input_batch module that launches each kernel, and what calls it.
LAUNCHERS = {
    "_prepare_prefill_inputs_kernel": ("prepare_prefill_inputs", prefill_inputs),
    "_prepare_pos_seq_lens_kernel": ("prepare_pos_seq_lens", positions),
    "_combine_sampled_and_draft_tokens_kernel": ("combine_sampled_and_draft_tokens", combine),
    "_expand_idx_mapping_kernel": ("expand_idx_mapping", expand),
    "_get_num_sampled_and_rejected_kernel": ("get_num_sampled_and_rejected", counts),
    "_post_update_kernel": ("post_update", post_update),
}


def differing(kernel: str, function: Callable[..., None], seeds: int = 40) -> int:
    """Return in how many random batches a function's results differ from a kernel's."""
    wrapper, call = LAUNCHERS[kernel]
    stock, ours = fresh("gpu.input_batch"), fresh("gpu.input_batch")
    setattr(ours, kernel, cpu._Launcher(getattr(ours, kernel), function))
    different = 0
    for seed in range(seeds):
        expected, got = (call(Batch(seed), getattr(module, wrapper)) for module in (stock, ours))
        different += not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    return different


@pytest.mark.parametrize("kernel", LAUNCHERS)
def test_a_function_does_what_its_kernel_does(kernel):
    assert differing(kernel, cpu.KERNELS["gpu.input_batch"][kernel]) == 0


def test_ignored_prefills_and_skipped_rows_are_seen():
    """The planted errors: a row inside its prompt counts as sampled; rows with a negative slot are not skipped."""

    def no_prefill(num_sampled: np.ndarray, num_rejected: np.ndarray, cu_num_logits: np.ndarray) -> None:
        num_rejected[:] = np.diff(cu_num_logits) - num_sampled

    @wraps(cpu._post_update)
    def no_skipping(idx_mapping: np.ndarray, **rest: Any) -> None:
        cpu._post_update(np.abs(idx_mapping), **rest)

    assert differing("_get_num_sampled_and_rejected_kernel", no_prefill) > 10
    assert differing("_post_update_kernel", no_skipping) > 10


def test_grammar_masks_are_those_of_the_kernel(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    store = InterpreterBuilder.create_masked_store

    def with_boolean_mask(self, ptrs, value, mask, cache_policy):  # Triton 3.7's interpreter takes no other
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, cache_policy)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", with_boolean_mask)
    kernel = fresh("gpu.structured_outputs")._apply_grammar_bitmask_kernel
    found = 0
    for seed in range(20):
        batch = Batch(seed)
        rows = len(batch.slots)
        masked = torch.randperm(rows, generator=batch.generator)[: batch.integer(1, rows)].int() * (DRAFTS + 1)
        masked += batch.integers(DRAFTS + 1, masked.shape).int()
        bitmask = batch.integers(2**31, (len(masked), (VOCAB + 31) // 32)).int()
        logits = [torch.zeros(int(batch.cu_num_logits[-1]), VOCAB) for _ in range(2)]
        for out, launcher in zip(logits, (kernel, cpu._Launcher(kernel, cpu._grammar_mask)), strict=True):
            arguments = (out, out.stride(0), masked, batch.cu_num_logits, bitmask, bitmask.stride(0), VOCAB)
            launcher[(len(masked), 1)](*arguments, MASK_STRIDE=DRAFTS + 1, BLOCK_SIZE=64)
        found += int(logits[0].isinf().any())
        assert torch.equal(*logits)
    assert found > 10


def test_blocks_are_zeroed_as_by_the_kernel():
    """Two layers with pages of different sizes, the second with a gap between them."""
    kernel, caches = fresh("utils")._zero_kv_blocks_kernel, []
    blocks, strides, sizes = torch.tensor([5, 0, 2]), torch.tensor([40, 64]), torch.tensor([40, 50])
    for launcher in (kernel, cpu._Launcher(kernel, cpu._zero_blocks)):
        cache = torch.arange(1.0, 1000.0)
        starts = cache.data_ptr() + 4 * torch.tensor([3, 300])
        launcher[(3, 2, 2)](starts.to(torch.uint64), strides, sizes, blocks, BLOCK_SIZE=32)
        caches.append(cache)
    assert int((caches[0] == 0).sum()) == 3 * (40 + 50)
    assert torch.equal(*caches)


def with_functions(module: str) -> ModuleType:
    """Return a copy of a module of vLLM's runner whose kernels are our functions."""
    copy = fresh(module)
    for name, function in cpu.KERNELS[module].items():
        setattr(copy, name, cpu._Launcher(getattr(copy, name), function))
    return copy


def block_tables(batch: Batch, sizes: list[int]) -> list[Any]:
    """Return the same block tables twice, with random blocks for every slot: with vLLM's kernels and with our functions."""
    both = []
    for module in (fresh("gpu.block_table"), with_functions("gpu.block_table")):
        enabled = [group != 2 for group in range(len(sizes))]
        blocks = [LONGEST // size for size in sizes]
        tables = module.BlockTables(sizes, SLOTS, TOKENS * 8, blocks, torch.device("cpu"), slot_mapping_enabled=enabled)
        both.append(tables)
    for group, (ours, theirs) in enumerate(zip(*(tables.block_tables for tables in both), strict=True)):
        ours.gpu.copy_(batch.integers(1000, ours.gpu.shape))
        theirs.gpu.copy_(ours.gpu)
        for tables in both:
            tables.num_blocks.np[group] = batch.computed.numpy() // sizes[group] + 1
            tables.num_blocks.copy_to_uva()
    return both


GROUPS = pytest.mark.parametrize("sizes", [[8], [4, 16, 8]], ids=["one group", "three groups"])


@GROUPS
def test_block_tables_are_gathered_as_by_the_kernel(sizes):
    for seed in range(20):
        batch = Batch(seed)
        rows, padded = len(batch.slots), len(batch.slots) + batch.integer(0, 3)
        used = [(batch.computed[batch.slots].long() // size + 1).tolist() for size in sizes]
        stock, ours = (tables.gather_block_tables(batch.slots, padded) for tables in block_tables(batch, sizes))
        for got, expected, blocks in zip(ours, stock, used, strict=True):
            assert got.shape == expected.shape
            assert torch.equal(got[rows:], expected[rows:])
            for row, count in enumerate(blocks):  # entries beyond a row's blocks are never read
                assert torch.equal(got[row, :count], expected[row, :count])


@GROUPS
def test_slot_mappings_are_computed_as_by_the_kernel(sizes):
    for seed in range(20):
        batch = Batch(seed)
        positions, seq_lens = torch.zeros(TOKENS * 8, dtype=torch.int64), torch.zeros(SLOTS, dtype=torch.int32)
        fresh("gpu.input_batch").prepare_pos_seq_lens(batch.slots, batch.starts, batch.computed, positions, seq_lens)
        slots = torch.where(batch.integers(4, batch.slots.shape) == 0, -1, batch.slots)
        arguments = (slots, batch.starts[: len(slots) + 1], positions, int(batch.starts[-1]) + 3)
        stock, ours = both = block_tables(batch, sizes)
        for tables in both:
            tables.slot_mappings.fill_(-7)
        assert torch.equal(*(tables.compute_slot_mappings(*arguments) for tables in both))
        assert torch.equal(stock.slot_mappings, ours.slot_mappings)


TOGETHER = [(SLOTS, 7), (SLOTS, LONGEST)]  # the block tables of several groups are written at once


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [*product([[(SLOTS, LONGEST)], [SLOTS]], [torch.int32, torch.int64, torch.float32]), (TOGETHER, torch.int32)],
    ids=str,
)
def test_staged_writes_are_applied_as_by_the_kernel(shapes, dtype):
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

    modules = fresh("gpu.buffer_utils"), with_functions("gpu.buffer_utils")
    for seed in range(10):
        batch, results = Batch(seed), []
        initial = [batch.integers(VOCAB, shape if isinstance(shape, tuple) else (shape,)) for shape in shapes]
        for module in modules:
            module.UvaBuffer = UvaBuffer
            tensors = [module.StagedWriteTensor(shape, dtype=dtype, device=torch.device("cpu")) for shape in shapes]
            for tensor, shape, values in zip(tensors, shapes, initial, strict=True):
                tensor.gpu.copy_(values)
                for row in batch.slots.tolist():
                    if isinstance(shape, int):
                        tensor.stage_write_elem(row, row + seed)
                    else:
                        tensor.stage_write(row, row % 4, list(range((seed + row) % 4)))
            if len(tensors) == 1:
                tensors[0].apply_write()
            else:
                addresses = torch.tensor([tensor.gpu.data_ptr() for tensor in tensors], dtype=torch.uint64)
                strides = torch.tensor([tensor.gpu.stride(0) for tensor in tensors])
                module.FusedStagedWriter(torch.device("cpu"), 99).apply(tensors, addresses, strides)
            results.append([tensor.gpu for tensor in tensors])
        for stock, ours in zip(*results, strict=True):
            assert torch.equal(stock, ours)
