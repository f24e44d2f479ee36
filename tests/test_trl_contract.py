"""Names private to TRL that OSD uses: an upgrade of TRL that changes one fails here first.

The message of a failed assertion says how OSD uses the name. Change that place, then this test, then `trainers/_compat.py`.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from trl import DistillationConfig, DistillationTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import distillation_trainer
from trl.trainer import utils as trl_utils

ROOT = Path(__file__).parent.parent


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(function):
    """Source on one line, so that a pattern can span lines."""
    return re.sub(r"\s+", " ", inspect.getsource(function))


# -- trl.generation.vllm_generation: inherited and replaced by OSDGeneration ---------------------------------------------


def test_the_generators_constructor_takes_what_osd_gives_it():
    assert set(parameters(VLLMGeneration.__init__)) >= {
        "model",
        "accelerator",
        "processing_class",
        "mode",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_completion_length",
        "generation_kwargs",
    }, "OSDGeneration.__init__ passes these on"


def test_the_generator_starts_its_engine_in_one_overridable_method():
    assert parameters(VLLMGeneration._init_vllm) == ["self"], "OSDGeneration overrides _init_vllm to start the pair"
    init = source(VLLMGeneration.__init__)
    assert init.count("self._init_vllm()") == 1, "the constructor is expected to call _init_vllm once"
    assert "LLM(" not in init, "the constructor is expected to build no engine outside _init_vllm"


def test_the_generators_contract():
    assert parameters(VLLMGeneration.sync_weights) == ["self"]
    assert parameters(VLLMGeneration.generate) == ["self", "prompts", "images", "num_generations", "profiler"]
    returned = "return prompt_ids, completion_ids, logprobs, logprob_token_ids"
    assert returned in source(VLLMGeneration.generate), "OSDGeneration.generate returns the same four"


def test_the_walk_over_the_parameters_needs_only_what_osd_sets():
    assert parameters(VLLMGeneration._iter_named_params) == ["self"]
    walk = [
        VLLMGeneration._iter_named_params,
        VLLMGeneration._iter_fsdp_params,
        VLLMGeneration._iter_fsdp1_params,
        VLLMGeneration._iter_fsdp2_params,
        VLLMGeneration._fix_param_name_to_vllm,
    ]
    used = {name for function in walk for name in re.findall(r"self\.(\w+)", source(function))}
    assert {name for name in used if not name.startswith(("_iter", "_fix"))} == {"model", "accelerator", "_dist"}, (
        "sync_weights() walks the parameters without an LLM"
    )


def test_the_walk_merges_adapters_before_and_unmerges_them_after():
    walk = source(VLLMGeneration._iter_named_params)
    assert walk.index("merge_adapter()") < walk.index("yield") < walk.index("unmerge_adapter()"), (
        "OSDGeneration unmerges after a sync that failed in between"
    )


# -- trl.trainer.distillation_trainer: overridden by OSDTrainer ----------------------------------------------------------


def test_the_overridden_methods_have_their_signatures():
    assert parameters(DistillationTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(DistillationTrainer._compute_loss) == ["self", "unwrapped_student", "inputs", "num_items_in_batch"]
    assert parameters(DistillationTrainer._set_signature_columns_if_needed) == ["self"]
    assert parameters(DistillationTrainer._tokenize_prompts) == ["self", "prompts"]
    assert "return prompt_ids, images, multimodal_fields" in source(DistillationTrainer._tokenize_prompts)
    assert parameters(DistillationTrainer.prediction_step)[:4] == ["self", "model", "inputs", "prediction_loss_only"]
    assert parameters(Trainer._save) == ["self", "output_dir", "state_dict"], "OSDTrainer repairs the generation config there"
    assert parameters(DistillationTrainer.log) == ["self", "logs", "start_time"]
    assert parameters(DistillationTrainer._get_last_hidden_state)[:5] == [
        "self",
        "unwrapped_model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
    ]


def test_a_step_takes_its_batches_from_one_iterator_of_the_epoch():
    """`Lookahead` reads ahead of these calls, and OSDTrainer knows a batch that was begun by its identity."""
    assert parameters(Trainer.get_batch_samples) == ["self", "epoch_iterator", "num_batches", "device"]
    epoch = source(Trainer._run_epoch)
    assert epoch.count("epoch_iterator = iter(train_dataloader)") == 1
    assert epoch.count("self.get_batch_samples(epoch_iterator, num_batches, self.args.device)") == 1
    assert "next(epoch_iterator" not in epoch
    assert "batch_samples.append(next(epoch_iterator))" in source(Trainer.get_batch_samples)
    assert "num_items_in_batch = self._get_num_items_in_batch(batch_samples, device)" in source(Trainer.get_batch_samples)
    assert "inputs = self._prepare_inputs(inputs)" in source(Trainer.training_step)
    assert "self._generate_and_score_completions(generation_batch)" in source(DistillationTrainer._prepare_inputs)


def test_a_trainer_without_a_teacher_is_legal():
    init = source(DistillationTrainer.__init__)
    assert "else: self.teacher_model = None" in init, "OSDTrainer passes teacher_model=None: no second teacher is loaded"


def test_the_generator_is_built_inline_when_use_vllm_is_set():
    init = source(DistillationTrainer.__init__)
    assert init.count("VLLMGeneration(") == 1
    assert init.index("self.use_vllm = args.use_vllm") < init.index("if self.use_vllm:") < init.index("VLLMGeneration("), (
        "OSDTrainer calls the constructor with args.use_vllm=False and puts its own generator in afterwards"
    )
    assert init.count("args.use_vllm") == 1, "nothing else in the constructor is expected to depend on use_vllm"


def test_completions_come_from_sync_and_generate():
    turn = source(DistillationTrainer._generate_single_turn)
    assert "if self.state.global_step != self._last_loaded_step:" in turn, "OSDTrainer sets _last_loaded_step=-1 to sync"
    assert turn.index("self.vllm_generation.sync_weights()") < turn.index("self._last_loaded_step = self.state.global_step"), (
        "a sync that fails must be tried again"
    )
    assert "_, completion_ids, _, _ = self.vllm_generation.generate( prompts=prompt_ids, images=images," in turn, (
        "the ids that TRL tokenized are the ids that the engine's student reads"
    )
    assert source(DistillationTrainer._generate).count("_generate_single_turn(") == 1, (
        "teacher_reads() covers one generate() call"
    )


def test_prompts_are_tokenized_as_osd_tokenizes_the_teachers():
    tokenize = source(DistillationTrainer._tokenize_prompts)
    assert 'self.processing_class(text=prompts)["input_ids"]' in tokenize
    assert "add_generation_prompt=True" in tokenize
    assert "**self.chat_template_kwargs" in tokenize
    assert "truncation" not in tokenize, "a truncated student prompt would not be the one of the dataset"


def test_the_batch_has_the_keys_that_osd_reads_and_replaces():
    output = source(DistillationTrainer._generate_and_score_completions)
    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch"):
        assert f'"{key}": ' in output, f"OSDTrainer reads or replaces output[{key!r}]"
    assert 'padding_side="right"' in output, "the recorded hidden states are padded on the right, like completion_ids"


def test_losses_are_computed_from_these_returned_values():
    assert "loss, entropy_sum, num_valid_tokens = self._forward_redirection(" in source(DistillationTrainer.compute_loss)
    assert 'inputs["num_items_in_batch"]' in source(DistillationTrainer.compute_loss)
    assert parameters(ChunkedDivergenceFunction.forward)[1:] == [
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
        "beta",
        "temperature",
        "student_logit_scale",
        "student_final_logit_softcapping",
        "teacher_logit_scale",
        "teacher_final_logit_softcapping",
    ], "osd.train.divergence.token_divergence calls it with these, in this order"
    assert "return divergence, entropy" in source(ChunkedDivergenceFunction.forward), "both per token"


def test_a_second_teacher_is_loaded_and_run_as_trl_does():
    assert parameters(distillation_trainer.create_model_from_path) == ["model_id", "architecture", "kwargs"]
    init, loss = source(DistillationTrainer.__init__), source(DistillationTrainer._compute_loss)
    assert "self.teacher_model = prepare_deepspeed(teacher_model, self.accelerator)" in init
    assert "self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)" in init
    assert "self._forward_redirection( self.teacher_model, unwrapped_teacher, self._get_last_hidden_state," in loss


def test_logit_scales_have_the_names_that_osd_looks_for():
    names = set(re.findall(r'student_config, "(\w+)"', source(DistillationTrainer._compute_loss)))
    assert names == {
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
        "final_logit_softcapping",
    }, "osd.train.losses.logit_scale knows the same names"


@pytest.mark.parametrize("name", ["_tokenizer", "_is_vlm", "_metrics", "_logs", "temperature", "top_p", "top_k", "min_p"])
def test_the_attributes_that_osd_reads_are_set(name):
    assert f"self.{name}" in source(DistillationTrainer.__init__), f"OSDTrainer uses self.{name}"


# -- buffering: what is added travels with the batch ---------------------------------------------------------------------


def test_tensors_and_lists_are_shuffled_and_split_together():
    rows = torch.arange(6)
    batch = {"prompt_ids": rows[:, None], "teacher_hidden": [None, *rows[1:].unbind()], "n": torch.tensor(6.0)}
    chunks = trl_utils.split_tensor_dict(trl_utils.shuffle_sequence_dict(batch), 3)
    assert len(chunks) == 3
    for chunk in chunks:
        assert [h or 0 for h in chunk["teacher_hidden"]] == chunk["prompt_ids"][:, 0].tolist()
        assert chunk["n"] == 6


def test_the_batch_is_generated_once_per_optimizer_step():
    prepare = source(DistillationTrainer._prepare_inputs)
    assert "generate_every = self.args.gradient_accumulation_steps" in prepare
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in prepare
    assert "inputs = self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]" in prepare, (
        "OSDTrainer hands out the same buffer again when num_iterations is over 1"
    )


def test_prompts_can_be_repeated_for_every_iteration():
    assert "return RepeatSampler(" in source(DistillationTrainer._get_train_sampler)
    repeats = source(trl_utils.RepeatSampler)
    assert "for _ in range(self.repeat_count)" in repeats, "OSDTrainer multiplies repeat_count"
    assert parameters(trl_utils.repeat_iterable_dataset) == ["dataset", "mini_repeat_count", "batch_size", "repeat_count"]
    loader = source(DistillationTrainer.get_train_dataloader)
    assert "dataset = self.train_dataset" in loader
    assert loader.index("if self.shuffle_dataset: dataset = dataset.shuffle(seed=self.args.seed)") < loader.index(
        "= repeat_iterable_dataset("
    )


# -- logging -------------------------------------------------------------------------------------------------------------


def test_completion_logging_can_be_taken_over():
    log = source(DistillationTrainer.log)
    assert "if self.accelerator.is_main_process and self.log_completions:" in log, "OSDTrainer.log turns it off around TRL's"
    assert parameters(trl_utils.print_prompt_completions_sample)[:6] == [
        "prompts",
        "completions",
        "rewards",
        "advantages",
        "step",
        "num_samples",
    ]


def test_the_config_fields_that_osd_maps_or_refuses_exist():
    fields = DistillationConfig.__dataclass_fields__
    for name in (
        "teacher_model_name_or_path",
        "teacher_model_revision",
        "teacher_model_init_kwargs",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_model_impl",
        "vllm_tensor_parallel_size",
        "vllm_mode",
        "vllm_enable_sleep_mode",
        "vllm_structured_outputs_regex",
        "vllm_server_base_url",
        "cache_implementation",
        "max_tool_calling_iterations",
        "ds3_gather_for_generation",
        "chat_template_kwargs",
    ):
        assert name in fields, f"OSDConfig uses DistillationConfig.{name}"


# -- transformers and torch: resuming ------------------------------------------------------------------------------------


def test_transformers_still_rotates_checkpoints_before_they_are_known_to_be_whole():
    """osd.train.checkpointing does it afterwards, with the same function."""
    assert parameters(rotate_checkpoints) == [
        "output_dir",
        "save_total_limit",
        "best_model_checkpoint",
        "use_mtime",
        "checkpoint_prefix",
    ]
    assert "save_total_limit=self.args.save_total_limit" in source(Trainer._save_checkpoint)


def test_trls_sampler_still_forgets_the_epoch():
    """osd.train.checkpointing.EpochSampler can go when TRL's has a `set_epoch`."""
    assert not hasattr(trl_utils.RepeatSampler, "set_epoch")


def test_torch_still_cannot_map_to_a_numbered_cpu():
    """osd.train._compat.restore_numbered_cpus can go when this passes in a process without it."""
    code = """
import io, torch
data = io.BytesIO(); torch.save(torch.ones(2), data); data.seek(0)
try:
    torch.load(data, map_location=torch.device("cpu:1"))
except RuntimeError as error:
    assert "tagged with cpu:1" in str(error)
    import osd.train
    data.seek(0)
    assert torch.equal(torch.load(data, map_location=torch.device("cpu:1")), torch.ones(2))
    print("patched")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.endswith("patched\n")
