"""The loss and the sync under DeepSpeed ZeRO-3, with a stand-in for DeepSpeed: all they see of it is a status and a gather.

Runs with the real one, in two processes, are in tests/test_launch.py. What went wrong in the loss: TRL's asks every weight for
its status, and the engine's own head, a plain tensor, has none.
"""

import contextlib
import enum
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from osd.engine.topk import top_k
from osd.generation import OSDGeneration
from osd.train import divergence as divergence_module
from osd.train.divergence import DIVERGENCES, Divergence, token_divergence, token_logprobs
from osd.train.lm_head import TopK, on_shared_vocabulary
from osd.validate_models import student_layout
from tests.heads import H_S, H_T, V, head
from tests.training import NOISE, STUDENT_PROMPTS, disagreement, perturb

ZeroParamStatus = enum.Enum("ZeroParamStatus", "NOT_AVAILABLE AVAILABLE")


@contextmanager
def gathered_parameters(parameters):
    for parameter in parameters:
        parameter.data, parameter.ds_status = parameter.ds_whole.clone(), ZeroParamStatus.AVAILABLE
    yield
    for parameter in parameters:
        parameter.data.fill_(float("nan"))  # the next parameter's memory, or nobody's
        parameter.data, parameter.ds_status = torch.empty(0), ZeroParamStatus.NOT_AVAILABLE


def in_shards(whole):
    """A parameter as ZeRO-3 leaves it: a placeholder without elements."""
    parameter = torch.nn.Parameter(whole.clone())
    # DeepSpeed too makes the accumulator while the parameter is whole: it keeps the shape that gradients must have.
    parameter.ds_accumulator = parameter.view_as(parameter).grad_fn.next_functions[0][0]
    parameter.ds_whole, parameter.ds_shape = whole.clone(), whole.shape
    parameter.data, parameter.ds_status = torch.empty(0), ZeroParamStatus.NOT_AVAILABLE
    parameter.ds_accumulator.register_prehook(lambda _: setattr(parameter, "data", parameter.ds_whole))  # and gathers it there
    return parameter


@pytest.fixture
def zero3(monkeypatch):
    names = ("deepspeed", "deepspeed.zero", "deepspeed.runtime", "deepspeed.runtime.zero")
    modules = {name: ModuleType(name) for name in (*names, "deepspeed.runtime.zero.partition_parameters")}
    modules["deepspeed"].__spec__ = ModuleSpec("deepspeed", None)  # accelerate asks for it
    modules["deepspeed"].zero = modules["deepspeed.zero"]
    modules["deepspeed.zero"].GatheredParameters = gathered_parameters
    modules["deepspeed.runtime.zero.partition_parameters"].ZeroParamStatus = ZeroParamStatus
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(divergence_module, "is_deepspeed_zero3_enabled", lambda: True)


def hidden():
    rng = torch.Generator().manual_seed(7)
    return torch.randn(6, H_S, generator=rng).requires_grad_(), torch.randn(6, H_T, generator=rng)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("topk", [False, True])
def test_a_student_in_shards_and_the_engines_teacher(zero3, kind, bias, topk):
    student, teacher = head(V, H_S, seed=1, bias=bias), head(V, H_T, seed=2, bias=bias)
    row_NX = top_k(hidden()[1] @ teacher.weight_VH.T, torch.ones(6), 3)
    with pytest.MonkeyPatch.context() as plainly:
        plainly.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: False)
        plainly.setattr(divergence_module, "is_deepspeed_zero3_enabled", lambda: False)
        whole = replace(student, weight_VH=student.weight_VH.clone().requires_grad_())
        theta, pi_t = hidden()
        pi_t, teacher = (row_NX, TopK(vocab_size=V)) if topk else (pi_t, teacher)
        expected, _ = token_divergence(theta, pi_t, whole, teacher, Divergence(kind=kind, beta=0.5))
        expected.sum().backward()
        wanted = theta.grad

    sharded = replace(student, weight_VH=in_shards(student.weight_VH), bias_V=in_shards(student.bias_V) if bias else None)
    theta, _ = hidden()
    got, _ = token_divergence(theta, pi_t, sharded, teacher, Divergence(kind=kind, beta=0.5))
    assert sharded.weight_VH.numel() == 0  # in shards again
    got.sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(theta.grad, wanted)
    torch.testing.assert_close(sharded.weight_VH.grad, whole.weight_VH.grad)


def test_log_probabilities_of_a_student_in_shards(zero3):
    student, token_N = head(V, H_S, seed=1), torch.arange(6)
    sharded = replace(student, weight_VH=in_shards(student.weight_VH))
    expected = token_logprobs(hidden()[0], student, token_N, 1.0)
    torch.testing.assert_close(token_logprobs(hidden()[0], sharded, token_N, 1.0), expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_in_shards_is_not_cut(side):
    heads = {"student": head(V, H_S), "teacher": head(V, H_T)}
    heads[side] = replace(head(V + 3, H_S), weight_VH=in_shards(head(V + 3, H_S).weight_VH))
    with pytest.raises(ValueError, match=f"the {side}'s lm_head has {V + 3} rows, and both models share {V}; under DeepSpeed"):
        on_shared_vocabulary(**heads)


# -- the sync -----------------------------------------------------------------------------------------------------------


def test_what_the_engine_must_be_given_is_known(zero3, tiny_pair, monkeypatch):
    """The model without weights that says so is neither sharded nor initialized, as transformers would have it."""
    shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_pretrained(tiny_pair[1]).named_parameters()}
    monkeypatch.setattr("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: True)
    from osd.engine.engine import PairConfig

    assert student_layout(PairConfig(teacher="none", student=str(tiny_pair[1]))).shapes == shapes


def shard(model):
    """Every parameter of the model as ZeRO-3 leaves it; gathered for each module's forward pass by hooks, as DeepSpeed does."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, in_shards(parameter.detach()))
        own = list(module.parameters(recurse=False))
        gather = contextlib.ExitStack()
        module.register_forward_pre_hook(lambda *_, own=own, gather=gather: gather.enter_context(gathered_parameters(own)))
        module.register_forward_hook(lambda *_, gather=gather: gather.close())
    return model


def test_a_student_in_shards_is_gathered_one_parameter_at_a_time(zero3, engine, tiny_pair):
    """The first sync, which is watched, and one by the map."""
    student = shard(AutoModelForCausalLM.from_pretrained(tiny_pair[1]))
    generation = OSDGeneration(student, Accelerator(), AutoTokenizer.from_pretrained(tiny_pair[1]), pair=engine)
    generation._dist.zero_stage = 3
    for step in range(2):
        whole = AutoModelForCausalLM.from_pretrained(tiny_pair[1]).eval()
        perturb(whole, seed=step)
        for parameter, value in zip(student.parameters(), whole.parameters(), strict=True):
            parameter.ds_whole.copy_(value.detach())
        generation.sync_weights()
        assert all(parameter.numel() == 0 for parameter in student.parameters())
        generation.generate(STUDENT_PROMPTS, None, 1)
        assert disagreement(whole, STUDENT_PROMPTS, generation.last_batch.completions, "logp_theta") < NOISE
