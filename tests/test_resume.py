"""A run broken off and resumed is the run that was never broken off; another run's checkpoint is refused."""

import json
import shutil
from functools import partial

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from trl.trainer.utils import RepeatSampler

from osd.train import OSDConfig, OSDTrainer
from osd.train.checkpointing import RUN_FILE, EpochSampler, check_same_run, resolve
from tests.tiny import spoil_weights, tiny_model
from tests.training import ROWS, build_trainer, logged, watch

pytestmark = pytest.mark.gpu


@pytest.fixture
def make(engine, tiny_pair, tmp_path):
    return partial(build_trainer, engine, tiny_pair[1], tmp_path, save_strategy="steps", save_steps=1)


def trajectory(trainer, resume=None):
    """Return the completions of every step, and the weights at the end."""
    sampled = []
    watch(
        trainer,
        lambda prompts: sampled.append([prompts, [c.token_ids for c in trainer.vllm_generation.last_batch.completions]]),
    )
    trainer.train(resume_from_checkpoint=resume)
    return sampled, {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


LOGGED = ("loss", "grad_norm", "learning_rate", "osd/alpha/mean", "osd/alpha/max", "osd/engine/weights_version", "eval_loss")
SETUPS = {
    "plain": {},
    "accumulated, in the second epoch": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 5},
    "evaluated at every step": {"eval_strategy": "steps", "eval_steps": 1},
    "mixed in part, with a schedule": {"mix_fraction": 0.5, "alpha_schedule": "linear", "alpha_max_end": 0.0},
    "in two iterations": {"num_iterations": 2, "importance_correction": "prefix", "save_steps": 2},
    "a stream": {"rows": "stream"},
}


@pytest.mark.parametrize("name", SETUPS)
def test_a_resumed_run_is_the_unbroken_run(make, engine, name):
    """Tokens drawn, losses, weights and their version. Float32 on one machine: equal to the last bit, in fact."""
    fields = {"max_steps": 4, **SETUPS[name]}
    rows = IterableDataset.from_generator(lambda: iter(ROWS)) if fields.pop("rows", None) else ROWS
    if "eval_strategy" in fields:
        fields["eval_dataset"] = Dataset.from_list(ROWS[:4])
    start = engine.weights_version
    whole = make(rows, **fields)
    sampled, weights = trajectory(whole)
    at = 4 if fields["max_steps"] == 5 else 2
    torch.manual_seed(1234)  # another process would not have this one's random state
    resumed = make(rows, **fields)
    again, weights_again = trajectory(resumed, f"{whole.args.output_dir}/checkpoint-{at}")
    assert again == sampled[-len(again) :]
    assert len(again) < len(sampled)
    for key in LOGGED:
        assert logged(resumed, key) == pytest.approx(logged(whole, key), rel=1e-5), key
    assert logged(whole, "osd/engine/weights_version")[0] == start + 1
    for key, value in weights.items():
        torch.testing.assert_close(weights_again[key], value, rtol=1e-5, atol=1e-7)


def test_the_comparison_sees_another_random_state(make, monkeypatch):
    """Planted: a resume that leaves the random state as it is."""
    whole = make(max_steps=3)
    sampled, _ = trajectory(whole)
    resumed = make(max_steps=3)
    monkeypatch.setattr(resumed, "_load_rng_state", lambda checkpoint: torch.manual_seed(1234))
    again, _ = trajectory(resumed, f"{whole.args.output_dir}/checkpoint-2")
    [[prompts, tokens]], [prompts_before, tokens_before] = again, sampled[-1]
    assert prompts == prompts_before
    assert tokens != tokens_before


