"""Script that tests/test_launch.py starts in one or more processes: `accelerate launch launched.py NAME OUT TEACHER STUDENT`.

Every process writes what it saw to OUT/<rank>.json, and the first one writes the student's weights.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from osd.engine.group import RankGroup
from tests import pairs
from tests.async_cpu import allow_async_scheduling
from tests.tiny import tiny_engine_kwargs
from tests.training import ROWS, build_trainer, logged, watch

# Greedy, so that it does not matter which process draws which completion.
GREEDY = {"generation_kwargs": {"temperature": 0.0}, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "peft_config": LORA}
SAME = [ROWS[0]] * 16  # one prompt for all: processes that drew the same noise would write the same
SAMPLED = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
SHARED = {
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.1,
    "privilege_gap_steps": 2,
    "privilege_gap_tokens": 5,
}
KILLED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


def start(out: Path, teacher: str, student: str, engine=None, rows=ROWS, **fields):
    """A trainer with the engine that it starts itself, or with an earlier one's."""
    own = {} if engine else {"teacher_model_name_or_path": teacher, "engine_kwargs": tiny_engine_kwargs()}
    return build_trainer(engine, student, out, rows, **own, **fields)


def weights_of(trainer):
    """Every parameter, whole; a collective operation."""
    with torch.no_grad():
        return {name: tensor.detach().cpu().clone() for name, tensor in trainer.vllm_generation._iter_named_params()}


def elements_of(trainer):
    """Numbers of the student that this process holds."""
    shards = (getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)) for p in trainer.model.parameters())
    return sum(shard.numel() for shard in shards)


def sampled_by(trainer, resume=None):
    """The completions of this process at every step."""
    sampled = []
    watch(trainer, lambda _: sampled.append([c.token_ids for c in trainer.vllm_generation.last_batch.completions]))
    torch.manual_seed(trainer.accelerator.process_index)  # an engine that starts seeds it too, and not every run starts one
    trainer.train(resume_from_checkpoint=resume)
    return sampled


def greedy(out: Path, teacher: str, student: str, engine=None, save="weights", **fields):
    """A greedy run of 4 prompts a step, whatever the number of processes."""
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = start(out / save, teacher, student, engine, **{"per_device_train_batch_size": size, **GREEDY, **fields})
    trainer.train()
    seen = {
        "kind": str(trainer.accelerator.distributed_type),
        "device": str(trainer.vllm_generation.engine._frontend.worker.device),
        "elements": elements_of(trainer),
        "loss": logged(trainer, "loss"),
    }
    weights = weights_of(trainer)
    if trainer.accelerator.process_index == 0:
        torch.save(weights, out / f"{save}.pt")
    return trainer, seen


def off_after_a_sync(trainer):
    """Distance of a matrix of the engine's student from the live one, merged, before and after a sync."""
    name, off = "model.layers.0.mlp.down_proj.weight", []
    live = weights_of(trainer)[name]
    for sync in (lambda: None, trainer.vllm_generation.sync_weights):
        sync()
        engines = trainer.vllm_generation.engine._frontend.worker.student_runner.get_model().get_parameter(name)
        off.append((engines.detach().cpu() - live).abs().max().item())
    return off


def synced(out: Path, teacher: str, student: str) -> None:
    """A greedy run, and how far the engine's student is from the live one before a last sync and after it."""
    trainer, seen = greedy(out, teacher, student)
    seen["off"] = off_after_a_sync(trainer)
    (out / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))
    trainer.save_model(str(out / "model"))
    trainer.close()


def together(out: Path, teacher: str, student: str) -> None:
    """A greedy run of an adapter, accumulated; the plain one; a sampled one, and that again from its second step on."""
    adapted, _ = greedy(out, teacher, student, save="adapted", **ACCUMULATED)
    off, engine = off_after_a_sync(adapted), adapted.vllm_generation.engine
    _, seen = greedy(out, teacher, student, engine)
    seen["off"] = off
    whole = start(out / "sampled", teacher, student, engine, SAME, **SAMPLED)
    seen["sampled"], last = sampled_by(whole), weights_of(whole)
    resumed = start(out / "sampled", teacher, student, engine, SAME, **SAMPLED)
    seen["again"] = sampled_by(resumed, str(out / "sampled" / "checkpoint-2"))
    seen["drift"] = max((tensor - last[name]).abs().max().item() for name, tensor in weights_of(resumed).items())
    resumed.save_model(str(out / "model"))
    (out / f"{resumed.accelerator.process_index}.json").write_text(json.dumps(seen))
    adapted.close()


