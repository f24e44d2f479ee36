"""OSDTrainer on tiny models and the real engine: liveness, the loss, TRL's invariances, metrics, bad input."""

import hashlib
import math
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from trl import DistillationTrainer

from osd.core import MixingConfig
from osd.train import OSDConfig, OSDTrainer
from osd.train.divergence import Divergence
from osd.train.lm_head import head_of
from osd.train.losses import batch_loss
from osd.train.metrics import WHOLE, take_reduced
from tests.training import DEVICE, ROWS, build_trainer, disagreement, gaps_over_training, logged, watch, weights_after

pytestmark = pytest.mark.gpu

NOISE = 1e-3  # float32 engine against float32 transformers; measured 5e-6
CHATS = [{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}], "privileged_context": f"w{i + 30}"} for i in range(7, 23)]


@pytest.fixture
def make(engine, tiny_pair, tmp_path):
    return partial(build_trainer, engine, tiny_pair[1], tmp_path)


# -- liveness -----------------------------------------------------------------------------------------------------------


def test_every_step_samples_from_the_live_student(make, engine):
    before = engine.weights_version
    trainer = make()
    gaps = gaps_over_training(trainer)
    assert len(gaps) == 3
    assert max(gaps) < NOISE
    assert logged(trainer, "osd/engine/weights_version") == [before + 1, before + 2, before + 3]


def test_the_liveness_test_sees_a_missing_sync(make):
    trainer = make()
    sync, calls = trainer.vllm_generation.sync_weights, []

    def only_once():
        calls.append(None)
        if len(calls) == 1:
            sync()

    trainer.vllm_generation.sync_weights = only_once
    gaps = gaps_over_training(trainer)
    assert len(calls) == 3
    assert gaps[0] < NOISE
    assert min(gaps[1:]) > 100 * NOISE


def test_accumulation_samples_once_per_optimizer_step(make, engine):
    before = engine.weights_version
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    sizes = []
    watch(trainer, lambda prompts: sizes.append(len(prompts)))
    trainer.train()
    assert sizes == [4, 4]
    assert engine.weights_version == before + 2


def test_evaluation_syncs_even_if_the_step_did_not_change(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS[:4]), per_device_eval_batch_size=2)
    trainer.evaluate()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.9)
    gaps = []
    watch(
        trainer,
        lambda prompts: gaps.append(
            disagreement(trainer.model, prompts, trainer.vllm_generation.last_batch.completions, "logp_theta")
        ),
    )
    trainer.evaluate()
    assert len(gaps) == 2
    assert max(gaps) < NOISE


