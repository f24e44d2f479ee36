"""Every name of vLLM's internals that the pair relies on: an upgrade fails here first, in words."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import metadata
from types import SimpleNamespace

import pytest
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationConfig
from vllm.forward_context import ForwardContext
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from osd.engine.backend import versions
from osd.engine.worker import PairWorker


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def attributes(cls) -> set[str]:
    """Names that a class defines or assigns on ``self`` in a constructor, its own or inherited."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__[:-1] if inspect.isfunction(vars(base).get("__init__"))]
    assigned = {name for init in constructors for name in re.findall(r"self\.(\w+)\s*[:=]", inspect.getsource(init))}
    return set(dir(cls)) | assigned


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (Scheduler, "requests running finished_req_ids kv_cache_manager max_model_len connector num_spec_tokens use_pp"),
        (Scheduler, "schedule update_from_output add_request finish_requests reset_prefix_cache has_requests"),
        (Scheduler, "_free_request _preempt_request has_finished_requests set_pause_state shutdown lora_config"),
        (Scheduler, "kv_cache_config block_size current_step get_request_counts _pause_state reset_preempted_req_ids"),
        (Scheduler, "_get_new_block_ids_to_zero ec_connector"),
        (AsyncScheduler, "_update_after_schedule _update_request_with_output"),
        (Request, "num_output_placeholders num_in_flight_tokens num_output_tokens append_output_token_ids status"),
        (Request, "num_computed_tokens is_prefill_chunk num_tokens _block_hasher sampling_params max_tokens stop_reason"),
        (Request, "mm_features prompt_embeds resumable cache_salt priority client_index arrival_time num_preemptions"),
        (KVCacheManager, "get_blocks evict_blocks allocate_slots cache_blocks block_pool new_step_starts"),
        (KVCacheManager, "get_num_common_prefix_blocks"),
        (BlockPool, "get_num_free_blocks"),
        (Worker, "init_device load_model determine_available_memory initialize_from_config compile_or_warm_up_model"),
        (Worker, "shutdown"),
        (Worker, "execute_model sample_tokens vllm_config model_config cache_config scheduler_config compilation_config"),
        (GPUModelRunner, "sampler input_batch requests execute_model_state discard_request_mask profile_run"),
        (GPUModelRunner, "_prepare_inputs use_async_scheduling uses_mrope enable_prompt_embeds lora_config num_spec_tokens"),
        (GPUModelRunner, "supports_mm_inputs is_pooling_model use_aux_hidden_state_outputs cascade_attn_enabled eplb_state"),
        (GPUModelRunner, "_build_attention_metadata _model_forward _bookkeeping_sync synchronize_input_prep attn_groups"),
        (GPUModelRunner, "kv_connector_output kv_cache_config model"),
        (GPUModelRunner, "positions num_computed_tokens seq_lens query_start_loc input_ids optimistic_seq_lens_cpu"),
        (GPUModelRunner, "execute_model sample_tokens get_kv_cache_spec get_model _init_kv_zero_meta _zero_block_ids"),
        (InputBatch, "req_ids num_reqs generators sampling_metadata prev_sampled_token_ids prev_req_id_to_index block_table"),
        (InputBatch, "token_ids_cpu is_token_ids num_tokens_no_spec num_computed_tokens_cpu"),
        (InputBatch, "req_id_to_index refresh_metadata"),
        (MultiGroupBlockTable, "append_row commit_block_table compute_slot_mapping"),
        (LRUCacheWorkerLoRAManager, "_adapter_manager add_dummy_lora pin_adapter"),
        (LRUCacheLoRAModelManager, "model modules packed_modules _last_mapping"),
        (BaseLinearLayerWithLoRA, "base_layer n_slices set_lora reset_lora"),
        (GPUModelRunner, "lora_config pin_lora shutdown"),
        (TorchCompileWithNoGuardsWrapper, "cleanup"),
        (LogitsProcessors, "all argmax_invariant"),
        (Sampler, "forward sample apply_temperature logprobs_mode"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value[:20],
)
def test_classes_have_what_the_pair_uses(cls, names):
    missing = set(names.split()) - attributes(cls)
    assert not missing, f"vLLM's {cls.__name__} no longer has {sorted(missing)}"


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (SchedulerOutput, "total_num_scheduled_tokens scheduled_cached_reqs num_common_prefix_blocks finished_req_ids"),
        (SchedulerOutput, "has_structured_output_requests"),
        (CachedRequestData, "req_ids resumed_req_ids new_token_ids all_token_ids new_block_ids num_computed_tokens"),
        (CachedRequestData, "num_output_tokens"),
        (SchedulerOutput, "num_scheduled_tokens scheduled_new_reqs new_block_ids_to_zero preempted_req_ids"),
        (NewRequestData, "req_id sampling_params num_computed_tokens"),
        (ModelRunnerOutput, "req_ids req_id_to_index sampled_token_ids logprobs prompt_logprobs_dict pooler_output"),
        (SamplingMetadata, "temperature all_greedy all_random top_k top_p generators logitsprocs max_num_logprobs"),
        (SamplingMetadata, "no_penalties allowed_token_ids_mask bad_words_token_ids logprob_token_ids"),
        (SamplingMetadata, "thinking_budget_state_holder"),
        (CachedRequestState, "output_token_ids block_ids"),
        (ForwardContext, "attn_metadata cudagraph_runtime_mode batch_descriptor"),
        (CompilationConfig, "cudagraph_specialize_lora"),
        (FullAttentionSpec, "block_size num_kv_heads head_size dtype sliding_window"),
    ],
)
def test_dataclasses_have_the_fields_the_pair_uses(cls, names):
    missing = set(names.split()) - {field.name for field in dataclasses.fields(cls)}
    assert not missing, f"vLLM's {cls.__name__} no longer has {sorted(missing)}"


