"""The names of vLLM's internals that the backend relies on: an upgrade fails here first, naming what is gone.

The names are found in the backend's source (tests/vllm_names.py), so that none can be missing from a list.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import threading
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Llama4TextConfig
from vllm import LLM, ModelRegistry, SamplingParams, envs, triton_utils
from vllm import _custom_ops as vllm_ops
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import (
    CacheConfig,
    CompilationConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    WeightTransferConfig,
)
from vllm.config.model_arch import ModelArchitectureConfig
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.api_server import app_state as app_states
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding, VocabParallelEmbeddingShardIndices
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.models.granitemoehybrid import GraniteMoeHybridForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.registry import _LazyRegisteredModel
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms.interface import Platform
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import BackgroundResources, SyncMPClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.spec_decode.metrics import SpecDecodingStats
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBackedTensor
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import ExecuteModelState, GPUModelRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
from vllm.v1.worker.worker_base import WorkerBase

from osd.engine.backend import arguments, cpu, versions
from osd.engine.backend.two_models import TwoModelWorker, Worker
from osd.engine.request import _ACTING
from tests.vllm_names import Names, attributes, imports

# What vLLM's parser and its server's state have.
Arguments = type("Arguments", (), {"subparser": None} | {action.dest: None for action in arguments.parser()._actions})
AppState = type("AppState", (), dict.fromkeys(re.findall(r"state\.(\w+) = ", inspect.getsource(app_states))))
# The classes of variables; of several, one must have the attribute.
OWNERS: dict[str, tuple[Any, ...]] = {
    "app_state": (AppState,),
    "args": (Arguments,),
    "AutoConfig": (AutoConfig,),
    "arch": (ModelArchitectureConfig,),
    "arguments": (EngineArgs,),
    "batch": (InputBatch,),
    "block": (KVCacheBlock,),
    "cache_config": (CacheConfig,),
    "client": (EngineClient, AsyncLLM),
    "command": (ServeSubcommand,),
    "CPURouter": (CPURouter,),
    "RotaryEmbedding": (RotaryEmbedding,),
    "ops": (vllm_ops,),
    "re": (re,),
    "communicator": (PyNcclCommunicator,),
    "completion": (CompletionOutput,),
    "closure": (inspect.ClosureVars,),
    "config": (VllmConfig, ModelConfig),
    "ModelRegistry": (type(ModelRegistry),),
    "registered": (_LazyRegisteredModel,),
    "model_config": (ModelConfig,),
    "current_platform": (Platform,),
    "emitted": (EngineCoreOutput,),
    "engine": (LLMEngine,),
    "engine_client": (EngineClient,),
    "further": (SchedulerOutput,),
    "grammar": (GrammarOutput,),
    "graphs": (CudaGraphManager,),
    "group": (KVCacheGroupSpec,),
    "groups": (KVCacheGroupSpec,),
    "requests": (Request,),
    "info": (LayerReloadingInfo,),
    "inspect": (inspect,),
    "layer": (RoutedExperts,),
    "method": (UnquantizedFusedMoEMethod,),
    "head": (VocabParallelEmbedding,),
    "kv_cache_config": (KVCacheConfig,),
    "last": (RequestOutput,),
    "llm": (LLM,),
    "envs": (envs,),
    "import_module()": (topk_topp_sampler,),
    "manager": (KVCacheManager,),
    "logger": (PrometheusStatLogger,),
    "mask": (torch.Tensor,),
    "model": (ModelConfig, LlamaForCausalLM),
    "model_class": (GraniteMoeHybridForCausalLM,),
    "model_runner": (GPUModelRunner,),
    "model_runner_output": (ModelRunnerOutput,),
    "mixer": (MambaBase,),
    "module": (TorchCompileWithNoGuardsWrapper,),
    "new": (NewRequestData,),
    "of_side": (SchedulerOutput,),
    "output": (SchedulerOutput, ModelRunnerOutput),
    "params": (SamplingParams,),
    "parallel": (ParallelConfig,),
    "partner": (Request,),
    "planned": (KVCacheConfig,),
    "platform": (Platform,),
    "processor": (LogitsProcessor,),
    "renderer": (OnlineRenderer,),
    "request": (Request,),
    "resources": (BackgroundResources,),
    "runner": (GPUModelRunner,),
    "scheduled": (SchedulerOutput,),
    "scheduler_output": (SchedulerOutput,),
    "scheduler": (Scheduler,),
    "shard": (VocabParallelEmbeddingShardIndices,),
    "side": (Scheduler,),
    "spec": (FullAttentionSpec,),
    "state": (ExecuteModelState,),
    "states": (RequestState,),
    "stats": (SpecDecodingStats,),
    "stock": (Sampler,),
    "student": (Scheduler, Request),
    "student_config": (VllmConfig,),
    "student_output": (SchedulerOutput,),
    "student_runner": (GPUModelRunner,),
    "over": (threading.Event,),
    "teacher": (KVCacheConfig, VllmConfig, SchedulerConfig),
    "teacher_config": (VllmConfig,),
    "table": (StagedWriteTensor,),
    "text": (Llama4TextConfig,),
    "transfer": (WeightTransferConfig,),
    "utils": (layer_utils, triton_utils),
    "vllm_config": (VllmConfig,),
    "_keys": (AuthenticationMiddleware,),
    "_config": (VllmConfig,),
    "_runner": (GPUModelRunner,),
    "_allocator()": (CuMemAllocator,),
    "student_vllm_config()": (VllmConfig,),
    "get_tp_group()": (GroupCoordinator,),
}
# The classes of attributes.
FIELDS: dict[str, type] = {
    "AsyncLLM.logger_manager": StatLoggerManager,
    "AsyncScheduler.scheduler_config": SchedulerConfig,
    "ExecuteModelState.input_batch": InputBatch,
    "ModelConfig.model_arch_config": ModelArchitectureConfig,
    "GPUModelRunner.block_tables": BlockTables,
    "GPUModelRunner.model_state": ModelState,
    "GPUModelRunner.get_model": LlamaForCausalLM,
    "GPUModelRunner.model": LlamaForCausalLM,
    "GPUModelRunner.model_config": ModelConfig,
    "GPUModelRunner.req_states": RequestState,
    "GPUModelRunner.sampler": Sampler,
    "GPUModelRunner.structured_outputs_worker": StructuredOutputsWorker,
    "KVCacheManager.get_blocks": KVCacheBlocks,
    "KVCacheConfig.kv_cache_groups": KVCacheGroupSpec,
    "KVCacheGroupSpec.kv_cache_spec": FullAttentionSpec,
    "LLM.llm_engine": LLMEngine,
    "PyNcclCommunicator.group": StatelessProcessGroup,
    "LLMEngine.engine_core": SyncMPClient,
    "LLMEngine.vllm_config": VllmConfig,
    "Scheduler.waiting": RequestQueue,
    "RequestState.prompt_len": UvaBackedTensor,
    "RequestState.num_computed_tokens": StagedWriteTensor,
    "RequestState.prefill_len": UvaBackedTensor,
    "SchedulerOutput.scheduled_cached_reqs": CachedRequestData,
    "Request.sampling_params": SamplingParams,
    "Sampler.penalties_state": PenaltiesState,
    "Sampler.req_states": RequestState,
    "Sampler.sampling_states": SamplingStates,
    "Scheduler.kv_cache_manager": KVCacheManager,
    "RoutedExperts.quant_method": UnquantizedFusedMoEMethod,
    "VllmConfig.cache_config": CacheConfig,
    "VllmConfig.compilation_config": CompilationConfig,
    "VllmConfig.load_config": LoadConfig,
    "VllmConfig.model_config": ModelConfig,
    "VllmConfig.parallel_config": ParallelConfig,
    "VllmConfig.scheduler_config": SchedulerConfig,
    "WorkerBase.model_config": ModelConfig,
    "WorkerBase.scheduler_config": SchedulerConfig,
    "WorkerBase.parallel_config": ParallelConfig,
    "WorkerBase.vllm_config": VllmConfig,
    "Worker.model_runner": GPUModelRunner,
}
# What ``self`` and ``super()`` are, by the class or function of the backend.
BASES: dict[str, type] = {
    "TwoModelWorker": Worker,
    "PairWorker": Worker,
    "SideScheduler": AsyncScheduler,
    "PairScheduler": AsyncScheduler,
    "SpeculativeScheduler": AsyncScheduler,
    "SpeculativeWorker": Worker,
    "StudentHTTPEngine": WeightTransferEngine,
    "StudentNCCLEngine": NCCLWeightTransferEngine,
    "_rotate": RotaryEmbedding,
    "_with_bias": CPURouter,
    "routed": CPURouter,
}


@pytest.fixture(scope="module")
def names() -> Names:
    return Names(OWNERS, FIELDS, BASES)


@pytest.mark.parametrize(("module", "name"), sorted(imports()))
def test_an_import_exists(module, name):
    if (module, name) in {
        ("vllm.v1.core.kv_cache_planning", "get_kv_cache_configs"),
        ("vllm.v1.core.kv_cache_planning", "get_global_kv_cache_groups"),
        ("vllm.v1.core.kv_cache_utils", "get_kv_cache_configs"),
    }:
        pytest.skip("plan_kv_cache tries vLLM 0.33's module, then 0.32's")
    if name == "Worker":
        pytest.skip("of GPUs")
    owner = importlib.import_module(module)
    assert hasattr(owner, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} no longer has {name}"


def test_attributes_exist(names):
    assert not names.missing, "vLLM no longer has " + "; ".join(sorted(names.missing))


def test_every_attribute_has_an_owner(names):
    """A new name of vLLM fails here until its owner is in one of the tables above."""
    assert not names.unowned, sorted(names.unowned)


def test_the_names_are_few(names, record_property):
    """Names of ``vllm.v1``, which has no stable interface, each counted once; the goal is 150."""
    attrs = {attr for cls, attr in names.used if getattr(cls, "__module__", "").startswith("vllm.v1") and attr[:2] != "__"}
    imported = {name for module, name in imports() if module.startswith("vllm.v1")}
    every = {attr for _, attr in names.used} | {name for _, name in imports()}
    record_property("names_of_vllm", len(attrs | imported))
    print(f"{len(attrs | imported)} names of vllm.v1 ({len(attrs)} attributes), {len(every)} of vLLM")
    assert len(attrs | imported) <= 207


def test_an_attribute_that_vllm_does_not_have_is_seen(names, monkeypatch):
    """The planted errors: vLLM renames an attribute; the backend uses a new one."""
    known = attributes(InputBatch) - {"expanded_local_pos"}
    monkeypatch.setattr("tests.vllm_names.attributes", lambda cls: known if cls is InputBatch else attributes(cls))
    assert any("expanded_local_pos" in entry for entry in Names(OWNERS, FIELDS, BASES).missing)
    without = {name: classes for name, classes in OWNERS.items() if name != "batch"}
    assert any(attr == "expanded_local_pos" for _, _, attr in Names(without, FIELDS, BASES).unowned)


# -- signatures of what is called, overridden or replaced ---------------------------------------------------------------


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def written_parameters(module: str, function: str) -> set[str]:
    """Return a function's parameters from the source of vLLM's module: cpu.py may have replaced it in this process."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"vllm.v1.worker.{module}")))
    [found] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    return {argument.arg.removesuffix("_ptr") for argument in found.args.args}


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a CPU replaces kernels; vLLM 0.33 is not used on one")
@pytest.mark.parametrize(("module", "kernel"), [(module, kernel) for module, all_ in cpu.KERNELS.items() for kernel in all_])
def test_replaced_kernels_have_the_parameters_that_are_taken(module, kernel):
    assert set(parameters(cpu.KERNELS[module][kernel])) <= written_parameters(module, kernel) | {"grid"}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (GPUModelRunner.__init__, "self vllm_config device"),
        (GPUModelRunner.sample, "self hidden_states input_batch grammar_output"),
        (GPUModelRunner.postprocess_sampled, "self idx_mapping sampled_tokens num_sampled num_rejected query_start_loc"),
        (StructuredOutputsWorker.apply_grammar_bitmask, "self logits input_batch grammar_req_ids grammar_bitmask"),
        (Scheduler.update_from_output, "self scheduler_output model_runner_output"),
        (Scheduler.add_request, "self request"),
        (Scheduler.finish_requests, "self request_ids finished_status"),
        (Scheduler.set_pause_state, "self pause_state"),
        (KVCacheManager.cache_blocks, "self request num_computed_tokens"),
        (KVCacheManager.evict_blocks, "self block_ids"),
        (KVCacheManager.get_blocks, "self request_id"),
        (SamplingStates.apply_temperature, "self logits expanded_idx_mapping idx_mapping_np"),
        (
            Sampler.apply_sampling_params,
            """self logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids expanded_local_pos
            seq_lens_upper_bound_np skip_top_k_top_p""",
        ),
        (WorkerBase.load_model, "self load_dummy_weights"),
        (WorkerBase.execute_model, "self scheduler_output"),
    ],
    ids=lambda value: getattr(value, "__qualname__", "")[:40],
)
def test_functions_take_these_parameters(function, expected):
    assert parameters(function) == expected.split()