def seed_by_prompt(generation):
    """Make the seed of a completion follow from its prompt, whatever process has it."""
    generate = generation.engine.generate

    def seeded(prompts, *, sampling, **kwargs):
        if isinstance(sampling, dict):
            sampling = [{**sampling, "seed": sum(p.student_token_ids)} for p in prompts]
        return generate(prompts, sampling=sampling, **kwargs)

    generation.engine.generate = seeded


def sampled(out: Path, teacher: str, student: str, engine=None, **fields):
    """A sampled run of 4 prompts a step.

    Returns:
        its trainer; per step the completions and records of this process, by prompt; the seed of its random numbers.
    """
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = start(out, teacher, student, engine, **{"per_device_train_batch_size": size, **SHARED, **fields})
    seed = torch.initial_seed()
    seed_by_prompt(trainer.vllm_generation)
    steps = []

    def look(prompts):
        completions = trainer.vllm_generation.last_batch.completions
        kept = [(c.token_ids, c.record.values_TR, c.record.teacher_hidden_TH) for c in completions]
        steps.append({tuple(prompt): row for prompt, row in zip(prompts, kept, strict=True)})

    watch(trainer, look)
    trainer.train()
    return trainer, steps, seed


def cramped(out: Path, teacher: str, student: str) -> None:
    """Completions of a pair held by two processes, with async scheduling and preemptions, by the index of their prompt."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if not torch.cuda.is_available():
        allow_async_scheduling()
    ranks = {"tensor_parallel_size": accelerator.num_processes, "distributed_executor_backend": "external_launcher"}
    config = pairs.cramped(40, 64) | {"num_speculative_tokens": int(out.name)}
    config["engine_kwargs"] |= ranks
    prompts, rank = pairs.hard_prompts(), accelerator.process_index
    with pairs.start((teacher, student), config) as engine, pytest.MonkeyPatch.context() as patch:
        seen = pairs.watch(engine, patch)
        own = range(rank, len(prompts), accelerator.num_processes)
        completions = engine.generate([prompts[i] for i in own], sampling={"max_tokens": 30, "ignore_eos": True}, topk=5)
        torch.save({"seen": dict(seen), "completions": dict(zip(own, completions, strict=True))}, out / f"{rank}.pt")


def message_of(call, *args):
    """The message of the error that a call ends with."""
    try:
        call(*args)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def planted(trainer):
    """The errors of this rank after one rank gave a bad prompt, drew with another seed, and lost its student.

    And what it drew where both ranks have the same prompts and random state.
    """
    vars(trainer.vllm_generation.engine).pop("generate")  # `seed_by_prompt`
    generation, first = trainer.vllm_generation, trainer.accelerator.process_index == 0
    shared = RankGroup.share

    def other_seed(group, requests):
        gathered, own = shared(group, requests)
        if not first:
            gathered[0][1].seed += 1
        return gathered, own

    def generate():
        torch.manual_seed(0)
        drawn.append(generation.generate([[7, 8, 9]] * 2, None, 1)[1])

    drawn: list = []

    generation.sync_weights()
    bad = message_of(generation.generate, [[10**6 if first else 7]], None, 1)
    RankGroup.share = other_seed
    seed = message_of(generate)
    RankGroup.share = shared
    after = message_of(generate)
    if not first:
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight.mul_(-1)
    generation._syncs = 0
    return {"prompt": bad, "seed": seed, "after": after, "weights": message_of(generation.sync_weights), "drawn": drawn}


def shared(out: Path, teacher: str, student: str) -> None:
    """A sampled run of pairs that OSD_TEST_RANKS processes hold each; the teacher's output layer; in two, planted errors."""
    ranks = int(os.environ.get("OSD_TEST_RANKS", "2"))
    sleep = {"vllm_enable_sleep_mode": True} if torch.cuda.is_available() else {}
    trainer, steps, seed = sampled(out / "run", teacher, student, vllm_tensor_parallel_size=ranks, **sleep)
    rank, head = trainer.accelerator.process_index, trainer._teacher.head.weight_VH.cpu()
    shard = trainer.vllm_generation.engine._frontend.worker.student_runner.get_model()
    seen = {
        "steps": steps,
        "head": head,
        "seed": seed,
        "loss": logged(trainer, "loss"),
        "gap": logged(trainer, "osd/privilege/gap"),
        "elements": sum(parameter.numel() for parameter in shard.parameters()),
        "weights": weights_of(trainer),
    }
    if trainer.accelerator.num_processes == 2 and str(trainer.accelerator.distributed_type).startswith("DistributedType.MULTI"):
        seen["planted"] = planted(trainer)
    torch.save(seen, out / f"{rank}.pt")
    trainer.close()