def test_a_step_still_splits_into_forward_and_sampling():
    assert {"logits", "sample_hidden_states", "scheduler_output"} <= set(ExecuteModelState._fields)
    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "discard_request_mask.np" in source, "a discarded row is no longer named by discard_request_mask"
    assert "stop_reason" in EngineCoreOutput.__struct_fields__


def test_weights_are_a_part_of_the_memory_profile_that_the_runner_tells():
    """Regression: vLLM 0.26 counted the teacher's weights alone, and the KV caches took the memory of the student's."""
    assert "self.model_runner.model_memory_usage" in inspect.getsource(Worker.determine_available_memory)
    runners = {"model_runner": 5, "student_runner": 3}
    worker = SimpleNamespace(**{n: SimpleNamespace(model_memory_usage=m, profile_run=None) for n, m in runners.items()})
    with PairWorker._profile_runs_include_student(worker):
        assert worker.model_runner.model_memory_usage == 8
    assert worker.model_runner.model_memory_usage == 5


def test_a_forward_pass_is_set_up_as_it_is_watched():
    """SteadyForward sees a step of vLLM's by the two calls it makes, whose arguments must all be named."""
    source = inspect.getsource(GPUModelRunner.execute_model)
    for call in ("self._build_attention_metadata(", "self._model_forward("):
        [arguments] = [part.split(")\n", 1)[0] for part in source.split(call)[1:]]
        assert all(
            "=" in line or line.strip().startswith(("**", "if ", "else ")) for line in arguments.split(",\n") if line.strip()
        )
    assert "set_forward_context(" in source
    assert {"hidden_states"} <= set(ExecuteModelState._fields)


def test_nothing_that_a_step_carries_is_unknown_to_steady_decoding():
    """A step is moved on where nothing else is new; a new field may be such a thing."""
    known = "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens total_num_scheduled_tokens finished_req_ids"
    known += " scheduled_spec_decode_tokens scheduled_encoder_inputs num_common_prefix_blocks free_encoder_mm_hashes"
    known += " scheduled_encoder_input_stats preempted_req_ids has_structured_output_requests num_invalid_spec_tokens"
    known += " pending_structured_output_tokens kv_connector_metadata ec_connector_metadata ec_manager_metadata"
    known += " has_sync_kv_loads aux_output_connector_metadata kv_connector_block_state new_block_ids_to_zero"
    known += " kv_cache_block_copies block_table_updates num_spec_tokens_to_schedule"
    assert {field.name for field in dataclasses.fields(SchedulerOutput)} <= set(known.split())


def test_nothing_that_acts_on_logits_is_unknown_to_the_sampler():
    """The sampler lets the kernels draw only where it knows that nothing else acts on q*: a new field may be such a thing."""
    known = "temperature all_greedy all_random top_p top_k generators max_num_logprobs no_penalties prompt_token_ids"
    known += " frequency_penalties presence_penalties repetition_penalties output_token_ids allowed_token_ids_mask"
    known += " bad_words_token_ids logitsprocs logprob_token_ids spec_token_ids thinking_budget_state_holder"
    assert {field.name for field in dataclasses.fields(SamplingMetadata)} <= set(known.split())
    for processor, idle in ((MinPLogitsProcessor, "min_p_count"), (LogitBiasLogitsProcessor, "biases")):
        assert idle in attributes(processor)
    assert "min_toks" in attributes(MinTokensLogitsProcessor)


def test_an_adapter_has_the_place_that_it_is_written_to():
    source = inspect.getsource(BaseLinearLayerWithLoRA.create_lora_weights)
    assert {"lora_a_stacked", "lora_b_stacked"} <= set(re.findall(r"self\.(\w+) = ", source))
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in inspect.getsource(GPUModelRunner.load_lora_model)
    assert "lora_request" in parameters(Request.__init__)


def test_a_row_in_flight_is_fed_from_the_device():
    source = inspect.getsource(GPUModelRunner._prepare_input_ids)
    assert "prev_sampled_token_ids" in source, "input ids of rows in flight come from elsewhere"
    assert "prev_req_id_to_index" in inspect.getsource(GPUModelRunner._compute_prev_positions)


def test_a_scheduler_output_carries_our_plan_to_other_processes():
    assert "__slots__" not in vars(SchedulerOutput), "SchedulerOutput can no longer carry the pair's step as an attribute"


def test_schedulers_are_built_as_the_pair_builds_its_second_one():
    assert {"vllm_config", "kv_cache_config"} <= parameters(Scheduler.__init__)


@pytest.mark.parametrize("version", ["0.25.1", "0.32.0", "1.0.0"])
def test_other_versions_are_refused_naming_what_works(monkeypatch, version):
    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", version))
    with pytest.raises(ImportError, match=rf"0\.26 to 0\.31, and vllm {re.escape(version)} is installed"):
        versions.check_vllm()


def test_no_vllm_at_all_is_said_so(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "version", missing)
    with pytest.raises(ImportError, match="none is installed"):
        versions.check_vllm()


@pytest.mark.parametrize("version", ["0.26.0", "0.28.3", "0.31.0+cpu"])
def test_supported_versions_pass(monkeypatch, version):
    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", version))
    assert versions.check_vllm() == version
