"""Steady decoding in a worker: a forward pass that is the last one, one token on.

vLLM works out every step anew on the host: the batch's state, a dozen small uploads, slots, attention metadata, which graph to
replay. In steady decoding (the same requests in the same rows, each fed the token that it sampled) the device knows all of it:
positions grow by one, and where vLLM replays a CUDA graph of the whole model, everything around it reads and writes
memory that stays where it is, and is replayed too. Every other step is vLLM's own, to which these must be equivalent:
``tests/test_engine_async.py`` has vLLM prepare the same steps.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context

from osd.engine.steady import moves_blocks
from osd.kernels.graph import GraphPool, Replayed

# B rows of the batch, V the runner's vocabulary, H its hidden size.

_KEPT = 4  # batches whose graphs are kept; each holds its logits, [B, V]


@dataclass(kw_only=True)
class _Step:
    """A step of steady decoding that was run, and what the next one needs of it.

    Attributes:
        req_ids, computed: the requests in the scheduler's order, and how many tokens each had computed before the step.
        context, inputs: the forward pass as vLLM set it up: its forward context before it ran, and its arguments.
        state: what it left for the sampler, without the tensors.
        prepare: moves the device's inputs on; returns attention metadata (which a replayed graph of the model does not read).
        logits: [B, V] of hidden states [B, H].
    """

    req_ids: list[str]
    computed: list[int]
    context: Any
    inputs: dict[str, Any]
    state: Any
    prepare: Callable[[], Any]
    logits: Callable[[torch.Tensor], torch.Tensor]


class SteadyForward:
    """A runner's ``execute_model``, which moves the last step on where nothing else is new; ``advanced`` counts such steps."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.stock = runner.execute_model
        self.advanced = 0
        self._supported = _can_move_on(runner)
        self._pool = GraphPool() if self._supported and _can_capture(runner) else None
        self._replays: OrderedDict[Any, tuple[Replayed, Replayed]] = OrderedDict()
        self._step: _Step | None = None
        self._metadata: dict[str, Any] = {}
        self._context: Any = None
        self._inputs: dict[str, Any] = {}
        self._build, runner._build_attention_metadata = runner._build_attention_metadata, self._watched_build
        self._model, runner._model_forward = runner._model_forward, self._watched_model

    def __call__(self, scheduler_output: Any, *args: Any) -> Any:
        step, self._step = self._step, None  # a step that fails leaves nothing to go on from
        if step is not None and self._follows(step, scheduler_output):
            self._advance(step, scheduler_output)
            self._step = step
            return None
        self._context = None
        output = self.stock(scheduler_output, *args)
        if self._supported and output is None and self._context is not None and self._is_steady(scheduler_output):
            self._step = self._step_of(scheduler_output)
        return output

    def remove(self) -> None:
        """Give the runner its own methods back and keep nothing of its steps, which hold its graphs and their memory."""
        for name in ("execute_model", "_build_attention_metadata", "_model_forward"):
            vars(self.runner).pop(name, None)
        self._step = self._context = self._pool = None
        self._metadata, self._inputs = {}, {}
        self._replays.clear()

    # -- what vLLM's own step shows ---------------------------------------------------------------------------------

    def _watched_build(self, **kwargs: Any) -> Any:
        self._metadata = kwargs
        return self._build(**kwargs)

    def _watched_model(self, **kwargs: Any) -> Any:
        self._context, self._inputs = copy.copy(get_forward_context()), kwargs
        return self._model(**kwargs)

    def _is_steady(self, output: Any) -> bool:
        """Every row of the batch decoded one token."""
        rows = self.runner.input_batch.num_reqs
        return output.total_num_scheduled_tokens == rows == len(output.scheduled_cached_reqs.req_ids)

    def _step_of(self, output: Any) -> _Step:
        runner, cached = self.runner, output.scheduled_cached_reqs
        state, metadata = runner.execute_model_state, self._metadata
        rows = runner.input_batch.num_reqs

        def prepare() -> Any:
            self._move_on(rows)
            return self._build(**metadata)[0]

        compute_logits = runner.model.compute_logits
        step = _Step(
            req_ids=cached.req_ids,
            computed=cached.num_computed_tokens,
            context=self._context,
            inputs=self._inputs,
            state=state._replace(logits=None, hidden_states=None, sample_hidden_states=None),
            prepare=prepare,
            logits=compute_logits,
        )
        if self._pool is not None and self._context.cudagraph_runtime_mode == CUDAGraphMode.FULL:
            hidden_BH = state.hidden_states[:rows]
            key = (rows, self._context.batch_descriptor, hidden_BH.data_ptr())
            step.prepare, logits = self._replays_of(key, prepare, lambda: compute_logits(hidden_BH))
            step.logits = lambda _: logits()
        return step

    def _replays_of(self, key: Any, prepare: Callable[[], Any], logits: Callable[[], Any]) -> tuple[Replayed, Replayed]:
        if key not in self._replays:
            self._replays[key] = Replayed(prepare, self._pool), Replayed(logits, self._pool)
        self._replays.move_to_end(key)
        if len(self._replays) > _KEPT:
            # A batch that shrinks row by row passes through sizes that never get as far as a capture: they go first.
            oldest, *others = list(self._replays)[:-1]
            del self._replays[next((k for k in (oldest, *others) if not self._replays[k][0].captured), oldest)]
        return self._replays[key]

    # -- the next step ----------------------------------------------------------------------------------------------

    def _follows(self, step: _Step, output: Any) -> bool:
        """The same rows, each one position on, each fed the token that it sampled in the last step."""
        cached, batch = output.scheduled_cached_reqs, self.runner.input_batch
        return (
            output.total_num_scheduled_tokens == len(step.req_ids) == batch.num_reqs
            and cached.req_ids == step.req_ids
            and cached.num_computed_tokens == [computed + 1 for computed in step.computed]
            and not cached.resumed_req_ids
            and not output.finished_req_ids
            and not output.new_block_ids_to_zero
            and not moves_blocks(output)
            and batch.prev_sampled_token_ids is not None
            and len(batch.prev_req_id_to_index) == batch.num_reqs
        )

    def _advance(self, step: _Step, output: Any) -> None:
        runner, batch = self.runner, self.runner.input_batch
        rows, cached = batch.num_reqs, output.scheduled_cached_reqs
        with runner.synchronize_input_prep():
            self._update_batch(cached, rows)
            metadata = step.prepare()
            runner.input_ids.gpu[:rows].copy_(batch.prev_sampled_token_ids[:, 0], non_blocking=True)
        context = copy.copy(step.context)  # a pass may count in it
        context.attn_metadata = metadata
        with override_forward_context(context):
            hidden = self._model(**step.inputs)
        hidden_BH = hidden[:rows]
        runner.execute_model_state = step.state._replace(
            scheduler_output=output,
            logits=step.logits(hidden_BH),
            hidden_states=hidden,
            sample_hidden_states=hidden_BH,
        )
        runner.kv_connector_output = None
        step.computed = cached.num_computed_tokens
        self.advanced += 1

    def _update_batch(self, cached: Any, rows: int) -> None:
        """vLLM's books on the host, for the whole batch at once."""
        runner, batch = self.runner, self.runner.input_batch
        batch.num_computed_tokens_cpu[:rows] += 1
        runner.optimistic_seq_lens_cpu[:rows] += 1
        runner.discard_request_mask.np[:rows] = False
        new = [(req_id, block_ids) for req_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True) if block_ids]
        for req_id, block_ids in new:
            for known, added in zip(runner.requests[req_id].block_ids, block_ids, strict=True):
                known.extend(added)
            batch.block_table.append_row(block_ids, batch.req_id_to_index[req_id])
        if new:
            batch.block_table.commit_block_table(rows)
        batch.refresh_metadata()  # logits processors count the tokens

    def _move_on(self, rows: int) -> None:
        """The device's inputs, one position on."""
        runner = self.runner
        positions = runner.positions[:rows]
        torch._foreach_add_([positions, runner.num_computed_tokens[:rows], runner.seq_lens[:rows]], 1)
        runner.input_batch.block_table.compute_slot_mapping(rows, runner.query_start_loc.gpu[: rows + 1], positions)


