"""The recurrent states of a student that drafts: a copy after each of its passes, and the way back to one of them.

A KV cache goes back by a token when the next one overwrites it; a state has taken the token up. So each request gets a block
for its running state and one more per draft, and the running state is copied to one of them after each pass but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.kv_cache_interface import MambaSpec


def with_copies(specs: dict[str, Any], drafts: int) -> dict[str, Any]:
    """Return the cache specs of a model's layers, with ``drafts`` more blocks per request for each recurrent state."""
    return {
        name: replace(spec, num_speculative_blocks=drafts) if isinstance(spec, MambaSpec) else spec
        for name, spec in specs.items()
    }


class RecurrentStates:
    """The states of one model runner, by request slot. ``S`` requests.

    Column 0 of a slot's block table is its running state, which is all that the model sees of it; column n is the copy after n
    tokens of a cycle.
    """

    def __init__(self, runner: Any) -> None:
        layers = runner.vllm_config.compilation_config.static_forward_context
        groups = [[layers[name] for name in group.layer_names] for group in runner.kv_cache_config.kv_cache_groups]
        recurrent = [isinstance(group[0], MambaBase) for group in groups]
        tables = runner.block_tables.block_tables
        self._groups = [
            (table.gpu, [state for mixer in mixers for state in mixer.kv_cache])
            for mixers, table, has_states in zip(groups, tables, recurrent, strict=True)
            if has_states
        ]
        if self._groups:
            prepare = runner.model_state.prepare_attn
            runner.model_state.prepare_attn = partial(_with_running_states, prepare, recurrent)

    def keep(self, slot_S: torch.Tensor, tokens: int) -> None:
        """Copy the running states, which have taken up ``tokens`` tokens of this cycle."""
        self._copy(slot_S, 0, tokens)

    def restore(self, slot_S: torch.Tensor, tokens_S: torch.Tensor) -> None:
        """Set the running states to the copies after ``tokens_S`` tokens of this cycle; 0 leaves them as they are."""
        self._copy(slot_S, tokens_S, 0)

    def _copy(self, slot_S: torch.Tensor, source: torch.Tensor | int, target: int) -> None:
        for table, states in self._groups:
            source_S, target_S = table[slot_S, source].long(), table[slot_S, target].long()
            for state in states:
                state[target_S] = state[source_S]


def _with_running_states(
    prepare: Callable[..., Any],
    recurrent: list[bool],
    batch: Any,
    mode: Any,
    tables: Sequence[torch.Tensor],
    *rest: Any,
    **more: Any,
) -> Any:
    """Call a runner's ``prepare_attn`` without the copies: some of vLLM's kernels read a wide block table as a narrow one."""
    narrow = tuple(
        table[:, :1].contiguous() if has_states else table for table, has_states in zip(tables, recurrent, strict=True)
    )
    return prepare(batch, mode, narrow, *rest, **more)