def checksum(model):
    """Of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_training_does_not_touch_the_teacher(make, engine):
    teacher, student = (getattr(engine._frontend.worker, side).get_model() for side in ("model_runner", "student_runner"))
    before, synced = checksum(teacher), checksum(student)
    make().train()
    assert checksum(student) != synced
    assert checksum(teacher) == before


# -- prompts ------------------------------------------------------------------------------------------------------------


def spy_on_engine(engine, monkeypatch):
    """The prompts of the last `engine.generate` call."""
    seen = SimpleNamespace(prompts=None)
    generate = engine.generate

    def spying(prompts, **kwargs):
        seen.prompts = prompts
        return generate(prompts, **kwargs)

    monkeypatch.setattr(engine, "generate", spying)
    return seen


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (ROWS, {}),
        (CHATS, {"student_system_prompt": "w60"}),
        ([{"prompt": row["prompt"]} for row in ROWS], {"enable_chat_template": True}),
    ],
)
def test_the_student_is_trained_on_exactly_the_ids_that_it_sampled_from(make, engine, monkeypatch, rows, fields):
    seen = spy_on_engine(engine, monkeypatch)
    trainer = make(rows, **fields)
    trainer.model.train()
    trainer._last_loaded_step = -1
    output = trainer._generate_and_score_completions(rows[:4])
    completions = trainer.vllm_generation.last_batch.completions
    for i in range(4):
        prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
        completion = output["completion_ids"][i][output["completion_mask"][i].bool()].tolist()
        assert prompt == seen.prompts[i].student_token_ids
        assert completion == completions[i].token_ids


def test_the_teacher_reads_its_own_column(make, engine, monkeypatch):
    seen = spy_on_engine(engine, monkeypatch)
    make(ROWS)._generate_and_score_completions(ROWS[:2])
    assert [p.teacher_token_ids for p in seen.prompts] == [[50, 7, 51], [50, 8, 51]]
    assert [p.student_token_ids for p in seen.prompts] == [[7, 8, 9], [8, 9, 10]]


def test_privileged_context_in_a_conversation(make, engine, monkeypatch):
    seen = spy_on_engine(engine, monkeypatch)
    trainer = make(CHATS, privileged_template="{prompt} w63 {privileged_context}", teacher_system_prompt="w61")
    trainer._generate_and_score_completions(CHATS[:1])
    [pair] = seen.prompts
    assert pair.student_token_ids == [1, 5, 7, 8, 2, 1, 6]
    assert pair.teacher_token_ids == [1, 4, 61, 2, 1, 5, 7, 8, 63, 37, 2, 1, 6]


# -- the loss -----------------------------------------------------------------------------------------------------------


def teacher_hidden_by_transformers(teacher, trainer, output):
    """The teacher's hidden states on its own prompts, [B, T, H], by transformers."""
    hidden = torch.zeros(*output["completion_ids"].shape, teacher.config.hidden_size, device=DEVICE)
    prompts = trainer._renderer.teacher_ids(ROWS[: len(hidden)])
    for i, prompt in enumerate(prompts):
        completion = output["completion_ids"][i][output["completion_mask"][i].bool()].tolist()
        with torch.no_grad():
            states = teacher.model(torch.tensor([prompt + completion], device=DEVICE)).last_hidden_state[0]
        hidden[i, : len(completion)] = states[len(prompt) - 1 : -1]
    return hidden


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_recorded_loss_equals_the_loss_of_a_transformers_teacher(make, tiny_pair, beta, temperature):
    """Each side conditioned on its own prompt.

    Measured noise, float32: losses differ by at most 1e-7 of themselves, gradients by 3e-6 of their norm; states taken from
    the completion next to it (planted) move the loss by 0.7 % to 14 %.
    """
    trainer = make(beta=beta, temperature=temperature)
    trainer.model.train()
    output = trainer._generate_and_score_completions(ROWS[:8])
    loss = trainer.compute_loss(trainer.model, output)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()

    teacher = AutoModelForCausalLM.from_pretrained(tiny_pair[0]).to(DEVICE).eval()
    student_hidden = trainer._get_last_hidden_state(
        trainer.model,
        torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
        torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
        output["completion_ids"].size(1),
    )
    reference = batch_loss(
        student_hidden,
        teacher_hidden_by_transformers(teacher, trainer, output),
        head_of(trainer.model.lm_head.weight, None, trainer.model.config),
        head_of(teacher.lm_head.weight.detach(), None, teacher.config),
        output["completion_mask"],
        of=Divergence(beta=beta, temperature=temperature),
    ).loss
    reference.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_recorded_loss_equals_trls_own_with_the_same_prompts(make, tiny_pair, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    trainer = make(rows)
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows[:8])
    args = OSDConfig(str(tmp_path), use_cpu=DEVICE == "cpu", bf16=False, report_to="none", gradient_checkpointing=False)
    args.use_vllm = False
    trls = DistillationTrainer(
        model=str(tiny_pair[1]), teacher_model=str(tiny_pair[0]), args=args, train_dataset=Dataset.from_list(rows)
    )
    trls.model.train()
    ours, theirs = (t.compute_loss(t.model, output) for t in (trainer, trls))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def computed_in(trainer, batch):
    """The dtype of what a layer of the student gives in the loss, and the loss."""
    seen = []
    layer = trainer.model.model.layers[0].mlp.down_proj
    with layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype)):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainer.model.parameters())
    return seen, loss.item()


def test_bf16_computes_in_bfloat16(make):
    """Weights and gradients are float32, and what lies between is not. The planted error is TRL 1.16's own trainer."""
    mixed = make(bf16=True)
    mixed.model.train()
    batch = mixed._generate_and_score_completions(ROWS[:8])
    seen, loss = computed_in(mixed, batch)
    assert seen == [torch.bfloat16]
    seen, exact = computed_in(make(), batch)  # not made before: all accelerators of a process have the last one's precision
    assert seen == [torch.float32]
    assert loss == pytest.approx(exact, rel=0.02)
    assert loss != exact