@pytest.mark.parametrize(
    ("base", "methods"),
    [
        (
            Scheduler,
            "make_spec_decoding_stats schedule reset_prefix_cache _free_request has_requests has_finished_requests shutdown",
        ),
        (Worker, "init_device determine_available_memory initialize_from_config compile_or_warm_up_model sample_tokens"),
        (Worker, "set_kv_cache_layout _maybe_get_memory_pool_context sleep wake_up shutdown"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_overridden_methods_exist(base, methods):
    assert set(methods.split()) <= set(dir(base))


def test_what_is_built_has_these_fields():
    def fields(cls) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}

    assert {"sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected"} <= fields(SamplerOutput)
    known = {"sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected", "sampling_mask_tensors"}
    assert fields(SamplerOutput) <= known, "the sampler may have to fill a new field"
    assert {"num_blocks", "kv_cache_tensors", "kv_cache_groups"} <= fields(KVCacheConfig)
    assert {"layer_names", "kv_cache_spec"} <= fields(KVCacheGroupSpec)
    assert {"request_id", "new_token_ids", "finish_reason", "stop_reason"} <= set(EngineCoreOutput.__struct_fields__)
    assert "outputs" in EngineCoreOutputs.__struct_fields__
    assert {"FINISHED_ABORTED", "FINISHED_ERROR"} <= set(RequestStatus.__members__)
    assert "ERROR" in FinishReason.__members__
    assert {"vllm_config", "kv_cache_config"} <= set(parameters(Scheduler.__init__))
    assert "__slots__" not in vars(SchedulerOutput), "SchedulerOutput can no longer carry the pair's step as an attribute"
    assert isinstance(KVCacheConfig.needs_kv_cache_zeroing, property)
    assert "kv_cache_config.needs_kv_cache_zeroing" in inspect.getsource(Scheduler.__init__)
    assert "kv_cache_config.needs_kv_cache_zeroing" in inspect.getsource(Worker.initialize_from_config)


def test_the_runner_calls_what_the_pair_replaces():
    """`PairWorker` sets ``runner.sample``, and relies on the bookkeeping that the runner does after it."""
    source = inspect.getsource(GPUModelRunner.sample_tokens)
    assert "self.sample(" in source
    assert "self.postprocess_sampled(" in source
    assert "self.execute_model_state" in source
    assert "self.sampler.penalties_state.output_bin_counts" in inspect.getsource(GPUModelRunner.postprocess_sampled)


def test_weights_are_a_part_of_the_memory_profile_that_the_runner_reports():
    """Regression: only the teacher's weights were counted, and the KV caches took the memory of the student's."""
    runners = {name: SimpleNamespace(model_memory_usage=m, profile_run=None) for name, m in (("model", 5), ("student", 3))}
    worker = SimpleNamespace(model_runner=runners["model"], student_runner=runners["student"])
    with TwoModelWorker._profile_both(worker):
        assert worker.model_runner.model_memory_usage == 8
    assert worker.model_runner.model_memory_usage == 5


def test_experts_are_packed_only_with_their_kernel_and_gpt_oss_copies_its_own():
    """Reasons for `osd.engine.backend.experts._forget_kernel`, and for refusing to train gpt-oss."""
    from vllm.model_executor.models.gpt_oss import GptOssModel

    again, first = inspect.getsource(UnquantizedFusedMoEMethod._setup_kernel).split("if not is_weight_update:")
    assert "fused_experts.process_weights_after_loading(layer)" in first
    assert "fused_experts" not in again
    assert "param.copy_(narrow_weight)" in inspect.getsource(GptOssModel._load_weights_other)


# -- what acts on a request's tokens ------------------------------------------------------------------------------------

# Every field of SamplingParams that does not act on logits, by what it does instead.
NOT_ACTING = {
    "passed to both models' logits, or to the draw": "temperature seed",
    "ends a request": "stop stop_token_ids ignore_eos max_tokens repetition_detection _eos_token_id _all_stop_token_ids",
    "text and transport": """detokenize skip_special_tokens spaces_between_special_tokens include_stop_str_in_output
        output_kind stream_interval skip_clone output_text_buffer_length flat_logprobs extra_args""",
    "masks log q*, through the grammar of the step": "structured_outputs",
    "refused": "n prompt_logprobs trace_decode_token_ids",
    "of prompt_logprobs, which are refused": "prompt_logprob_token_ids prompt_logprob_start",
    "derived from bad_words": "_bad_words_token_ids",
    "of engines with a watermark_config, which PairConfig refuses": "watermarking _watermarking_skipped",
    "caches and experts": "skip_reading_prefix_cache routed_experts_prompt_start",
}


def test_every_sampling_parameter_is_classified():
    """A new field may act on logits, and the kernels draw only where nothing else acts on q*."""
    acting, others = set(_ACTING), {name for text in NOT_ACTING.values() for name in text.split()}
    assert not acting & others
    fields = set(SamplingParams.__struct_fields__)
    assert fields - acting - others == set(), "new fields of SamplingParams"
    assert acting <= fields, "vLLM no longer has these"


def test_defaults_do_not_act():
    params = SamplingParams()
    assert not [name for name, inactive in _ACTING.items() if getattr(params, name) not in inactive]


def test_engine_arguments_that_act_on_tokens_are_known():
    """Arguments of the engine that change what is sampled, or what a sampler must return."""
    names = "logits_processors logprobs_mode watermark_config return_sampling_mask enable_trace_replay"
    assert set(names.split()) <= set(EngineArgs.__dataclass_fields__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel for CPUs")
def test_the_rotary_kernel_of_cpus_still_takes_heads_for_tokens():
    """Otherwise cpu._rotate can go."""
    torch.manual_seed(0)
    flat, table, positions = torch.randn(6, 2 * 32), torch.randn(64, 32), torch.arange(6)
    by_head = flat.clone().view(6, 2, 32)
    rotated = RotaryEmbedding.forward_static(positions, flat, None, 32, 32, table, True)[0]
    for query in (flat, by_head):
        vllm_ops.rotary_embedding(positions, query, query.clone(), 32, table, True)
    torch.testing.assert_close(flat, rotated)
    assert not torch.allclose(by_head.flatten(1), rotated, atol=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a router for CPUs")
def test_the_router_of_cpus_still_forgets_the_bias_of_experts_without_groups():
    """Otherwise cpu._with_bias can go; with it, the experts are those of the largest biased scores."""
    source = importlib.util.find_spec("vllm.model_executor.layers.fused_moe.router.cpu_router")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)  # a copy, which cpu.py has not changed
    scores, bias = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([0.35, 0.0, 0.0, 0.0])
    router = module.CPURouter(top_k=2, global_num_experts=4, e_score_correction_bias=bias)

    def chosen(route):
        weights, ids = route(router, None, scores.log(), None)
        return dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))

    assert chosen(module.CPURouter._compute_routing).keys() == {2, 3}
    assert chosen(cpu._with_bias(module.CPURouter._compute_routing)) == pytest.approx({0: 0.2, 3: 0.8})


def test_shared_memory_of_cpu_ranks_is_still_named_after_the_last_colon(monkeypatch):
    """Otherwise cpu.init_method_of_this_run has no effect, or can go."""
    worker = pytest.importorskip("vllm.v1.worker.cpu_worker").CPUWorker
    assert 'init_method.split(":")[-1]' in inspect.getsource(worker.init_device)
    monkeypatch.setattr(cpu, "_is_cpu", lambda: True)
    monkeypatch.setenv("MASTER_PORT", "29999")
    assert cpu.init_method_of_this_run("env://").split(":")[-1] == "29999"
    assert cpu.init_method_of_this_run("file:///tmp/x") == "file:///tmp/x"


# -- versions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.25.1", "0.31.0", "0.34.0", "1.0.0"])
def test_other_versions_are_refused_naming_what_works(monkeypatch, version):
    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", version))
    with pytest.raises(ImportError, match=rf"0\.32 to 0\.33, and vllm {re.escape(version)} is installed.*vllm==0\.33"):
        versions.check_vllm()


def test_a_missing_vllm_is_reported(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "version", missing)
    with pytest.raises(ImportError, match="none is installed"):
        versions.check_vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.2"])
def test_supported_versions_pass(monkeypatch, version):
    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", version))
    assert versions.check_vllm() == version