def test_the_newest_whole_checkpoint_is_the_last(make, tmp_path):
    trainer = make(max_steps=3, save_total_limit=2)
    assert resolve("last", str(tmp_path)) is None
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        resolve(True, str(tmp_path))
    trainer.train()
    assert sorted(path.parent.name for path in tmp_path.glob(f"*/{RUN_FILE}")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "checkpoint-1").exists()
    assert resolve("last", str(tmp_path)) == resolve(True, str(tmp_path)) == str(tmp_path / "checkpoint-3")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-10")
    assert resolve("last", str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / RUN_FILE).unlink()  # killed while it was written
    assert resolve("last", str(tmp_path)) == str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-10' has no osd_run.json: .* stopped before it was whole"):
        make(max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_checkpoint_is_not_whole_while_it_is_written_again(make, tmp_path, monkeypatch):
    make(max_steps=1).train()
    trainer, seen = make(max_steps=1), []
    save_model = trainer.save_model

    def spying(*args, **kwargs):
        seen.append((tmp_path / "checkpoint-1" / RUN_FILE).exists())
        save_model(*args, **kwargs)

    monkeypatch.setattr(trainer, "save_model", spying)
    trainer.train()
    assert seen == [False]
    assert (tmp_path / "checkpoint-1" / RUN_FILE).exists()


# -- another run's checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(make, tmp_path):
    make(max_steps=1).train()
    return tmp_path / "checkpoint-1"


def refused(checkpoint, tmp_path, pair, match, **fields):
    """The refusal comes before any model loads: these could not."""
    for path in pair:
        shutil.copytree(path, tmp_path / path.name)
        spoil_weights(tmp_path / path.name)
    settings = {
        "output_dir": str(tmp_path),
        "teacher_model_name_or_path": str(tmp_path / pair[0].name),
        "resume_from_checkpoint": str(checkpoint),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        **fields,
    }
    with pytest.raises(ValueError, match=match):
        OSDTrainer(model=str(tmp_path / pair[1].name), args=OSDConfig(**settings), train_dataset=Dataset.from_list(ROWS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha_method": "entropy"}, r"sampling had alpha_method='kl_symmetry', and this one's has 'entropy'"),
        ({"alpha_max": 0.5}, r"sampling had alpha_max=1.0, and this one's has 0.5"),
        ({"mixture": "linear", "alpha_method": "fixed"}, "sampling had alpha_method='kl_symmetry'"),
        ({"alpha_schedule": "linear", "alpha_max_end": 0.0}, "sampling had alpha_schedule='constant'"),
        ({"mix_tokens": 3}, "sampling had mix_tokens=None, and this one's has 3"),
    ],
)
def test_another_mixing_is_refused(checkpoint, tmp_path, tiny_pair, fields, message):
    refused(checkpoint, tmp_path, tiny_pair, message, **fields)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_another_model_is_refused(checkpoint, tmp_path, tiny_pair, side):
    other = tiny_model(tmp_path / "another" / side, hidden_size=32)
    pair = [other if path.name == side else path for path in tiny_pair]
    refused(checkpoint, tmp_path, pair, f"a run whose {side} had hidden_size=64, and this one's has 32")
    shutil.rmtree(tmp_path / side)
    other = tiny_model(tmp_path / "another" / f"{side}-instruct")
    pair = [other if path.name == side else path for path in tiny_pair]
    shutil.rmtree(tmp_path / ({"teacher", "student"} - {side}).pop())
    refused(checkpoint, tmp_path, pair, f"a run whose {side} had name='{side}', and this one's has '{side}-instruct'")


def test_the_same_models_elsewhere_are_the_same(checkpoint, tmp_path, tiny_pair):
    from osd.engine.engine import PairConfig
    from osd.train.checkpointing import run_of

    for path in tiny_pair:
        shutil.copytree(path, tmp_path / "moved" / path.name)
    teacher, student = (str(tmp_path / "moved" / path.name) for path in tiny_pair)
    args = OSDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    pair = PairConfig(teacher=teacher, student=student)
    assert (
        check_same_run(checkpoint, run_of(student, pair, args))
        == json.loads((checkpoint / RUN_FILE).read_text())["weights_version"]
    )
    model = AutoModelForCausalLM.from_pretrained(student)
    assert run_of(model, pair, args) == run_of(student, pair, args)


def test_resuming_a_built_trainer_is_checked_too(make, checkpoint):
    saved = json.loads((checkpoint / RUN_FILE).read_text())
    saved["sampling"]["alpha_method"] = "entropy"
    (checkpoint / RUN_FILE).write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="alpha_method='entropy', and this one's has 'kl_symmetry'"):
        make().train(resume_from_checkpoint=True)


def test_the_order_of_an_unbroken_run_is_trls():
    trls = RepeatSampler(range(20), mini_repeat_count=1, batch_size=4, repeat_count=2, seed=3)
    ours = EpochSampler(trls, times=1, epoch=lambda: epoch)
    for epoch in range(3):  # noqa: B007
        assert list(ours) == list(trls)
    once, thrice = (list(EpochSampler(trls, times=times, epoch=lambda: 0)) for times in (1, 3))
    assert thrice[:24] == once[:8] * 3