def test_trl_still_needs_the_autocast(make):
    """When this fails, OSDTrainer.compute_loss need not open one."""
    mixed = make(bf16=True)
    mixed.model.train()
    batch, seen = mixed._generate_and_score_completions(ROWS[:4]), []
    mixed._compute_loss = lambda *args: (
        seen.append(torch.is_autocast_enabled(DEVICE)),
        type(mixed)._compute_loss(mixed, *args),
    )[1]
    DistillationTrainer.compute_loss(mixed, mixed.model, batch)
    assert seen == [False]


def test_batch_1_times_8_equals_8_times_1(make):
    shapes = ((8, 1), (1, 8))
    greedy = {"max_steps": 2, "generation_kwargs": {"temperature": 0.0}, "optim": "sgd"}
    whole, pieces = (
        weights_after(make(per_device_train_batch_size=b, gradient_accumulation_steps=a, **greedy)) for b, a in shapes
    )
    for name in whole:
        torch.testing.assert_close(whole[name], pieces[name], rtol=1e-4, atol=1e-5)


def test_training_brings_the_student_closer_to_the_teacher(make):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    trainer = make(
        rows,
        eval_dataset=Dataset.from_list(rows),
        generation_kwargs={"temperature": 0.0},
        max_steps=8,
        per_device_train_batch_size=16,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    losses = logged(trainer, "loss")
    assert after < 0.8 * before
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def w63_is_no_number(engine):
    """A teacher that fails on every prompt with w63."""
    embedding = engine._frontend.worker.model_runner.get_model().model.embed_tokens.weight
    kept = embedding[63].clone()
    embedding.data[63] = float("nan")
    yield {"generation_kwargs": {"logit_bias": {63: -100.0}}}
    embedding.data[63] = kept


@pytest.mark.parametrize("size", [4, 1], ids=["beside others in its pass", "alone in its pass"])
def test_a_completion_in_error_is_masked_out_and_counted(make, w63_is_no_number, size):
    rows = [*ROWS[:3], {"prompt": "w7", "teacher_prompt": "w63"}]
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    trainer = make(rows, max_steps=1, shuffle_dataset=False, **sizes, **w63_is_no_number)
    trainer.train()
    assert logged(trainer, "osd/completions/failed") == [1]
    assert math.isfinite(logged(trainer, "loss")[0])
    assert math.isfinite(logged(trainer, "grad_norm")[0])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("size", [4, 1])
def test_evaluation_is_of_the_completions_without_error(make, w63_is_no_number, size):
    bad = {"prompt": "w7", "teacher_prompt": "w63"}
    w63_is_no_number["generation_kwargs"] |= {"temperature": 0.0, "ignore_eos": True}

    def evaluated(rows):
        trainer = make(eval_dataset=Dataset.from_list(rows), per_device_eval_batch_size=size, **w63_is_no_number)
        return trainer.evaluate()

    with_it, without = evaluated([*ROWS[:3], bad]), evaluated(ROWS[:3])
    assert with_it["eval_loss"] == pytest.approx(without["eval_loss"], rel=1e-5)
    assert with_it["eval_osd/completions/failed"] == 1  # a count, whatever the size of the batches
    assert math.isnan(evaluated([bad, bad])["eval_loss"])


def test_a_trainer_closes_no_engine_but_its_own(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS[:2]))
    trainer.close()
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_batch_of_errors_only_is_refused(make, w63_is_no_number):
    trainer = make([{"prompt": "w7", "teacher_prompt": "w63"}] * 4, max_steps=1, **w63_is_no_number)
    with pytest.raises(RuntimeError, match="every completion of the batch ended in an error"):
        trainer.train()


# -- evaluation, metrics, logs ------------------------------------------------------------------------------------------


def test_metrics_of_every_step(make):
    trainer = make(CHATS)
    trainer.train()
    for key in (
        "osd/alpha/mean",
        "osd/alpha/std",
        "osd/alpha/min",
        "osd/alpha/max",
        "osd/q/kl_student",
        "osd/q/kl_teacher",
        "osd/q/ess_ratio",
        "osd/q/entropy",
        "completions/mean_length",
        "osd/completions/failed",
        "osd/engine/sync_seconds",
        "osd/engine/generate_seconds",
        "osd/engine/teacher_cache_hit",
        "osd/engine/student_cache_hit",
        "osd/engine/weights_version",
    ):
        values = logged(trainer, key)
        assert len(values) == 3, key
        assert all(math.isfinite(v) for v in values), key
    entry = next(e for e in trainer.state.log_history if "osd/alpha/mean" in e)
    assert 0 <= entry["osd/alpha/min"] <= entry["osd/alpha/mean"] <= entry["osd/alpha/max"] <= 1
    # α balances both divergences, except where it was clamped.
    assert entry["osd/q/kl_student"] == pytest.approx(entry["osd/q/kl_teacher"], rel=0.05)
    assert entry["osd/engine/sync_seconds"] > 0
    assert entry["osd/engine/generate_seconds"] > 0
    for key in WHOLE:
        assert {type(value) for value in logged(trainer, key)} == {int}, key


