"""A pair that several training processes hold together, against one process that holds it alone.

In float32, with a seed for every prompt: the same tokens, records to 1e-4, losses and weights to 1e-3 of their size.
"""

import re
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from osd.colocated import check_groups
from osd.core import RECORD_FIELDS
from osd.engine.engine import PairConfig
from osd.engine.topk import ids_and_logprobs
from osd.validate_models import check_models
from tests.exact import completion_logits, log_probabilities
from tests.launched import sampled, weights_of
from tests.launches import ACCELERATE, fsdp_on_a_cpu, in_float32, launch
from tests.pairs import hard_prompts, preempted
from tests.tiny import tiny_model
from tests.training import logged


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory):
    """A vocabulary that no number of ranks divides: the last rank's shard is padded. Four heads, for up to four ranks."""
    root, shape = (
        tmp_path_factory.mktemp("odd"),
        {"vocab": 101, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32},
    )
    return tiny_model(root / "teacher", seed=1, **shape), tiny_model(root / "student", seed=2, **shape)


@pytest.fixture(scope="module")
def alone(engine, model_paths, tmp_path_factory):
    """The run of one process."""
    trainer, steps, _ = sampled(tmp_path_factory.mktemp("alone"), *map(str, model_paths), engine)
    return steps, logged(trainer, "loss"), weights_of(trainer)


def check_shared(out, done, alone, model_paths, processes):
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    ranks = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    steps, losses, weights = alone
    for number, expected in enumerate(steps):
        own = [seen["steps"][number] for seen in ranks]
        assert [len(rows) for rows in own] == [4 // processes] * processes
        together = {prompt: row for rows in own for prompt, row in rows.items()}
        assert together.keys() == expected.keys()
        for prompt, (ids, values, hidden) in expected.items():
            assert together[prompt][0] == ids
            torch.testing.assert_close(together[prompt][1], values, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together[prompt][2], hidden, atol=1e-3, rtol=1e-3)
    head = AutoModelForCausalLM.from_pretrained(model_paths[0]).lm_head.weight
    for seen in ranks:
        assert torch.equal(seen["head"], head)
        torch.testing.assert_close(seen["loss"], losses, rtol=1e-3, atol=1e-4)
        assert len(seen["gap"]) == 2
        assert seen["weights"].keys() == weights.keys()
        for name, tensor in seen["weights"].items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5)
    return ranks


def test_two_processes_hold_one_pair(alone, model_paths, models, tmp_path):
    """And planted errors: one rank's prompt, seed or student ends the call on both."""
    done = launch(ACCELERATE / "cpu_ddp.yaml", "tests/launched.py", "shared", tmp_path, *model_paths)
    ranks = check_shared(tmp_path, done, alone, model_paths, 2)
    whole = sum(parameter.numel() for parameter in models[1].parameters())
    for seen in ranks:
        assert seen["elements"] < 0.6 * whole
        for prompt, (ids, values, _) in seen["steps"][0].items():  # of the student's first weights
            logp = completion_logits(models[1], prompt, ids).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(values[:, RECORD_FIELDS.index("logp_theta")].double(), logp, atol=1e-4, rtol=0)
    assert ranks[0]["seed"] != ranks[1]["seed"]
    errors = [seen["planted"] for seen in ranks]
    assert errors[0]["drawn"] != errors[1]["drawn"]
    assert "token id 1000000 is not one of" in errors[0]["prompt"]
    assert errors[1]["prompt"].startswith("rank 0 of this tensor parallel group cannot sample: prompt 0")
    for seen in errors:
        assert re.search("ranks 0 and 1 .* drew different completions .* number 0 of 4", seen["seed"])
        assert seen["after"] == ""
        assert "the engine's student is not the student in training" in seen["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_four_processes_hold_two_pairs_or_one(alone, model_paths, tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("OSD_TEST_RANKS", str(ranks))
    config = in_float32("cpu_ddp", tmp_path / "four.yaml", num_processes=4)
    done = launch(config, "tests/launched.py", "shared", tmp_path, *model_paths)
    check_shared(tmp_path, done, alone, model_paths, 4)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 2])
