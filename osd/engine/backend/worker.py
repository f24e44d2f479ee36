"""PairWorker: one vLLM worker process that holds two model runners on the same device.

``self.model_runner`` is the teacher's, built by vLLM. ``self.student_runner`` is built here from the student's ``VllmConfig``.
Each has its own weights, KV cache, compile artefacts and CUDA graphs. A step runs both forward passes, draws from q* in the
place of the teacher's sampler, and writes the drawn tokens into both runners' state.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from osd.core import MixingConfig
from osd.engine.alignment import Aligner, Alignment
from osd.engine.backend import cpu
from osd.engine.backend.configuration import (
    StudentCache,
    mixing_config,
    request_bytes,
    shared_length,
    student_vllm_config,
    wants_overlap,
)
from osd.engine.backend.experts import loading_experts
from osd.engine.backend.language_model import reads_text_names
from osd.engine.backend.output_layer import output_layer
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
from osd.engine.backend.weight_transfer import transfer_engine
from osd.engine.mixture import as_index, take
from osd.engine.multimodal import text_weights
from osd.engine.record import RecordLog, RequestRecord, dump_records
from osd.engine.request import PairOptions, SampledRequest
from osd.engine.weights import WeightLoad, load_weights
from osd.engine.wire import pack

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

# Attributes of vLLM's Worker that it reads when it builds, profiles or warms up its model runner.
_CONFIG_ATTRIBUTES = ("model_config", "cache_config", "load_config", "scheduler_config", "compilation_config")

workers: weakref.WeakSet[PairWorker] = weakref.WeakSet()  # of this process, and not shut down yet


class PairWorker(Worker):
    """vLLM's worker of this platform, for two models."""

    sampler_class: type[PairSampler] = PairSampler
    aligner_class: type[Aligner] = Aligner
    vllm_config: VllmConfig
    distributed_init_method: str
    model_runner: Any
    student_runner: Any
    _step: PairStep | None = None
    _student_logits: torch.Tensor | None = None
    _grammar: Any = None
    _outputs: tuple[Alignment, StepOutputs] | None = None
    _load: WeightLoad | None = None

    # -- building both sides ----------------------------------------------------------------------------------------

    def init_device(self) -> None:
        workers.add(self)
        cpu.install_kernels()
        self.distributed_init_method = cpu.init_method_of_this_run(self.distributed_init_method)
        self.student_config = student_vllm_config(self.vllm_config)
        _refuse_cached_states(teacher=self.vllm_config, student=self.student_config)
        super().init_device()
        with set_current_vllm_config(self.student_config):
            self.student_runner = type(self.model_runner)(self.student_config, self.device)
        self.records = RecordLog()
        self.requests: dict[str, SampledRequest] = {}
        self.weights_loaded, self.weights_version = True, 0
        self._loading = ExitStack()  # of the load that runs
        self.student_stream: torch.cuda.Stream | None = None
        self._student_graph_pool: Any = None

    @contextmanager
    def _as_student(self) -> Iterator[None]:
        """Run the body with the student in the teacher's place, so that vLLM's own worker code serves both.

        The student's CUDA graphs get their own memory pool: vLLM's one pool is only for graphs that never run at the same time.
        """
        platform: Any = type(current_platform)
        own = {name: getattr(self, name) for name in ("vllm_config", "model_runner", *_CONFIG_ATTRIBUTES)}
        self.vllm_config, self.model_runner = self.student_config, self.student_runner
        for name in _CONFIG_ATTRIBUTES:
            setattr(self, name, getattr(self.student_config, name))
        graph_pool, platform._global_graph_pool = platform._global_graph_pool, self._student_graph_pool
        try:
            with set_current_vllm_config(self.student_config):
                yield
        finally:
            self._student_graph_pool, platform._global_graph_pool = platform._global_graph_pool, graph_pool
            for name, value in own.items():
                setattr(self, name, value)

    def load_model(self, **kwargs: Any) -> None:
        # vLLM would make its weight transfer engine for the teacher.
        with mock.patch.object(self.vllm_config, "weight_transfer_config", None):
            super().load_model(**kwargs)
        self.weight_transfer_engine = transfer_engine(self.vllm_config, self.device, self._add_weights)
        with self._as_student(), cpu.keep_weights():
            super().load_model(**kwargs)
        for runner in (self.model_runner, self.student_runner):
            _release_transformers_classes(runner.get_model())
        self.student_runner.sampler = NoSampler(self.student_runner.req_states)
        vocab_size = min(runner.model_config.get_vocab_size() for runner in (self.model_runner, self.student_runner))
        self.sampler = self.sampler_class(mixing_config(self.vllm_config), vocab_size, self.model_runner.sampler)
        # A user's logits processors act on every request.
        self.custom_processors = not all(
            type(processor).__module__.startswith("vllm.") for processor in self.model_runner.sampler.logits_processors
        )
        self.aligner = self.aligner_class(self.device)
        self.model_runner.sample = self._sample
        self.overlap_forwards(wants_overlap(self.vllm_config))

    def get_kv_cache_spec(self) -> dict[str, Any]:
        config, teacher = self.student_config, super().get_kv_cache_spec()
        current_platform.update_block_size_for_backend(config)  # vLLM's executors do it for the teacher
        with self._as_student():
            specs = super().get_kv_cache_spec()
            resolve_kv_cache_layout(config, [self.get_supported_kv_cache_layouts()], specs.values())
        self.student_cache = StudentCache(specs, config.cache_config)
        return self.student_cache.carried_by(teacher)

    def set_kv_cache_layout(self, layout: str, *args: Any) -> None:
        super().set_kv_cache_layout(layout, *args)
        with self._as_student():
            super().set_kv_cache_layout(self.cache_config.kv_cache_layout, *args)

    def determine_available_memory(self) -> int:
        """Return bytes for the teacher's KV cache, such that as many requests of the student's fit beside it."""
        with self._profile_both():
            total = super().determine_available_memory()
        length = shared_length(self.vllm_config, self.student_config)
        teacher = request_bytes(self.vllm_config, self.model_runner.get_kv_cache_spec(), length)
        student = request_bytes(self.student_config, self.student_cache.specs, length)
        return total * teacher // (teacher + student)

    @contextmanager
    def _profile_both(self) -> Iterator[None]:
        """Make vLLM's memory profile count both models' weights and activations."""
        runner = self.model_runner
        profile_teacher, weights = runner.profile_run, getattr(runner, "model_memory_usage", 0)

        def profile_both(*args: Any, **kwargs: Any) -> None:
            with self._as_student():
                self.student_runner.profile_run(*args, **kwargs)
            profile_teacher(*args, **kwargs)

        runner.profile_run = profile_both
        runner.model_memory_usage = weights + getattr(self.student_runner, "model_memory_usage", 0)
        try:
            yield
        finally:
            del runner.profile_run
            runner.model_memory_usage = weights

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        student, _ = self.student_cache.plan(self.student_config, self.vllm_config, kv_cache_config)
        with self._as_student():
            super().initialize_from_config(student)
        for runner in (self.model_runner, self.student_runner):
            runner._init_kv_zero_meta()  # vLLM does it for models that need it; the scheduler zeroes blocks after a NaN

    def compile_or_warm_up_model(self) -> Any:
        with self._as_student(), mock.patch.object(self, "_maybe_activate_jit_monitor", create=True):
            super().compile_or_warm_up_model()
        self._warm_up_sampler()
        return super().compile_or_warm_up_model()  # ends by warning of kernels that are compiled from here on

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
        """Choose α and mix as this ``MixingConfig.to_dict()`` says, from the next step on."""
        self.sampler.mixing = MixingConfig.from_dict(mixing)

    def pair_active(self) -> bool:
        """Return whether the pair's sampler is in place; vLLM starts without a plug-in that it does not use."""
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
            self._check_weights(step)  # a step without tokens says which requests ended, also after a sync
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
        """Make the penalties of new requests count the student's prompt; the runner knows them by now."""
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
        """Draw the step's tokens from q*; stands in the place of the teacher runner's ``sample``."""
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
        self._record(alignment, outputs, hidden_BH)
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

    def _record(self, alignment: Alignment, outputs: StepOutputs, hidden_BH: torch.Tensor) -> None:
        if not alignment.recorded_ids:
            return
        rows = as_index(alignment.recorded_rows)
        self.records.append(
            alignment.recorded_ids,
            outputs.values_BR[rows],
            hidden_BH[rows] if alignment.hidden else None,
            None if outputs.topk_BX is None else outputs.topk_BX[rows],
        )

    def _with_record(self, outputs: StepOutputs, hidden_BH: torch.Tensor) -> Any:
        """Return the logprobs of a step with the record that is returned with its tokens."""
        assert self._step is not None
        wanted = [self.requests[i].options for i in self._step.returned]
        signal_BX = outputs.topk_BX if any(options.topk for options in wanted) else None
        if any(options.hidden for options in wanted):
            signal_BX = hidden_BH
        return append_record(outputs.logprobs, outputs.values_BR, self.weights_version, signal_BX, outputs.origin_B)

    def collect_records(self) -> dict[str, RequestRecord]:
        """Return every request's record since the last call."""
        self.records.weights_version = self.weights_version
        return self.records.take()

    def take_records(self) -> bytes | None:
        """Return the records as bytes, for another process; None from ranks whose driver holds the same."""
        records = self.collect_records()
        return dump_records(records) if self.is_driver_worker else None

    def forget_records(self) -> None:
        """Drop every request's record."""
        self.records.clear()

    # -- the student's weights --------------------------------------------------------------------------------------

    def load_student_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]] | bytes, partial: bool = False) -> int:
        """Replace every weight of the student, or with ``partial`` those given; return the new version.

        No step runs until a call succeeds.
        """
        self._begin_load(partial)
        try:
            self._add_weights(load_weights(named_tensors) if isinstance(named_tensors, bytes) else named_tensors)
        except BaseException:
            self._give_up_load()
            raise
        return self._end_load()

    def _begin_load(self, partial: bool) -> None:
        if partial and not (self.weights_loaded and self.weights_version):
            raise ValueError("partial=True: no sync of every weight came before, or the last one failed; push them all once")
        self.weights_loaded = False
        self.weights_version += 1  # on every rank, also one that fails: their versions must stay equal
        self._give_up_load()
        model = self.student_runner.get_model()
        with self._as_student(), torch.no_grad():
            self._loading.enter_context(loading_experts(model, self.model_config, partial=partial))
        self._load = WeightLoad(model, partial=partial)

    def _add_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        assert self._load is not None, "a load has begun"
        if reads_text_names(self.student_config):
            named_tensors = text_weights(named_tensors)
        with self._as_student():
            self._load.add(named_tensors)

    def _end_load(self) -> int:
        assert self._load is not None, "a load has begun"
        load, self._load = self._load, None
        with self._as_student(), torch.no_grad(), self._loading:
            load.check_complete()
            cpu.pack_weights(load.model)
        self.weights_loaded = True
        return self.weights_version

    def _give_up_load(self) -> None:
        """End a load that did not finish, if there is one."""
        self._load = None
        with suppress(ValueError), self._as_student(), torch.no_grad():
            self._loading.close()

    # vLLM's weight transfer: the same load in three calls, from a trainer in another process.

    def start_weight_update(self, partial: bool = False) -> int:
        """Begin a load of the student's weights, also after one that never finished; return the new version."""
        if self.weight_transfer_engine is None:
            raise RuntimeError("this engine takes no weights: it was started without weight_transfer_config")
        self._begin_load(partial)
        self._weight_update_active = False
        super().start_weight_update()
        return self.weights_version

    def finish_weight_update(self) -> int:
        """End a load; return the version.

        Raises:
            ValueError: parameters are missing.
        """
        super().finish_weight_update()
        return self._end_load()

    def _check_weights(self, step: PairStep) -> None:
        if not self.weights_loaded:
            raise RuntimeError("the last weight sync of the student failed half way; sync again before sampling")
        if step.weights_version not in (None, self.weights_version):
            raise RuntimeError(
                f"a request was admitted for the student's weights version {step.weights_version}, and version "
                f"{self.weights_version} is loaded: its KV cache would belong to other weights"
            )

    def teacher_lm_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the teacher's output layer, weight [V, H] and bias [V] or None: by reference, or gathered from its shards."""
        layer, bias = output_layer(self.model_runner.get_model(), self.model_config)
        weight = layer.weight
        if getattr(layer, "tp_size", 1) > 1:
            weight = tensor_model_parallel_all_gather(weight, 0)
            bias = None if bias is None else tensor_model_parallel_all_gather(bias, 0)
        vocab_size = self.model_config.get_vocab_size()
        return weight[:vocab_size], None if bias is None else bias[:vocab_size]

    def teacher_head_rows(self, start: int, stop: int) -> bytes:
        """Return rows ``start`` to ``stop`` of the teacher's output layer as bytes, or those of them that this rank has."""
        layer, bias = output_layer(self.model_runner.get_model(), self.model_config)
        shard = getattr(layer, "shard_indices", None)
        first = 0 if shard is None else shard.org_vocab_start_index
        end = self.model_config.get_vocab_size() if shard is None else shard.org_vocab_end_index
        low, high = max(start, first), min(stop, end)
        if low >= high:
            return b""
        tensors = {"weight": layer.weight[low - first : high - first]}
        if bias is not None:
            tensors["bias"] = bias[low - first : high - first]
        return pack({"start": low}, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    # -- sleep ------------------------------------------------------------------------------------------------------

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        """Return where the weights or the KV cache of the model being built are allocated."""
        is_student = self.model_runner is getattr(self, "student_runner", None)
        if not (is_student and self.vllm_config.model_config.enable_sleep_mode):
            return super()._maybe_get_memory_pool_context(tag)
        return _allocator().use_memory_pool(tag=tag)  # vLLM's own would take the teacher's weights for another engine's

    def sleep(self, level: int = 1) -> None:
        """Free the memory of both sides' weights and caches; the weights are backed up on the host, the caches are lost."""
        if level != 1:
            raise ValueError(f"sleep level={level}: a pair sleeps at level 1, which keeps both models on the host")
        super().sleep(level)

    @torch.inference_mode()
    def wake_up(self, tags: list[str] | None = None) -> None:
        """Restore both models and zero both KV caches: attention multiplies masked slots by 0, and 0 × NaN is NaN."""
        if tags is not None:
            raise ValueError(f"wake_up tags={tags}: a pair wakes up whole; leave them out")
        torch.accelerator.empty_cache()  # memory that a trainer in this process no longer uses
        super().wake_up(tags)
        for runner in (self.model_runner, self.student_runner):
            for cache in runner.kv_caches:  # a layer's tensor, or the list of its recurrent states
                for tensor in cache if isinstance(cache, list) else [cache]:
                    tensor.zero_()

    # -- the end ----------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Free both models and their KV caches even if something still references them (a traceback, torch.compile)."""
        workers.discard(self)
        runners = [runner for name in ("student_runner", "model_runner") if (runner := getattr(self, name, None))]
        models = [runner.get_model() for runner in runners if getattr(runner, "model", None) is not None]
        for runner in runners:
            runner.execute_model_state = None
            vars(runner).pop("sample", None)
        for name in ("sampler", "aligner", "records", "_outputs", "_student_logits"):
            self.__dict__.pop(name, None)
        try:
            if len(runners) == 2:
                self.student_runner.shutdown()
        finally:
            try:
                super().shutdown()  # waits for the device
            finally:
                for model in models:
                    _free(model)


@torch.inference_mode()
def _free(model: torch.nn.Module) -> None:
    """Unregister a model from torch's compiler and free its parameters in place; models share some buffers, so those stay."""
    for module in model.modules():
        if isinstance(module, TorchCompileWithNoGuardsWrapper):
            module.cleanup()
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)


