"""PairWorker: one vLLM worker process that holds two model runners on the same device.

``self.model_runner`` is the teacher's, built by vLLM; ``self.student_runner`` is built here from the student's own
``VllmConfig``. Each has its own weights, KV cache, compile artefacts and CUDA graphs. A step runs both forward passes,
mixes the logits in the teacher's sampler and hands the drawn tokens to the student's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from osd.core import MixingConfig
from osd.engine.adapter import StudentAdapter
from osd.engine.books import feed, keep_async_books, note_samples, only_rows
from osd.engine.closing import ClosingPair
from osd.engine.config import mixing_config, share_block_size, student_vllm_config, wants_overlap
from osd.engine.forward import SteadyForward
from osd.engine.parts import as_index, fused, take
from osd.engine.record import RecordLog, RequestRecord, dump_records
from osd.engine.request import PairOptions
from osd.engine.rows import RowPlan, RowPlanner
from osd.engine.sampler import FedSampler, PairSampler
from osd.engine.scheduler import PairStep, student_kv_cache_config
from osd.engine.sleep import SleepingPair
from osd.engine.weights import WeightMap, keep_weights_live, load_weights

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

# What vLLM's Worker reads of itself when it builds, profiles or warms up its model runner.
_CONFIG_ATTRIBUTES = ("model_config", "cache_config", "load_config", "scheduler_config", "compilation_config")


class PairWorker(ClosingPair, SleepingPair, Worker):
    """vLLM's worker of this platform, for two models."""

    vllm_config: VllmConfig
    model_runner: Any

    # -- building both sides ----------------------------------------------------------------------------------------

    def init_device(self) -> None:
        self.student_config = student_vllm_config(self.vllm_config)
        _refuse_recurrent(teacher=self.model_config, student=self.student_config.model_config)
        super().init_device()
        self._keep_cublas_awake()
        with set_current_vllm_config(self.student_config):
            self.student_runner = type(self.model_runner)(self.student_config, self.device)
        self.records = RecordLog()
        self.weights_loaded = True
        self.weights_version = 0
        self._student_graph_pool: Any = None

    @contextmanager
    def _as_student(self) -> Iterator[None]:
        """Run the body with the student in the teacher's place, so that vLLM's own worker code serves both.

        CUDA graphs that it makes get a memory pool of their own: vLLM gives all graphs of a process one, which is right
        only for graphs that never run at the same time.
        """
        platform: Any = type(current_platform)
        mine = {name: getattr(self, name) for name in ("vllm_config", "model_runner", *_CONFIG_ATTRIBUTES)}
        self.vllm_config, self.model_runner = self.student_config, self.student_runner
        for name in _CONFIG_ATTRIBUTES:
            setattr(self, name, getattr(self.student_config, name))
        graph_pool, platform._global_graph_pool = platform._global_graph_pool, self._student_graph_pool
        try:
            with set_current_vllm_config(self.student_config):
                yield
        finally:
            self._student_graph_pool, platform._global_graph_pool = platform._global_graph_pool, graph_pool
            for name, value in mine.items():
                setattr(self, name, value)

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        with self._as_student(), keep_weights_live():
            super().load_model(**kwargs)
        self._back_up_student()

    def set_kv_cache_layout(self, kv_cache_layout: str) -> None:
        super().set_kv_cache_layout(kv_cache_layout)
        with self._as_student():
            super().set_kv_cache_layout(kv_cache_layout)

    def determine_available_memory(self) -> int:
        """Bytes for the teacher's KV cache, such that the same number of blocks of the student's fits beside it."""
        share_block_size(self.vllm_config, self.student_config)
        with self._profile_runs_include_student():
            total = super().determine_available_memory()
        teacher, student = (_block_bytes(runner.get_kv_cache_spec()) for runner in (self.model_runner, self.student_runner))
        return int(total * teacher / (teacher + student))

    @contextmanager
    def _profile_runs_include_student(self) -> Iterator[None]:
        """Make vLLM's memory profile see both models' weights and activations."""
        runner = self.model_runner
        profile_teacher, weights = runner.profile_run, getattr(runner, "model_memory_usage", None)

        def profile_both(*args: Any, **kwargs: Any) -> None:
            with self._as_student():
                self.student_runner.profile_run(*args, **kwargs)
            profile_teacher(*args, **kwargs)

        runner.profile_run = profile_both
        if weights is not None:  # a CPU's is not told
            runner.model_memory_usage = weights + self.student_runner.model_memory_usage
        try:
            yield
        finally:
            del runner.profile_run
            if weights is not None:
                runner.model_memory_usage = weights

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        with self._as_student():
            super().initialize_from_config(self._student_kv_cache_config(kv_cache_config))

    def _student_kv_cache_config(self, teacher: KVCacheConfig) -> KVCacheConfig:
        specs = self.student_runner.get_kv_cache_spec()
        self._check_student_specs(specs, teacher.num_blocks)
        self.student_config.cache_config.num_gpu_blocks_override = teacher.num_blocks
        available = teacher.num_blocks * _block_bytes(specs)
        [config] = get_kv_cache_configs(self.student_config, [specs], [available])
        if hasattr(teacher, "kv_cache_layout"):
            config.kv_cache_layout = teacher.kv_cache_layout
        return config

    def _check_student_specs(self, specs: dict[str, Any], num_blocks: int) -> None:
        """The scheduler planned for uniform full attention: any other cache would be addressed wrongly."""
        planned = student_kv_cache_config(self.student_config, num_blocks).kv_cache_groups[0].kv_cache_spec
        for layer, spec in specs.items():
            if type(spec) is not type(planned) or spec.block_size != planned.block_size or spec.sliding_window:
                raise ValueError(
                    f"student {self.student_config.model_config.model!r}: layer {layer} has the KV cache {spec}, and the "
                    "paired engine supports students with full attention in every layer (Llama, Qwen2, Qwen3, ...)"
                )

    def compile_or_warm_up_model(self) -> Any:
        with self._as_student():
            super().compile_or_warm_up_model()
        times = super().compile_or_warm_up_model()
        self._install_samplers()
        self._warm_up_sampler()
        self.student_weights = WeightMap(self.student_runner.get_model())
        self.student_adapter = StudentAdapter(self.student_runner)
        for runner in (self.model_runner, self.student_runner):
            runner._init_kv_zero_meta()  # vLLM does it for models that need it; the scheduler zeroes after a NaN
            runner.execute_model = SteadyForward(runner)
        keep_async_books(self.model_runner)
        return times

    def _install_samplers(self) -> None:
        vocab_size = min(runner.model_config.get_vocab_size() for runner in (self.model_runner, self.student_runner))
        mode = self.model_runner.sampler.logprobs_mode
        self.sampler = PairSampler(mixing_config(self.vllm_config), vocab_size, logprobs_mode=mode)
        self.student_sampler = FedSampler()
        self.model_runner.sampler, self.student_runner.sampler = self.sampler, self.student_sampler
        self.planner = RowPlanner(self.device)
        self.overlap_forwards(wants_overlap(self.vllm_config))

    @torch.inference_mode()
    def _warm_up_sampler(self) -> None:
        """Seconds of compilation that would otherwise be in the first step; other methods' kernels are compiled when used."""
        if not fused(self.sampler.mixing, self.device):
            return
        logits = []
        for runner in (self.model_runner, self.student_runner):
            config = runner.model_config
            hidden_BH = torch.zeros(2, config.get_hidden_size(), dtype=config.dtype, device=self.device)
            logits.append(runner.model.compute_logits(hidden_BH))
        self.sampler.warm_up(*logits)

    def overlap_forwards(self, on: bool) -> bool:
        """Run the student's forward beside the teacher's, on a stream of its own, or before it; returns which it will be.

        Decoding a few rows leaves much of a GPU idle in either forward. Where the two would share more than the device they
        run one after the other: tensor parallel ranks (their collectives), mixtures of experts (vLLM's workspace).
        """
        configs = (self.vllm_config, self.student_config)
        alone = self.parallel_config.world_size == 1 and not any(config.model_config.is_moe for config in configs)
        on = on and alone and self.device.type == "cuda"
        self.student_stream = torch.cuda.Stream(self.device) if on else None
        return on

    @contextmanager
    def _beside_the_teacher(self) -> Iterator[None]:
        """Run the body on the student's stream, after everything that has been launched so far."""
        if self.student_stream is None:
            yield
            return
        self.student_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.student_stream):
            yield

    def _join_student(self) -> None:
        """What is launched from here on may read what the student's forward wrote."""
        if self.student_stream is not None:
            torch.cuda.current_stream().wait_stream(self.student_stream)

    def set_mixing(self, mixing: dict[str, Any]) -> None:
        """From the next step on, choose α and mix as this ``MixingConfig.to_dict()`` says."""
        self.sampler.mixing = MixingConfig.from_dict(mixing)

    def pair_active(self) -> bool:
        """Both samplers are in place; asked once at start-up, because vLLM goes on without a plug-in that is not used."""
        return self.model_runner.sampler is self.sampler and self.student_runner.sampler is self.student_sampler

    # -- one step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        step: PairStep = scheduler_output.osd
        # A forward pass is still here if an exception (an interrupt, out of memory) ended its step: nobody will sample it.
        self.model_runner.execute_model_state = self.student_runner.execute_model_state = None
        self._check_weights(step)
        self._note_admissions(scheduler_output, step)
        self.step = step
        with self._beside_the_teacher():
            self.student_runner.execute_model(step.student_output)
        output = super().execute_model(scheduler_output)
        if output is not None:
            # The teacher had nothing to compute, so vLLM will not ask for samples: the student's step ends here.
            self._join_student()
            self._finish_student(self.planner.plan(self.model_runner, self.student_runner, step))
        return output

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        teacher, student = self.model_runner, self.student_runner
        state, student_state = teacher.execute_model_state, student.execute_model_state
        plan = self.planner.plan(teacher, student, self.step)
        self._join_student()
        self._set_up_sampler(plan, student_state)
        self._constrain(state, grammar_output)
        with only_rows(teacher, plan.ready_mask):
            output = teacher.sample_tokens(None)
        if teacher.use_async_scheduling:
            assert self.sampler.token_B is not None
            feed(teacher, self.sampler.token_B, plan.fed, plan.again)
        self._finish_student(plan)
        self._record(plan, state.sample_hidden_states)
        return output

    def _set_up_sampler(self, plan: RowPlan, student_state: Any) -> None:
        self.sampler.rows = plan.rows
        self.sampler.student_logits_BV = None if student_state is None else student_state.logits

    def _constrain(self, state: Any, grammar_output: GrammarOutput | None) -> None:
        """Structured output masks q*, not the teacher: masking one policy would change α."""
        self.sampler.constrain = None
        if grammar_output is not None:
            batch = self.model_runner.input_batch
            self.sampler.constrain = lambda logits: apply_grammar_bitmask(state.scheduler_output, grammar_output, batch, logits)

    def _finish_student(self, plan: RowPlan) -> None:
        """Hand the student the tokens drawn for its rows, and keep its books as vLLM does after sampling."""
        runner = self.student_runner
        if runner.execute_model_state is None:
            return  # it had nothing to compute either
        if plan.student_ready_mask.any():
            assert self.sampler.token_B is not None
            tokens = take(self.sampler.token_B, plan.student_source)
        else:
            tokens = torch.zeros(len(plan.student_ready_mask), dtype=torch.int32, device=self.device)
        if runner.use_async_scheduling:
            runner.execute_model_state = None
            note_samples(runner, plan.student_ready_mask)
            feed(runner, tokens, plan.student_fed, plan.student_again)
        else:
            self.student_sampler.tokens_B = tokens
            with only_rows(runner, plan.student_ready_mask):
                runner.sample_tokens(None)

    # -- the record -------------------------------------------------------------------------------------------------

    def _note_admissions(self, scheduler_output: SchedulerOutput, step: PairStep) -> None:
        for side, output in (("teacher", scheduler_output), ("student", step.student_output)):
            for request in output.scheduled_new_reqs:
                if PairOptions.of(request.sampling_params).record:
                    self.records.admitted(side, request.req_id, request.num_computed_tokens)

    def _record(self, plan: RowPlan, hidden_BH: torch.Tensor) -> None:
        if not plan.recorded_ids:
            return
        assert self.sampler.values_BR is not None
        rows = as_index(plan.recorded_rows)
        hidden = hidden_BH[rows] if plan.hidden else None
        if hidden is not None and plan.recorded_rows is None:
            hidden = hidden.clone()  # the runner reuses this memory for the next step
        self.records.append(plan.recorded_ids, self.sampler.values_BR[rows], hidden)

    def collect_records(self) -> dict[str, RequestRecord]:
        """Every request's record since the last call."""
        self.records.weights_version = self.weights_version
        return self.records.take()

    def take_records(self) -> bytes | None:
        """The same as bytes, for another process; None from ranks whose driver holds the same."""
        records = self.collect_records()
        return dump_records(records) if self.is_driver_worker else None

    # -- the student's weights --------------------------------------------------------------------------------------

    def load_student_weights(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]] | bytes,
        partial: bool = False,
        adapter: Iterable[tuple[str, torch.Tensor]] | bytes = (),
        at_once: bool = False,
    ) -> int:
        """Replace every weight of the student's, or with ``partial`` those that are given, and its adapter, if only by none.

        Until one succeeds, nothing is sampled.

        Returns:
            the new version.
        """
        if partial and not (self.weights_loaded and self.weights_version):
            raise ValueError("partial=True: no sync of every weight came before, or the last one failed; push them all once")
        self.weights_loaded = False
        named_tensors, adapter = (load_weights(t) if isinstance(t, bytes) else t for t in (named_tensors, adapter))
        with self._as_student(), torch.no_grad():
            with self.student_adapter.set_aside():
                self.student_weights.load(named_tensors, partial=partial, at_once=at_once)
            self.student_adapter.load(adapter)
        self.weights_loaded = True
        self.weights_version += 1
        return self.weights_version

    def _check_weights(self, step: PairStep) -> None:
        if not self.weights_loaded:
            raise RuntimeError("the last weight sync of the student failed half way; sync again before sampling")
        if step.weights_version != self.weights_version:
            raise RuntimeError(
                f"a request was admitted for the student's weights version {step.weights_version}, and version "
                f"{self.weights_version} is loaded: its KV cache would belong to other weights"
            )


def _refuse_recurrent(**models: Any) -> None:
    """Computing a token again, as the rewind rule does, would advance a recurrent state twice, without a word."""
    for side, model in models.items():
        if model.has_inner_state:
            raise ValueError(
                f"{side} {model.model!r} has recurrent layers (Mamba, linear attention), which the paired engine cannot take "
                "back by a token; use a model with attention in every layer"
            )


def _block_bytes(specs: dict[str, Any]) -> int:
    return sum(spec.page_size_bytes for spec in specs.values())