def test_counts_and_extremes_are_not_averaged_over_batches(make):
    (each := make(CHATS)).train()
    (all_at_once := make(CHATS, logging_steps=3)).train()
    for key, expected in (("osd/alpha/min", min), ("osd/alpha/max", max), ("completions/min_length", min), ("num_tokens", max)):
        assert logged(all_at_once, key) == pytest.approx([expected(logged(each, key))]), key
        assert len(set(logged(each, key))) > 1 or "length" in key, "else a mean would look the same"


def test_values_over_several_batches():
    nan = math.nan
    lists = {"osd/completions/failed": [1.0, 0.0, 2.0], "osd/engine/weights_version": [4.0, 5.0, 6.0], "loss": [1.0, 2.0]}
    lists |= {"osd/alpha/min": [0.25, nan, 0.125], "osd/alpha/max": [nan], "completions/max_length": [3.0, 9.0, 5.0]}
    lists |= {"completions/min_terminated_length": [4.0, 0.0, 7.0]}  # TRL's 0: no completion of the batch ended
    values = take_reduced(lists)
    assert lists == {"loss": [1.0, 2.0]}
    assert values == {
        "osd/completions/failed": 3,
        "osd/engine/weights_version": 6,
        "osd/alpha/min": 0.125,
        "osd/alpha/max": None,
        "completions/max_length": 9,
        "completions/min_terminated_length": 4,
    }
    assert {type(value) for name, value in values.items() if name in WHOLE} == {int}


def test_evaluation_samples_from_the_student_alone(make):
    trainer = make(eval_dataset=Dataset.from_list(ROWS[:4]), eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.train()
    assert logged(trainer, "eval_osd/alpha/max") == [0, 0]
    assert logged(trainer, "eval_osd/q/kl_student") == pytest.approx([0, 0], abs=1e-5)
    assert min(logged(trainer, "eval_loss")) > 0
    assert min(logged(trainer, "osd/alpha/max")) > 0


def test_completions_are_logged_with_their_alpha(make, tmp_path, capsys):
    trainer = make(log_completions=True, max_steps=2)
    trainer.train()
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "completions").glob("*.parquet"))]
    assert len(tables) >= 2
    for table in tables:
        assert list(table.columns) == ["step", "prompt", "completion", "alpha_mean", "alpha", "token_ids"]
        assert len(table) == 4
        for row in table.itertuples():
            assert len(row.alpha) == len(row.token_ids) > 0
            assert row.alpha_mean == pytest.approx(sum(row.alpha) / len(row.alpha))
    assert "alpha" in capsys.readouterr().out


def test_unused_columns_do_not_include_what_the_teacher_reads(make):
    rows = [{"prompt": "w7 w8", "hint": "w9", "other": 1} for _ in range(8)]
    trainer = make(rows, remove_unused_columns=True, privileged_template="{prompt} {hint}", max_steps=1)
    [batch, *_] = trainer.get_train_dataloader()
    assert set(batch[0]) == {"prompt", "hint"}


def test_a_stream_can_be_trained_on(make):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    trainer = make(stream, max_steps=2)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


# -- bad input, before any model loads ----------------------------------------------------------------------------------


def refused(tmp_path, match, rows=ROWS, *, model="absent-student", fields=None, eval_dataset=None, **kwargs):
    settings = {"teacher_model_name_or_path": "absent-teacher", "use_cpu": True, "bf16": False, "report_to": "none"}
    args = OSDConfig(str(tmp_path), **{**settings, **(fields or {})})
    with pytest.raises(ValueError, match=match):
        OSDTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), eval_dataset=eval_dataset, **kwargs)


def test_tools_are_refused(tmp_path):
    def look_up(word: str) -> str:
        """Look a word up."""
        return word

    refused(tmp_path, r"tools=\['look_up'\] are not supported", tools=[look_up])