def _can_move_on(runner: Any) -> bool:
    """Whether a step of this runner depends on nothing but what :class:`SteadyForward` moves on."""
    parallel = runner.parallel_config
    return runner.use_async_scheduling and not (
        runner.uses_mrope
        or getattr(runner, "uses_xdrope_dim", 0)  # gone in vLLM 0.31
        or runner.enable_prompt_embeds
        or runner.supports_mm_inputs
        or runner.is_pooling_model
        or runner.num_spec_tokens
        or runner.use_aux_hidden_state_outputs
        or runner.cascade_attn_enabled
        or runner.eplb_state is not None
        or getattr(runner, "calculate_kv_scales", False)  # gone in vLLM 0.31
        or getattr(runner, "routed_experts_initialized", False)
        or getattr(runner.model_config, "rswa_window", None) is not None
        or runner.model_config.is_encoder_decoder
        or runner.cache_config.kv_sharing_fast_prefill
        or parallel.data_parallel_size > 1
        or parallel.pipeline_parallel_size > 1
        or parallel.decode_context_parallel_size > 1
        or parallel.use_ubatching
        or len(runner.kv_cache_config.kv_cache_groups) != 1
    )


def _can_capture(runner: Any) -> bool:
    """Whether what surrounds the model is the same kernels on the same memory in every step.

    FlashAttention's metadata are: a schedule that the device makes from the sequence lengths. Other backends plan on the host.
    """
    spec = runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec
    groups = [group for of_cache in runner.attn_groups for group in of_cache]
    return (
        runner.device.type == "cuda"
        and runner.parallel_config.world_size == 1
        and getattr(spec, "sliding_window", None) is None
        and all(group.backend.get_name() == "FLASH_ATTN" for group in groups)
    )