def _release_transformers_classes(model: torch.nn.Module) -> None:
    """Let the process build transformers models of the classes that vLLM runs from transformers' code (GPT-NeoX, Phi).

    Symptom: "Current vLLM config is not set" from ``from_pretrained``. Cause: vLLM decorates the class itself, for
    torch.compile. Versions: 0.32, 0.33. To be removed when vLLM decorates a subclass (tests/test_architectures.py).
    """
    for cls in {type(module) for module in model.modules()}:
        if not cls.__module__.startswith("transformers.") or TorchCompileWithNoGuardsWrapper not in cls.__bases__:
            continue
        decorated: Any = cls.__init__
        closure = inspect.getclosurevars(decorated)
        if (original := closure.nonlocals.get("old_init")) is None:
            continue  # done for the other side

        def __init__(self: Any, *args: Any, decorated: Any = decorated, original: Any = original, **kwargs: Any) -> None:
            if get_current_vllm_config_or_none() is not None:
                decorated(self, *args, **kwargs)
            else:
                original(self, *args, **kwargs)
                self.do_not_compile = True

        def __call__(self: Any, *args: Any, called: Any = cls.__call__, **kwargs: Any) -> Any:
            # vLLM's skips hooks.
            return (torch.nn.Module.__call__ if getattr(self, "do_not_compile", True) else called)(self, *args, **kwargs)

        cls.__init__, cls.__call__ = __init__, __call__  # type: ignore[misc, method-assign]


def _refuse_cached_states(**configs: VllmConfig) -> None:
    """Raise on a CPU if recurrent states were to be cached: vLLM 0.32's CPU build ends the engine at some of them."""
    for side, config in configs.items():
        if current_platform.is_cpu() and config.model_config.has_inner_state and config.cache_config.enable_prefix_caching:
            raise ValueError(
                f"{side} {config.model_config.model!r} has recurrent layers (Mamba, linear attention), whose states vLLM "
                "cannot cache on a CPU; set engine_kwargs['enable_prefix_caching']=False"
            )


def _allocator() -> Any:
    from vllm.device_allocator import get_mem_allocator_instance  # loads CUDA's runtime

    return get_mem_allocator_instance()
