"""Runs of several processes, and a run that is killed, by `accelerate launch` with the configurations that are shipped.

On a CPU with gloo, and on two GPUs. Every process owns a whole pair.
"""

import json
import signal
from importlib.util import find_spec

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import AutoModelForCausalLM

from osd.train.checkpointing import resolve
from tests.launched import GREEDY, KILLED, LORA, sampled_by, start, weights_of
from tests.launches import ACCELERATE, fsdp_on_a_cpu, in_float32, launch
from tests.training import build_trainer

# -- the shipped files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_takes_every_shipped_configuration(path):
    config = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert config.distributed_type == written["distributed_type"]
    assert config.num_processes == written["num_processes"]
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    several = arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed
    assert bool(several) == (written["num_processes"] > 1)
    known = vars(arguments)
    for section in ("fsdp_config", "deepspeed_config"):
        for key, value in written.get(section, {}).items():
            assert known[key] == value, f"{key} is no option of accelerate"


def test_there_is_a_configuration_for_every_set_up():
    names = {path.stem for path in ACCELERATE.glob("*.yaml")}
    assert names == {"one_gpu", "ddp", "fsdp2", "zero3", "cpu", "cpu_ddp"}


# -- two processes ------------------------------------------------------------------------------------------------------


def check_greedy(out, done, engine, student, save="weights", **fields):
    """Two processes of 2 prompts each are one of 4."""
    assert done.returncode == 0, done.stdout + done.stderr
    trainer = build_trainer(engine, student, out / "one", **GREEDY, **fields)
    trainer.train()
    weights, reference = torch.load(out / f"{save}.pt"), weights_of(trainer)
    assert weights.keys() == reference.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-4, atol=1e-5)


def check_together(out, done, engine, student):
    """So are two of one prompt at a time that train an adapter; and each process resumes its own random state."""
    check_greedy(out, done, engine, student)
    check_greedy(out, done, engine, student, "adapted", peft_config=LORA)
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["sampled"] != ranks[1]["sampled"]
    for seen in ranks:
        assert len(seen["loss"]) == 3
        assert len(seen["sampled"]) == 3
        assert seen["again"] == seen["sampled"][2:]
        assert seen["drift"] < 1e-6
        assert seen["off"][0] > 1e-3  # the last optimizer step
        assert seen["off"][1] < 1e-6
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    start_of_it = AutoModelForCausalLM.from_pretrained(student)
    assert not saved.lm_head.weight.equal(start_of_it.lm_head.weight)
    return ranks


def test_two_processes_are_one_with_twice_the_batch(engine, tiny_pair, tmp_path):
    done = launch(ACCELERATE / "cpu_ddp.yaml", "tests/launched.py", "together", tmp_path, *tiny_pair)
    ranks = check_together(tmp_path, done, engine, tiny_pair[1])
    assert [seen["kind"] for seen in ranks] == ["DistributedType.MULTI_CPU"] * 2


@pytest.mark.slow
def test_fsdp2_is_one_process_with_twice_the_batch(engine, tiny_pair, tmp_path):
    config = fsdp_on_a_cpu(tmp_path / "fsdp2.yaml")
    done = launch(config, "tests/fsdp_cpu.py", "tests/launched.py", "together", tmp_path, *tiny_pair)
    ranks = check_together(tmp_path, done, engine, tiny_pair[1])
    assert [seen["kind"] for seen in ranks] == ["DistributedType.FSDP"] * 2
    whole = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny_pair[1]).parameters())
    assert [seen["elements"] for seen in ranks] == [whole // 2] * 2


@pytest.mark.slow
def test_fsdp1_is_one_process_with_twice_the_batch(engine, tiny_pair, tmp_path):
    """Without checkpoints: saving one crashes torch's older FSDP on a CPU."""
    one = {"fsdp_version": 1, "fsdp_use_orig_params": True, "fsdp_sync_module_states": False}
    config = fsdp_on_a_cpu(tmp_path / "fsdp1.yaml", **one, fsdp_reshard_after_forward="FULL_SHARD")
    done = launch(config, "tests/fsdp_cpu.py", "tests/launched.py", "greedy", tmp_path, *tiny_pair)
    check_greedy(tmp_path, done, engine, tiny_pair[1])


@pytest.mark.slow
def test_zero3_is_one_process_with_twice_the_batch(engine, tiny_pair, tmp_path, monkeypatch):
    """DeepSpeed's own, on a CPU."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: make test-sharded")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = in_float32("zero3", tmp_path / "zero3.yaml", num_processes=2, use_cpu=True)
    done = launch(config, "tests/launched.py", "together", tmp_path, *tiny_pair)
    ranks = check_together(tmp_path, done, engine, tiny_pair[1])
    assert [seen["kind"] for seen in ranks] == ["DistributedType.DEEPSPEED"] * 2


KINDS = {"ddp": "DistributedType.MULTI_GPU", "fsdp2": "DistributedType.FSDP", "zero3": "DistributedType.DEEPSPEED"}


def on_gpus(name, processes, out, tiny_pair):
    """The weights that a run in float32 ends with, and what each of its processes saw."""
    config = in_float32(name, out / f"{name}.yaml", num_processes=processes)
    done = launch(config, "tests/launched.py", "synced", out, *tiny_pair)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]
    assert [seen["device"] for seen in ranks] == [f"cuda:{rank}" for rank in range(processes)]
    for seen in ranks:
        assert seen["off"][0] > 1e-4  # the last optimizer step
        assert seen["off"][1] < 1e-6
    return torch.load(out / "weights.pt"), ranks


@pytest.fixture(scope="module")
def one_gpu(tiny_pair, tmp_path_factory):
    """One process, which sees both."""
    return on_gpus("one_gpu", 1, tmp_path_factory.mktemp("one_gpu"), tiny_pair)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", KINDS)
def test_two_gpus_are_one_with_twice_the_batch(one_gpu, tiny_pair, tmp_path, name):
    if name == "zero3":
        pytest.importorskip("deepspeed")
    weights, ranks = on_gpus(name, 2, tmp_path, tiny_pair)
    assert [seen["kind"] for seen in ranks] == [KINDS[name]] * 2
    assert weights.keys() == one_gpu[0].keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, one_gpu[0][key], rtol=1e-3, atol=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(saved.lm_head.weight, weights["lm_head.weight"])


# -- SIGKILL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["optimizer", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_without_a_lost_or_repeated_step(engine, tiny_pair, tmp_path, where):
    """Killed in the optimizer, half of the parameters updated; or while the third checkpoint is written."""
    out, models = tmp_path / where, list(map(str, tiny_pair))
    done = launch(ACCELERATE / "cpu.yaml", "tests/launched.py", "killed", out, *models)
    assert done.returncode in (1, -signal.SIGKILL), done.stdout + done.stderr
    assert f"died with <Signals.SIGKILL: {signal.SIGKILL.value}>" in done.stderr, done.stderr
    assert resolve("last", str(out)) == str(out / "checkpoint-2")
    assert (out / "checkpoint-3").exists() == (where == "checkpoint")

    whole = start(tmp_path / "whole", *models, engine, **KILLED)
    sampled = sampled_by(whole)
    resumed = start(out, *models, engine, **KILLED)
    steps = []
    log = resumed.log
    resumed.log = lambda logs, *args: (steps.append(resumed.state.global_step), log(logs, *args))[1]
    assert sampled_by(resumed, "last") == sampled[2:]
    assert steps[:2] == [3, 4]
    for (name, one), (_, other) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
    assert resolve("last", str(out)) == str(out / "checkpoint-4")