def test_a_teacher_in_memory_is_refused(tmp_path, tiny_pair):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_pair[0])
    refused(tmp_path, "teacher_model is a LlamaForCausalLM: the teacher runs in vLLM", teacher_model=teacher)


def test_a_run_without_a_teacher_is_refused(tmp_path):
    refused(tmp_path, "no teacher: set teacher_model_name_or_path", fields={"teacher_model_name_or_path": None})


def test_a_quantized_student_is_refused(tmp_path):
    refused(tmp_path, "quantization_config: a quantized student is not supported", quantization_config=object())
    refused(tmp_path, r"model_init_kwargs\['load_in_4bit'\]: a quan", fields={"model_init_kwargs": {"load_in_4bit": True}})


def test_missing_models_are_refused(tmp_path, tiny_pair):
    refused(tmp_path, "teacher model 'absent-teacher'")
    refused(tmp_path, "student model 'absent-student'", fields={"teacher_model_name_or_path": str(tiny_pair[0])})


def test_a_template_that_names_a_missing_column_is_refused(tmp_path):
    rows = [{"prompt": "w7", "answer": "w8"}]
    refused(tmp_path, "'solution', which the dataset does not have", rows, fields={"privileged_template": "{solution}"})


def test_evaluation_data_are_checked_too(tmp_path):
    rows = [{"prompt": "w7", "answer": "w8"}]
    short = {"easy": Dataset.from_list(rows), "hard": Dataset.from_list([{"prompt": "w7"}])}
    refused(
        tmp_path,
        "'answer', which the dataset does not have",
        rows,
        fields={"privileged_template": "{answer}"},
        eval_dataset=short,
    )


def test_datasets_without_prompts_are_refused(tmp_path):
    refused(tmp_path, "no 'prompt' column", [{"question": "w7"}])


def test_an_unknown_engine_argument_is_refused(tmp_path, tiny_pair):
    fields = {"teacher_model_name_or_path": str(tiny_pair[0]), "engine_kwargs": {"max_modle_len": 8}}
    refused(tmp_path, "max_modle_len", fields=fields, model=str(tiny_pair[1]))


def test_a_running_engine_must_be_the_one_that_was_configured(make, tmp_path, engine, tiny_pair):
    with pytest.raises(ValueError, match="the running engine's teacher is"):
        make(teacher_model_name_or_path="another")


@pytest.mark.parametrize("method", ["entropy", "fixed", "linear"])
def test_a_running_engine_takes_the_trainers_mixing(make, engine, method):
    """Trainers on one engine, one after the other, each sample as their own configuration says."""
    mixing = {
        "entropy": {"alpha_method": "entropy", "alpha_max": 0.5},
        "fixed": {"alpha_method": "fixed", "fixed_alpha": 0.25},
        "linear": {"alpha_method": "fixed", "fixed_alpha": 0.75, "mixture": "linear"},
    }[method]
    trainer = make(**mixing, max_steps=1)
    trainer.train()
    assert engine.mixing == MixingConfig(**mixing)
    records = [completion.record for completion in trainer.vllm_generation.last_batch.completions]
    columns = ("alpha", "logq", "logp_theta", "logp_teacher", "kl_theta", "kl_teacher")
    alpha, logq, theta, teacher, *kls = (torch.cat([getattr(record, name) for record in records]) for name in columns)
    if method == "entropy":
        assert alpha.max() <= 0.5
        assert alpha.unique().numel() > 1
    else:
        assert (alpha == mixing["fixed_alpha"]).all()
    if method == "linear":
        torch.testing.assert_close(logq.exp(), 0.25 * theta.exp() + 0.75 * teacher.exp())
    else:  # -log Z, once from the token and once from the mean over q
        torch.testing.assert_close(
            logq - (1 - alpha) * theta - alpha * teacher, (1 - alpha) * kls[0] + alpha * kls[1], atol=1e-4, rtol=1e-4
        )


def test_a_prompt_too_long_for_the_engine_is_refused_before_sampling(make):
    rows = [*ROWS, {"prompt": " ".join(["w7"] * 300), "teacher_prompt": "w7"}]
    with pytest.raises(ValueError, match=r"1 of 17 rows .* is row 16: the student's prompt has 300 tokens, .* of 256 tokens"):
        make(rows)