def test_ranks_schedule_alike(model_paths, models, tmp_path, drafts):
    """Async scheduling, preemptions on both sides, prompts split differently: every rank runs its own schedulers."""
    (out := tmp_path / str(drafts)).mkdir()
    done = launch(ACCELERATE / "cpu_ddp.yaml", "tests/launched.py", "cramped", out, *model_paths)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    ranks = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert ranks[0]["seen"] == ranks[1]["seen"]
    assert preempted(Counter(ranks[0]["seen"]))
    prompts = hard_prompts()
    completions = ranks[0]["completions"] | ranks[1]["completions"]
    in_order = [completions[i] for i in range(len(prompts))]
    token_N1 = torch.tensor([token for c in in_order for token in c.token_ids])[:, None]
    for logp, name in zip(log_probabilities(models, prompts, in_order), ("logp_theta", "logp_teacher"), strict=True):
        recorded = torch.cat([getattr(c.record, name) for c in in_order])
        torch.testing.assert_close(recorded.double(), logp.gather(-1, token_N1)[:, 0], atol=1e-3, rtol=0)
    id_N5, topk_N6 = ids_and_logprobs(torch.cat([c.record.teacher_topk_TX for c in in_order]))
    rest_N1 = logp.scatter(-1, id_N5, -torch.inf).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(topk_N6.double(), torch.cat([logp.topk(5).values, rest_N1], -1), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_sharded_students_reach_the_shards_of_a_pair(alone, model_paths, tmp_path, monkeypatch, kind):
    """torch's and DeepSpeed's own, on a CPU."""
    if kind == "fsdp2":
        config, script = fsdp_on_a_cpu(tmp_path / "fsdp2.yaml"), ["tests/fsdp_cpu.py"]
    elif find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: make test-sharded")
    else:
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        config, script = in_float32("zero3", tmp_path / "zero3.yaml", num_processes=2, use_cpu=True), []
    done = launch(config, *script, "tests/launched.py", "shared", tmp_path, *model_paths)
    check_shared(tmp_path, done, alone, model_paths, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_gpus_hold_one_pair(alone, model_paths, tmp_path, monkeypatch, name, ranks):
    """With sleep."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    monkeypatch.setenv("OSD_TEST_RANKS", str(ranks))
    config = in_float32(name, tmp_path / f"{name}.yaml", num_processes=ranks)
    done = launch(config, "tests/launched.py", "shared", tmp_path, *model_paths)
    check_shared(tmp_path, done, alone, model_paths, ranks)


# -- refused before a model loads -----------------------------------------------------------------------------------------


def pair(model_paths, **config):
    teacher, student = map(str, model_paths)
    ranks = config.pop("ranks", 2)
    return PairConfig(teacher=teacher, student=student, engine_kwargs={"tensor_parallel_size": ranks}, **config)


@pytest.mark.parametrize(
    ("config", "processes", "message"),
    [
        ({}, 3, r"tensor_parallel_size=2 .*: 3 training processes do not make groups of 2.*--num_processes"),
        ({}, 1, "1 training processes do not make"),
        ({"ranks": 0}, 1, "tensor_parallel_size=0"),
        ({"num_speculative_tokens": "auto"}, 2, "num_speculative_tokens='auto' with tensor_parallel_size=2"),
    ],
)
def test_groups_that_cannot_be(model_paths, config, processes, message):
    with pytest.raises(ValueError, match=message):
        check_groups(pair(model_paths, **config), processes)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (3, "tensor_parallel_size=3 does not divide the 4 attention heads of teacher="),
        (0, "tensor_parallel_size=0 .* is not a number of ranks; use 1 or more"),
        ("2", "tensor_parallel_size='2' .* is not a number of ranks; use 1 or more"),
    ],
)
def test_models_that_the_ranks_cannot_share(model_paths, ranks, message):
    check_models(pair(model_paths))
    with pytest.raises(ValueError, match=message):
        check_models(pair(model_paths, ranks=ranks))
