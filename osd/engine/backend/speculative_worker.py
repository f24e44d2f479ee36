"""SpeculativeWorker: a pair whose student drafts several tokens, which the teacher verifies in one pass.

One cycle: the student runs once per draft and once more, one token at a time; the teacher runs once over each request's next
token and its drafts; the sampler decides; both runners' state goes back by what was rejected (a student's recurrent
layers: to a copy, see `RecurrentStates`). The last pass of the student, whose draft the teacher does not read, runs beside the
teacher's. Nothing of this waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from osd.engine.backend.configuration import chooses_drafts, most_drafts
from osd.engine.backend.recurrent_states import RecurrentStates, with_copies
from osd.engine.backend.sampler import StepInputs, counts, sampler_output
from osd.engine.backend.scheduler import PairStep
from osd.engine.backend.speculative_sampler import SpeculativeSampler
from osd.engine.backend.worker import PairWorker
from osd.engine.mixture import take
from osd.engine.positions import CycleAligner, CycleAlignment

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput

# B rows of the teacher's batch, S rows of a pass of the student, N positions that the teacher scores, H hidden.

_BYTES_PER_LOGIT = 20  # of a position: of both models, log q*, what acts on it


@dataclass(frozen=True, kw_only=True)
class PassRows:
    """The rows of one pass of the student, before it runs. Tensors are on the device.

    Attributes:
        temperature_S, seed_S: float32 and int64.
        ready_S: 1 where a row is sampled, else 0, int32.
        rejected_S: zeros, int32, where every row is sampled; None: the device counts rejected tokens.
        goes_on: the rows that have another pass, int64, and the teacher's slots of their requests; None if no row has one.
    """

    temperature_S: torch.Tensor
    seed_S: torch.Tensor
    ready_S: torch.Tensor
    rejected_S: torch.Tensor | None
    goes_on: tuple[torch.Tensor, torch.Tensor] | None


@dataclass
class Cycle:
    """The student's half of a cycle.

    Attributes:
        drafts: how many drafts a request has.
        ids, logits, tokens: the requests, raw logits and drafts of each pass.
        slots: the student's slots of the rows of the first pass.
        drafting: those of its rows that have drafts, int64; None: no row has.
        counts: their (num_sampled, num_rejected) before any draft.
    """

    drafts: dict[str, int] = field(default_factory=dict)
    ids: list[list[str]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)
    slots: torch.Tensor | None = None
    drafting: torch.Tensor | None = None
    counts: tuple[torch.Tensor, torch.Tensor] | None = None


class SpeculativeWorker(PairWorker):
    """`PairWorker` with drafts."""

    sampler_class = SpeculativeSampler
    aligner_class = CycleAligner
    sampler: SpeculativeSampler
    aligner: CycleAligner
    _cycle: Cycle | None = None  # None: a step as without speculation
    _main_stream: torch.cuda.Stream | None = None

    def init_device(self) -> None:
        super().init_device()
        self._pass_rows: dict[int, tuple[Any, PassRows]] = {}
        # Before the teacher's model is built, so that its graphs and buffers have room for the drafts.
        runner, drafts = self.model_runner, most_drafts(self.vllm_config)
        runner.num_speculative_steps = runner.req_states.num_speculative_steps = drafts
        slots = len(runner.req_states.draft_tokens)
        runner.req_states.draft_tokens = torch.zeros(slots, drafts, dtype=torch.int64, device=self.device)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        carried = super().get_kv_cache_spec()
        self.student_cache.specs.update(with_copies(self.student_cache.specs, most_drafts(self.vllm_config)))
        return carried

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self.student_states = RecurrentStates(self.student_runner)

    def determine_available_memory(self) -> int:
        """Return bytes for the teacher's KV cache, less the logits of all positions, which vLLM's profile does not know of."""
        available = super().determine_available_memory()
        if self.device.type != "cuda" or self.cache_config.kv_cache_memory_bytes is not None:
            return available
        positions = self.scheduler_config.max_num_seqs * (1 + most_drafts(self.vllm_config))
        return available - positions * self.model_config.get_vocab_size() * _BYTES_PER_LOGIT

    def compile_or_warm_up_model(self) -> Any:
        if chooses_drafts(self.vllm_config):
            _graphs_for_all(self.model_runner.cudagraph_manager, most_drafts(self.vllm_config))
        times = super().compile_or_warm_up_model()  # with masks for all drafts
        self.model_runner.structured_outputs_worker.mask_stride = 1  # a request with a grammar has no drafts
        return times

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        self._main_stream = None if self.student_stream is None else torch.cuda.current_stream()
        return super().execute_model(scheduler_output)

    # -- the student's passes ---------------------------------------------------------------------------------------

    def _without_drafts(self, step: PairStep) -> bool:
        """Return whether a step may run as without speculation, which is faster; only where seeds need not give the same."""
        limited = any(self.requests[i].options.mix_tokens is not None for i in step.ready)
        return chooses_drafts(self.vllm_config) and not limited and not step.student_output.scheduled_spec_decode_tokens

    def _student_forward(self, step: PairStep) -> None:
        if self._without_drafts(step):
            self._cycle = None
            super()._student_forward(step)
            return
        runner, output = self.student_runner, step.student_output
        cycle = self._cycle = Cycle(drafts={i: len(drafts) for i, drafts in output.scheduled_spec_decode_tokens.items()})
        for place, one_token_each in enumerate(passes(output)):
            runner.execute_model(one_token_each)
            state = runner.execute_model_state
            if state is None:
                return  # the student has nothing to compute
            batch, rows = state.input_batch, self._rows(cycle, place, state.input_batch, step)
            if place == 0:
                cycle.slots = batch.idx_mapping
                cycle.drafting = None if rows.goes_on is None else rows.goes_on[0]
                cycle.counts = counts(runner.req_states, batch, rows.ready_S, rows.rejected_S)
            starts = batch.query_start_loc[: batch.num_reqs + 1]
            runner.req_states.num_computed_tokens.gpu.index_add_(0, batch.idx_mapping, starts.diff())
            cycle.ids.append(batch.req_ids)
            if step.ready:
                cycle.logits.append(runner.model.compute_logits(state.hidden_states[batch.logits_indices]))
                self._draft(cycle, place, batch, rows)

    def _draft(self, cycle: Cycle, place: int, batch: InputBatch, rows: PassRows) -> None:
        """Draw a pass's drafts, and hand them to the student's next pass and to the teacher's."""
        length_S = batch.seq_lens[: batch.num_reqs]
        token_S = self.sampler.draft(cycle.logits[-1], rows.temperature_S, rows.seed_S, length_S, place)
        cycle.tokens.append(token_S)
        if rows.goes_on is None:
            return
        index, teacher_slots = rows.goes_on
        self.student_states.keep(batch.idx_mapping[index], place + 1)
        self.student_runner.req_states.last_sampled_tokens[batch.idx_mapping[index], 0] = token_S[index]
        self.model_runner.req_states.draft_tokens[teacher_slots, place] = token_S[index]
        if self._main_stream is not None:
            self._main_stream.wait_stream(torch.cuda.current_stream())  # for the drafts so far

    def _rows(self, cycle: Cycle, place: int, batch: InputBatch, step: PairStep) -> PassRows:
        """Return the rows of a pass: the same object while the batch does not change, because small uploads stall a GPU."""
        drafts, slots = cycle.drafts, self.model_runner.req_states.req_id_to_index
        further = [row for row, i in enumerate(batch.req_ids) if drafts.get(i, 0) > place]
        teacher_slots = [slots[batch.req_ids[row]] for row in further]
        key = (batch.req_ids, step.ready, further, teacher_slots)
        if (kept := self._pass_rows.get(place)) is None or kept[0] != key:
            requests = [self.requests.get(i) for i in batch.req_ids]  # None: the teacher has not begun it yet
            ready = [int(i in step.ready) for i in batch.req_ids]

            def tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
                return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

            rows = PassRows(
                temperature_S=tensor([1.0 if r is None else r.temperature for r in requests], torch.float32),
                seed_S=tensor([0 if r is None else r.seed for r in requests], torch.int64),
                ready_S=tensor(ready, torch.int32),
                rejected_S=tensor([0] * len(ready), torch.int32) if all(ready) else None,
                goes_on=(tensor(further, torch.int64), tensor(teacher_slots, torch.int64)) if further else None,
            )
            self._pass_rows[place] = kept = key, rows
        return kept[1]

    # -- the verdict ------------------------------------------------------------------------------------------------

    def _align(self, batch: InputBatch | None) -> Any:
        if (cycle := self._cycle) is None:
            return super()._align(batch)
        assert self._step is not None
        return self.aligner.align_cycle(
            [] if batch is None else batch.req_ids,
            cycle.drafts,
            cycle.ids,
            self._step.ready,
            self.requests,
        )

    def _sample(
        self, hidden_states: torch.Tensor, batch: InputBatch, grammar_output: Any
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Decide a cycle; stands in the place of the teacher runner's ``sample``."""
        runner = self.model_runner
        if self._step is None:
            return self._warm_up_step(hidden_states, batch, grammar_output)
        if (cycle := self._cycle) is None:
            return super()._sample(hidden_states, batch, grammar_output)
        alignment: CycleAlignment = self._align(batch)
        hidden_NH = hidden_states[batch.logits_indices]
        teacher = runner.model.compute_logits(hidden_NH)
        self._join_student()
        if alignment.positions.num_ready:
            inputs = StepInputs(
                teacher=teacher,
                student=torch.cat(cycle.logits) if cycle.logits else None,
                alignment=alignment.positions,
                batch=batch,
                constrain=self._constraint(batch),
            )
            outputs = self.sampler.verify(inputs, alignment, torch.cat(cycle.tokens) if cycle.tokens else None)
        else:
            outputs = self.sampler.nothing(teacher, alignment)
        self._outputs = alignment, outputs  # type: ignore[assignment]
        verdict = outputs.verdict
        drafts = {"kept_B": verdict.kept_N, "origin_B1": verdict.origin_N[:, None]}
        self._record(alignment.recorded_ids, alignment.positions, outputs.positions, hidden_NH, **drafts)
        kept_B = verdict.kept_B.int() * alignment.requests.ready_B
        num_sampled, num_rejected = counts(runner.req_states, batch, kept_B, None)
        tokens = replace(outputs.positions, token_B=verdict.token_BW)
        if self._step.returned:
            logprobs = self._with_record(tokens, hidden_NH)
            first = batch.cu_num_logits_np.tolist() if batch.num_draft_tokens else None
            tokens = replace(tokens, logprobs=logprobs._replace(cu_num_generated_tokens=first))
        return sampler_output(tokens, num_sampled, num_rejected), num_sampled, num_rejected

    def _warm_up_step(
        self, hidden_states: torch.Tensor, batch: InputBatch, grammar_output: Any
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Return the sample of a warm-up step: one token per request, all drafts rejected. vLLM's sampler takes no drafts."""
        if not batch.num_draft_tokens:
            return super()._sample(hidden_states, batch, grammar_output)
        ones = torch.ones(batch.num_reqs, dtype=torch.int32, device=self.device)
        num_sampled, num_rejected = counts(self.model_runner.req_states, batch, ones, None)
        output = SamplerOutput(
            sampled_token_ids=ones[:, None].long(),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
        return output, num_sampled, num_rejected

    def _finish_step(self, alignment: Any, outputs: Any) -> None:
        """Write the kept tokens into the student's state, and take it back by the rejected ones."""
        runner, cycle = self.student_runner, self._cycle
        if cycle is None:
            super()._finish_step(alignment, outputs)
            return
        runner.execute_model_state = None
        if cycle.slots is None or cycle.counts is None:
            return  # the student had nothing to compute
        num_sampled, num_rejected = cycle.counts
        if outputs is not None and alignment.positions.num_ready:
            source = alignment.requests.source_S
            tokens, kept_S = take(outputs.verdict.token_BW, source), take(outputs.verdict.kept_B, source).int()
            num_rejected = num_rejected + num_sampled * (1 + alignment.drafts_S - kept_S)
            num_sampled = num_sampled * kept_S
            if (row_S := cycle.drafting) is not None:
                # With every draft kept the running state is the right one, and has no copy.
                back_S = torch.where(kept_S <= alignment.drafts_S, kept_S, 0)
                self.student_states.restore(cycle.slots[row_S], back_S[row_S])
        else:
            tokens = torch.zeros(len(cycle.slots), 1, dtype=torch.int64, device=self.device)
        runner.postprocess_sampled(cycle.slots, tokens, num_sampled, num_rejected)


def _graphs_for_all(graphs: Any, most: int) -> None:
    """Make a CUDA graph manager capture batches with 0, 1, ... ``most`` drafts each; by itself it captures ``most`` alone.

    vLLM does so for a draft model whose number of drafts depends on the batch size, which a pair does not have.
    """
    varying = SimpleNamespace(
        uses_dynamic_speculative_decoding=lambda: True,
        num_speculative_tokens=most,
        num_speculative_tokens_per_batch_size=None,
    )
    graphs._candidates.clear()
    graphs._capture_descs.clear()
    with (
        mock.patch.object(graphs.vllm_config, "speculative_config", varying),
        mock.patch.object(cudagraph_utils, "build_dynamic_sd_schedule_lookup", return_value=range(-1, most + 1)),
    ):
        graphs._init_candidates()


def passes(output: SchedulerOutput) -> list[SchedulerOutput]:
    """Split a step of the student into passes of one token for each request that has drafts.

    The first pass is the step without drafts. Blocks for all drafts are allocated with it.
    """
    drafts = {i: len(tokens) for i, tokens in output.scheduled_spec_decode_tokens.items()}
    if not drafts:
        return [output]
    computed = dict(zip(output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True))
    split = [
        replace(
            output,
            num_scheduled_tokens={i: count - drafts.get(i, 0) for i, count in output.num_scheduled_tokens.items()},
            total_num_scheduled_tokens=output.total_num_scheduled_tokens - sum(drafts.values()),
            scheduled_spec_decode_tokens={},
        )
    ]
    for place in range(1, max(drafts.values()) + 1):
        ids = [i for i, count in drafts.items() if count >= place]
        further = SchedulerOutput.make_empty()
        further.num_scheduled_tokens, further.total_num_scheduled_tokens = dict.fromkeys(ids, 1), len(ids)
        further.scheduled_cached_reqs = replace(
            CachedRequestData.make_empty(),
            req_ids=ids,
            num_computed_tokens=[computed[i] + place for i in ids],
            new_block_ids=[None] * len(ids),
            num_output_tokens=[0] * len(ids),
        )
        split.append(further)
    return split