def served(out: Path, teacher: str, student: str) -> None:
    """A greedy run against the server at OSD_TEST_URL, which ends itself at the place OSD_TEST_DIES, if that is set.

    OSD_TEST_RESUME: the checkpoint that it goes on from. OSD_TEST_FIELDS: further fields of the configuration, as JSON.
    """
    import osd.engine.transport as transport
    from osd.engine.remote import RemoteEngine

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    fields = {
        "vllm_mode": "server",
        "vllm_server_base_url": os.environ["OSD_TEST_URL"],
        "vllm_server_timeout": 120.0,
        "seed": 5,
    }
    fields |= {**GREEDY, "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1"))}
    fields |= json.loads(os.environ.get("OSD_TEST_FIELDS", "{}"))
    if (place := os.environ.get("OSD_TEST_DIES")) in ("sync", "running sync"):
        transport.PART_BYTES, post = 1, transport.check
        transport.check = lambda answer: (post(answer), (place == "sync" or trainer.state.global_step) and die())
    elif place == "sample":
        RemoteEngine._take = die
        fields["max_completion_length"] = 200
    elif place == "sample of rank 1" and os.environ["RANK"] == "1":

        def fail(*_):
            raise KeyError("planted")

        RemoteEngine._take = fail
    evaluated = {"eval_dataset": Dataset.from_list(ROWS[:3])} if "eval_strategy" in fields else {}
    trainer = build_trainer(None, student, out, teacher_model_name_or_path=teacher, **evaluated, **fields)
    steps, rank = [], trainer.accelerator.process_index
    if place in ("step", f"step of rank {rank}"):

        def die_in_flight(step):
            ahead = trainer.vllm_generation.engine._ahead
            if step == 3:
                print(sum(not batch.is_whole for batch in ahead), "batches in flight", flush=True)
                die()

        trainer.add_callback(BeforeOptimizer(die_in_flight))

    def look(prompts):
        if not trainer.model.training:
            return
        batch, live = trainer.vllm_generation.last_batch, weights_of(trainer)
        rows = [(c.token_ids, torch.as_tensor(c.record.logp_theta)) for c in batch.completions]
        steps.append({"prompts": prompts, "rows": rows, "ages": batch.staleness_T, "live": live if rank == 0 else None})
        steps[-1]["elements"] = elements_of(trainer)

    watch(trainer, look)
    trainer.train(resume_from_checkpoint=os.environ.get("OSD_TEST_RESUME"))
    metrics = {"syncs": "weights_version", "staleness": "staleness"}
    seen = {name: logged(trainer, f"osd/engine/{metric}") for name, metric in metrics.items()}
    seen |= {"loss": logged(trainer, "loss"), "sampled": [[ids for ids, _ in step["rows"]] for step in steps]}
    seen["kind"] = str(trainer.accelerator.distributed_type)
    (out / f"{rank}.json").write_text(json.dumps(seen))
    torch.save(steps, out / f"{rank}.pt")
    trainer.close()
    trainer.accelerator.end_training()


class BeforeOptimizer(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.call(state.global_step)


class DieInTheThirdStep(TrainerCallback):
    """Gradients are there, and half of the parameters updated."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            parameters = list(model.parameters())
            with torch.no_grad():
                for parameter in parameters[: len(parameters) // 2]:
                    parameter.sub_(parameter.grad)
            os.kill(os.getpid(), signal.SIGKILL)


def killed(out: Path, teacher: str, student: str) -> None:
    """A run that dies in its third step, half way through the parameters: OUT names where."""
    trainer = start(out, teacher, student, **KILLED)
    if out.name == "optimizer":
        trainer.add_callback(DieInTheThirdStep())
    else:

        def scaler(folder):
            if trainer.state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer._save_scaler = scaler  # between the optimizer's state and the random state
    sampled_by(trainer)


if __name__ == "__main__":
    name, out, teacher, student = sys.argv[1:]
    entries = (greedy, synced, together, killed, shared, cramped, served)
    runs = {entry.__name__: entry for entry in entries}
    runs[name](Path(out), teacher, student)
