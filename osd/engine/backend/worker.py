"""PairWorker: a step of a pair in its worker process.

A step runs both forward passes, draws from q* in the place of the teacher's sampler, and writes the drawn tokens into both
runners' state.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from osd.core import MixingConfig
from osd.engine.alignment import Aligner, Alignment
from osd.engine.backend.configuration import mixing_config, wants_overlap
from osd.engine.backend.returned import append_record
from osd.engine.backend.sampler import (
    NoSampler,
    PairSampler,
    StepInputs,
    StepOutputs,
    counts,
    sampler_output,
    set_prompt_mask,
)
from osd.engine.backend.scheduler import PairStep
from osd.engine.backend.two_models import TwoModelWorker
from osd.engine.mixture import as_index, take
from osd.engine.record import RecordLog, RequestRecord, dump_records
from osd.engine.request import PairOptions, SampledRequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput


class PairWorker(TwoModelWorker):
    """Worker of a pair: draws one token from q* for every request that both sides have logits for."""

    sampler_class: type[PairSampler] = PairSampler
    aligner_class: type[Aligner] = Aligner
    _step: PairStep | None = None
    _student_logits: torch.Tensor | None = None
    _grammar: Any = None
    _outputs: tuple[Alignment, StepOutputs] | None = None

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        self.student_runner.sampler = NoSampler(self.student_runner.req_states)
        vocab_size = min(runner.model_config.get_vocab_size() for runner in (self.model_runner, self.student_runner))
        self.sampler = self.sampler_class(mixing_config(self.vllm_config), vocab_size, self.model_runner.sampler)
        # A user's logits processors act on every request.
        self.custom_processors = not all(
            type(processor).__module__.startswith("vllm.") for processor in self.model_runner.sampler.logits_processors
        )
        self.aligner = self.aligner_class(self.device)
        self.records = RecordLog()
        self.requests: dict[str, SampledRequest] = {}
        self.model_runner.sample = self._sample
        self.overlap_forwards(wants_overlap(self.vllm_config))

    def compile_or_warm_up_model(self) -> Any:
        self.warm_up_student()
        self._warm_up_sampler()
        return super().compile_or_warm_up_model()  # last: from here on vLLM warns of every kernel that is compiled

    @torch.inference_mode()
    def _warm_up_sampler(self) -> None:
        """Compile the default method's kernels, which the first step would compile."""
        logits = []
        for runner in (self.model_runner, self.student_runner):
            config = runner.model_config
            hidden_BH = torch.zeros(2, config.get_hidden_size(), dtype=config.dtype, device=self.device)
            logits.append(runner.model.compute_logits(hidden_BH))
        self.sampler.warm_up(*logits)

    def overlap_forwards(self, on: bool) -> bool:
        """Choose whether the student's forward pass runs beside the teacher's, on its own stream. Return the choice.

        They run one after the other where they share more than the device: tensor parallel ranks share collectives, mixtures of
        experts share vLLM's workspace.
        """
        configs = (self.vllm_config, self.student_config)
        separate = self.parallel_config.world_size == 1 and not any(config.model_config.is_moe for config in configs)
        on = on and separate and self.device.type == "cuda"
        self.student_stream = torch.cuda.Stream(self.device) if on else None
        return on

    def set_mixing(self, mixing: dict[str, Any]) -> None:
        """Replace the mixing by that of a ``MixingConfig.to_dict()``, from the next step on."""
        self.sampler.mixing = MixingConfig.from_dict(mixing)

    def pair_active(self) -> bool:
        """Return whether the pair's sampler is in place: vLLM says nothing if it ignores a worker class."""
        return self.model_runner.sample == self._sample and isinstance(self.student_runner.sampler, NoSampler)

    # -- one step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        step = self._step = getattr(scheduler_output, "osd", None)
        if step is None:
            return super().execute_model(scheduler_output)  # vLLM's warm-up
        # An exception (an interrupt, out of memory) ends a step and leaves its forward pass here; it is not sampled.
        self.model_runner.execute_model_state = self.student_runner.execute_model_state = None
        if scheduler_output.num_scheduled_tokens or step.student_output.num_scheduled_tokens:
            # A step without tokens says which requests ended, also after a sync.
            self.student_weights.check(step.weights_version)
        if step.student_output.num_scheduled_tokens:
            self.student_weights.check_cache(step.resets)
        self._admit(scheduler_output, step)
        if self.student_stream is not None:
            self.student_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.student_stream) if self.student_stream is not None else nullcontext():
            self._student_forward(step)
        output = super().execute_model(scheduler_output)
        self._count_students_prompts(scheduler_output)
        if output is not None:
            # The teacher had nothing to compute, so vLLM will not ask for samples: the student's step ends here.
            self._join_student()
            self._finish_step(self._align(None), None)
        return output

    def _student_forward(self, step: PairStep) -> None:
        runner, self._student_logits = self.student_runner, None
        runner.execute_model(step.student_output)
        state = runner.execute_model_state
        if state is not None and step.ready:
            self._student_logits = runner.model.compute_logits(state.hidden_states[state.input_batch.logits_indices])

    def _join_student(self) -> None:
        """Order everything launched from here on after the student's forward pass."""
        if self.student_stream is not None:
            torch.cuda.current_stream().wait_stream(self.student_stream)

    def _admit(self, output: SchedulerOutput, step: PairStep) -> None:
        """Note the sampling options of new requests, and forget the requests that ended."""
        for request_id in output.finished_req_ids:
            self.requests.pop(request_id, None)
        for side, scheduled in (("teacher", output), ("student", step.student_output)):
            for new in scheduled.scheduled_new_reqs:
                if PairOptions.of(new.sampling_params).record:
                    self.records.admitted(side, new.req_id, new.num_computed_tokens)
        for new in output.scheduled_new_reqs:
            self.requests[new.req_id] = SampledRequest.of(new.sampling_params, plain=not self.custom_processors)

    def _count_students_prompts(self, output: SchedulerOutput) -> None:
        """Make the penalties of new requests count the student's prompt; the runner must have added the requests."""
        states = self.model_runner.req_states
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            prompt = request.options.student_prompt_token_ids
            if request.penalised and prompt and not request.options.teacher_only:
                set_prompt_mask(self.sampler.stock, states.req_id_to_index[new.req_id], prompt)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        if self._step is None:
            return super().sample_tokens(grammar_output)
        self._grammar = grammar_output
        output = super().sample_tokens(None)  # calls _sample
        if output is None:  # `execute_model` failed; vLLM raises its error
            self._step = self._grammar = None
            return None
        assert self._outputs is not None
        self._finish_step(*self._outputs)
        self._outputs = self._grammar = self._step = None
        return output

    def _sample(
        self, hidden_states: torch.Tensor, batch: InputBatch, grammar_output: Any
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Draw the step's tokens from q*; replaces the teacher runner's ``sample``."""
        runner = self.model_runner
        if self._step is None:
            return type(runner).sample(runner, hidden_states, batch, grammar_output)
        alignment = self._align(batch)
        hidden_BH = hidden_states[batch.logits_indices]
        teacher = runner.model.compute_logits(hidden_BH)
        self._join_student()
        inputs = StepInputs(
            teacher=teacher,
            student=self._student_logits,
            alignment=alignment,
            batch=batch,
            constrain=self._constraint(batch),
        )
        outputs = self.sampler(inputs)
        self._outputs, self._student_logits = (alignment, outputs), None
        self._record(alignment.recorded_ids, alignment, outputs, hidden_BH)
        num_sampled, num_rejected = counts(runner.req_states, batch, alignment.ready_B, alignment.rejected_B)
        if self._step.returned:
            outputs = replace(outputs, logprobs=self._with_record(outputs, hidden_BH))
        return sampler_output(outputs, num_sampled, num_rejected), num_sampled, num_rejected

    def _constraint(self, batch: InputBatch) -> Any:
        """Return a function that masks log q* by the grammars. Masking the teacher's logits instead would change α."""
        grammar = self._grammar
        if grammar is None:
            return None
        apply = self.model_runner.structured_outputs_worker.apply_grammar_bitmask
        return lambda logq_BV: apply(logq_BV, batch, grammar.structured_output_request_ids, grammar.grammar_bitmask)

    def _align(self, batch: InputBatch | None) -> Alignment:
        assert self._step is not None
        state = self.student_runner.execute_model_state
        return self.aligner.align(
            [] if batch is None else batch.req_ids,
            [] if state is None else state.input_batch.req_ids,
            self._step.ready,
            self._step.unmixed,
            self.requests,
        )

    def _finish_step(self, alignment: Alignment, outputs: StepOutputs | None) -> None:
        """Write the drawn tokens into the student's state: vLLM's own bookkeeping after sampling."""
        runner = self.student_runner
        state, runner.execute_model_state = runner.execute_model_state, None
        if state is None:
            return  # the student had nothing to compute
        batch = state.input_batch
        if outputs is not None and alignment.num_ready:
            tokens = take(outputs.token_B, alignment.source_S)
        else:
            tokens = torch.zeros(batch.num_reqs, dtype=torch.int64, device=self.device)
        num_sampled, num_rejected = counts(runner.req_states, batch, alignment.ready_S, alignment.rejected_S)
        runner.postprocess_sampled(batch.idx_mapping, tokens.view(-1, 1), num_sampled, num_rejected, batch.query_start_loc)

    # -- the record -------------------------------------------------------------------------------------------------

    def _record(
        self, ids: list[str], alignment: Alignment, outputs: StepOutputs, hidden_BH: torch.Tensor, **drafts: torch.Tensor
    ) -> None:
        """Keep the record of these requests; ``drafts`` as of `RecordLog.append`, of all rows."""
        if ids:
            rows = as_index(alignment.recorded_rows)
            hidden = hidden_BH[rows] if alignment.hidden else None
            topk = None if outputs.topk_BX is None else outputs.topk_BX[rows]
            drafts = {name: tensor[rows] for name, tensor in drafts.items()}
            self.records.append(ids, outputs.values_BR[rows], hidden, topk, **drafts)

    def _with_record(self, outputs: StepOutputs, hidden_BH: torch.Tensor) -> Any:
        """Return the logprobs of a step with the record that is returned with its tokens."""
        assert self._step is not None
        wanted = [self.requests[i].options for i in self._step.returned]
        signal_BX = outputs.topk_BX if any(options.topk for options in wanted) else None
        if any(options.hidden for options in wanted):
            signal_BX = hidden_BH
        return append_record(outputs.logprobs, outputs.values_BR, self.student_weights.version, signal_BX, outputs.origin_B)

    def collect_records(self) -> dict[str, RequestRecord]:
        """Return every request's record since the last call."""
        self.records.weights_version = self.student_weights.version
        return self.records.take()

    def take_records(self) -> bytes | None:
        """Return the records as bytes, for another process; None from ranks whose driver holds the same."""
        records = self.collect_records()
        return dump_records(records) if self.is_driver_worker else None

    def forget_records(self) -> None:
        """Drop every request's record."""
        self.records.clear()

    def shutdown(self) -> None:
        if (runner := getattr(self, "model_runner", None)) is not None:
            vars(runner).pop("sample", None)
        for name in ("sampler", "aligner", "records", "_outputs", "_student_logits"):
            self.__dict__.pop(name, None)
        super().shutdown()
