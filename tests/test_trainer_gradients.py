"""What OSDTrainer's gradient is of: both sources of the teacher, divergences, weights, reused samples, schedules, privilege."""

import itertools
from functools import partial

import pytest
import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedModel

import osd.train.passes as passes
import osd.train.privilege_gap as privilege_module
import osd.train.sampling as sampling_module
from osd.train.importance import importance_weights
from tests.training import DEVICE, ROWS, build_trainer, logged, logp, loss_and_gradient, sampled, watch, weights_after

pytestmark = pytest.mark.gpu

# B completions, T tokens of one (padded), V vocabulary, N tokens.


@pytest.fixture
def make(engine, tiny_pair, tmp_path):
    return partial(build_trainer, engine, tiny_pair[1], tmp_path)


@pytest.fixture(scope="module")
def teacher(tiny_pair):
    return AutoModelForCausalLM.from_pretrained(tiny_pair[0]).to(DEVICE).eval()


# -- where the teacher comes from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"beta": 0.5, "temperature": 0.8}, {"divergence": "skew_kl"}])
def test_the_recorded_and_the_recomputed_teacher_agree(make, fields):
    """On the same completions, each side reading its own prompt.

    Measured noise, float32: the loss differs by 2e-7 of itself, the gradient by 2e-6 of its norm. A recomputed teacher that
    reads the student's prompt instead (planted) moves the gradient by its whole norm.
    """
    recorded, recompute = make(**fields), make(teacher_signal="recompute", **fields)
    batch, _ = sampled(recorded)
    completions = recorded.vllm_generation.last_batch.completions
    prompts = recorded._renderer.teacher_ids(ROWS[:8])
    plain = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]

    def recomputed(teacher_prompts):
        return batch | recompute._teacher.columns(completions, teacher_prompts, batch["completion_mask"])

    loss, gradient = loss_and_gradient(recorded, batch)
    again, gradient_again = loss_and_gradient(recompute, recomputed(prompts))
    _, planted = loss_and_gradient(recompute, recomputed(plain))
    assert again == pytest.approx(loss, rel=1e-5)
    assert (gradient_again - gradient).norm() < 1e-4 * gradient.norm()
    assert (planted - gradient).norm() > 0.1 * gradient.norm()


@pytest.mark.parametrize(("signal", "loads"), [("recorded", 0), ("recompute", 1)])
def test_only_recompute_loads_a_second_teacher(make, tiny_pair, monkeypatch, signal, loads):
    load, loaded = PreTrainedModel.from_pretrained.__func__, []

    def spying(cls, name, *args, **kwargs):
        loaded.append(str(name))
        return load(cls, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spying))
    trainer = make(teacher_signal=signal)
    assert loaded.count(str(tiny_pair[0])) == loads
    assert loaded.count(str(tiny_pair[1])) == 1
    _, records = sampled(trainer)
    assert all((record.teacher_hidden_TH is None) == (signal == "recompute") for record in records)


def test_training_with_a_recomputed_teacher(make):
    fields = {"per_device_train_batch_size": 16, "generation_kwargs": {"temperature": 0.0}}
    trainer = make([{"prompt": row["prompt"]} for row in ROWS], **fields, teacher_signal="recompute", max_steps=8)
    before = {name: parameter.clone() for name, parameter in trainer._teacher.model.named_parameters()}
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer._teacher.model.named_parameters())


# -- which divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["skew_kl", "skew_reverse_kl"])
def test_the_configured_divergence_is_what_is_minimised(make, teacher, kind):
    trainer = make(divergence=kind, skew=0.3, temperature=0.8, kl_clip=0.75)
    batch, _ = sampled(trainer)
    loss = trainer.compute_loss(trainer.model, batch).item()

    total, tokens, clipped = 0.0, 0, 0
    for i, row in enumerate(ROWS[:8]):
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        prompts = (batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist(), trainer._renderer.teacher_ids([row])[0])
        with torch.no_grad():
            q, p = (
                (model(torch.tensor([ids + completion], device=DEVICE)).logits[0, len(ids) - 1 : -1] / 0.8).softmax(-1)
                for model, ids in zip((trainer.model, teacher), prompts, strict=True)
            )
        first, second = (p, q) if kind == "skew_kl" else (q, p)
        divergence = (first * (first / (0.3 * first + 0.7 * second)).log()).sum(-1)
        total, tokens, clipped = total + divergence.clamp(max=0.75).sum(), tokens + len(p), clipped + (divergence > 0.75).sum()
    assert loss == pytest.approx((total / tokens).item(), rel=1e-4)
    assert 0 < clipped < tokens
    assert trainer._metrics["train"]["osd/loss/clipped"] == [pytest.approx((clipped / tokens).item())]


# -- importance weights -------------------------------------------------------------------------------------------------


def test_samples_of_the_engine_are_reweighted_to_the_student(engine, tiny_pair, teacher):
    """The mean of a function of the third state, by weighted samples from q* and by a sum over all 4096 states.

    Measured with this seed: the corrected mean is 2.0 standard errors off, the uncorrected one 12; at 4.5 a correct engine
    would fail with one seed in 100,000 if the mean were normal.
    """
    from osd.engine.engine import PairPrompt

    student = AutoModelForCausalLM.from_pretrained(tiny_pair[1]).to(DEVICE).eval()
    prompts = {teacher: [50, 7, 51], student: [7, 8, 9]}
    engine.load_student_weights(student.named_parameters())
    # A bias draws from another distribution than q*, so that only the recorded probability of the draw corrects it.
    sampling = {"max_tokens": 2, "ignore_eos": True, "seed": None, "logit_bias": {i: (-1.0) ** i for i in range(64)}}
    torch.manual_seed(0)
    completions = engine.generate(
        [PairPrompt(teacher_token_ids=prompts[teacher], student_token_ids=prompts[student])] * 3000, sampling=sampling
    )

    starts = torch.tensor(list(itertools.product(range(64), repeat=2)))
    with torch.no_grad():
        starting = {m: torch.cat([torch.tensor(p).expand(4096, -1), starts], 1).to(DEVICE) for m, p in prompts.items()}
        logits = {m: m(ids).logits.cpu() for m, ids in starting.items()}
    last = {m: x[:, -1].log_softmax(-1).double() for m, x in logits.items()}
    third_N = (last[teacher].exp() * (last[teacher] - last[student])).sum(-1)  # KL(π_t‖π_θ) at each state
    before = logits[student][:, -3:-1].log_softmax(-1).double().gather(-1, starts[..., None])[..., 0]
    exact = (before.sum(1).exp() * third_N).sum()

    drawn = torch.tensor([c.token_ids for c in completions])
    logp_BT, draw_BT = (torch.stack([getattr(c.record, name) for c in completions]) for name in ("logp_theta", "logp_draw"))
    columns = [torch.nn.functional.pad(x, (0, 1)) for x in (logp_BT, draw_BT)]  # the third token was not drawn
    weight_BT, _ = importance_weights(*columns, torch.ones(3000, 3), correction="prefix", clip=None)
    value_B = third_N[drawn[:, 0] * 64 + drawn[:, 1]]

    def off(value_B):
        return ((value_B.mean() - exact).abs() / (value_B.std() / len(value_B) ** 0.5)).item()

    assert off(weight_BT[:, 2] * value_B) < 4.5
    assert off(value_B) > 9


def test_the_loss_is_weighted_by_the_probability_of_the_draw(make):
    """Of the three columns that could be mistaken for each other, `logp_draw` divides and `logp_theta` multiplies."""
    bias = {token: (-1.0) ** token for token in range(7, 64)}
    fields = {"generation_kwargs": {"logit_bias": bias}, "importance_clip": None}
    trainer = make(importance_correction="prefix", **fields)
    batch, records = sampled(trainer)
    mask = batch["loss_mask"]
    assert (records[0].logp_draw - records[0].logq).abs().max() > 0.1
    for name in ("logp_theta", "logp_draw"):
        for i, record in enumerate(records):
            assert torch.equal(batch[name][i][mask[i] != 0].cpu(), getattr(record, name))

    weight_BT, _ = importance_weights(batch["logp_theta"], batch["logp_draw"], mask, correction="prefix", clip=None)
    loss, gradient = loss_and_gradient(trainer, batch)
    plain = make(**{**fields, "importance_clip": 2.0})
    expected, total = 0.0, torch.zeros_like(gradient)
    for i, t in mask.nonzero().tolist():
        one = torch.zeros_like(mask)
        one[i, t] = 1
        alone, gradient_alone = loss_and_gradient(plain, batch | {"loss_mask": one})
        expected, total = expected + weight_BT[i, t].item() * alone, total + weight_BT[i, t] * gradient_alone
    assert loss == pytest.approx(expected, rel=1e-4)
    assert (gradient - total).norm() < 1e-3 * total.norm()
    weight_N = weight_BT[mask != 0].double()
    metrics = trainer._metrics["train"]
    assert metrics["osd/importance/mean_weight"] == [pytest.approx(weight_N.mean().item())]
    ess = weight_N.sum() ** 2 / weight_N.square().sum() / len(weight_N)
    assert metrics["osd/importance/ess"] == [pytest.approx(ess.item())]
    assert metrics["osd/importance/truncated"] == [0]


def test_a_clip_is_applied_and_counted(make):
    trainer = make(importance_correction="sequence")
    batch, _ = sampled(trainer)
    columns, kept = (batch["logp_theta"], batch["logp_draw"], batch["loss_mask"]), batch["loss_mask"] != 0
    clip = importance_weights(*columns, correction="sequence", clip=None)[0][kept].median().item()
    trainer.args.importance_clip = clip
    weight_BT, truncated_BT = importance_weights(*columns, correction="sequence", clip=clip)
    trainer.compute_loss(trainer.model, batch)
    assert 0 < truncated_BT[kept].float().mean() < 1
    assert trainer._metrics["train"]["osd/importance/truncated"] == [pytest.approx(truncated_BT[kept].float().mean().item())]
    assert weight_BT.max().item() == pytest.approx(clip)


def test_on_policy_samples_and_evaluation_have_no_weights(make):
    """Samples of the student alone weigh 1, so that the loss is that without correction; evaluation has no weights."""
    trainer, plain = make(importance_correction="sequence", mix_fraction=0.0), make()
    batch, _ = sampled(trainer)
    (loss, gradient), (expected, wanted) = (loss_and_gradient(t, batch) for t in (trainer, plain))
    assert loss == pytest.approx(expected, rel=1e-4)
    assert (gradient - wanted).norm() < 1e-3 * wanted.norm()
    assert trainer._metrics["train"]["osd/importance/ess"] == [pytest.approx(1, abs=1e-4)]
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    assert not any(name.startswith("osd/importance/") for name in trainer._metrics["eval"])


# -- the same samples for several steps ---------------------------------------------------------------------------------


def reuse(make, rows=ROWS, **fields):
    return make(rows, num_iterations=2, importance_correction="prefix", **fields)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_prompt_is_sampled_once_and_used_for_every_iteration(make, engine, stream, accumulation):
    rows = IterableDataset.from_generator(lambda: iter(ROWS)) if stream else ROWS
    before = engine.weights_version
    size = 4 // accumulation
    trainer = reuse(make, rows, max_steps=8, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    calls, trained = [], []
    watch(trainer, lambda prompts: calls.append(sorted(prompt[0] for prompt in prompts)))
    compute_loss = trainer.compute_loss

    def spying(model, inputs, **kwargs):
        trained.append((trainer.state.global_step, inputs["prompt_ids"][:, 0].tolist()))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = spying
    trainer.train()
    assert len(calls) == 4
    assert sorted(itertools.chain(*calls)) == list(range(7, 23))
    assert engine.weights_version == before + 4
    for step in range(8):
        used = [ids for at, ids in trained if at == step]
        assert len(used) == accumulation
        assert sorted(itertools.chain(*used)) == calls[step // 2]


def test_reused_samples_are_weighted_towards_the_student_as_it_is_now(make, monkeypatch):
    seen = []

    def spying(logp_theta_BT, logp_draw_BT, mask_BT, **kwargs):
        seen.append((trainer.state.global_step, logp_theta_BT, logp_draw_BT, mask_BT))
        return importance_weights(logp_theta_BT, logp_draw_BT, mask_BT, **kwargs)

    trainer = reuse(make, max_steps=4, temperature=0.8)
    monkeypatch.setattr(passes, "importance_weights", spying)
    compute_loss, checks = trainer.compute_loss, []

    def live_logp(batch):
        """log π_θ of the trainer's model now, by its own forward pass, [B, T]."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            logits = trainer.model(ids, attention_mask=mask).logits[:, -batch["completion_ids"].size(1) - 1 : -1]
        return (logits / 0.8).log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]

    def checking(model, inputs, **kwargs):
        checks.append((live_logp(inputs), inputs["logp_theta"]))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = checking
    trainer.train()
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    for (step, logp_theta, _, mask), (live, recorded) in zip(seen, checks, strict=True):
        kept = mask != 0
        torch.testing.assert_close(logp_theta[kept], live[kept], atol=1e-4, rtol=1e-4)
        stale = (recorded - live)[kept].abs().max()
        assert stale > 0.01 if step % 2 else stale < 1e-3
    assert torch.equal(seen[0][2], seen[1][2])  # the behaviour policy is what it was


def test_a_student_that_did_not_move_weighs_as_it_was_recorded(make, monkeypatch):
    """In bfloat16 the trainer's log π_θ is 0.07 nats per token off the float32 engine's; that is not to enter the weights."""
    seen = []

    def spying(logp_theta_BT, logp_draw_BT, mask_BT, **kwargs):
        seen.append(logp_theta_BT)
        return importance_weights(logp_theta_BT, logp_draw_BT, mask_BT, **kwargs)

    monkeypatch.setattr(passes, "importance_weights", spying)
    trainer = reuse(make, max_steps=2, bf16=True, learning_rate=0.0, gradient_accumulation_steps=2)
    now, computed = passes._logprobs, []
    monkeypatch.setattr(passes, "_logprobs", lambda *args: (computed.append(now(*args)), computed[-1])[1])
    recorded, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: (
        recorded.append(inputs["logp_theta"]),
        compute_loss(model, inputs, **kwargs),
    )[1]
    trainer.train()
    assert len(seen) == 4
    for used, was, own in zip(seen, recorded, computed, strict=True):
        torch.testing.assert_close(used, was, atol=1e-5, rtol=0)
        assert (own - was).abs().max() > 0.01


def test_a_run_resumed_between_two_samplings_samples_again_and_goes_on_with_the_same_prompts(make):
    with pytest.warns(UserWarning, match="save_steps=1 is not a multiple of num_iterations=2"):
        whole = reuse(make, max_steps=4, save_strategy="steps", save_steps=1)
    calls = []
    watch(whole, lambda prompts: calls.append(sorted(p[0] for p in prompts)))
    whole.train()
    resumed, again = reuse(make, max_steps=4), []
    watch(resumed, lambda prompts: again.append(sorted(p[0] for p in prompts)))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")
    assert len(calls) == 2
    assert again == calls
    assert resumed.state.global_step == 4


# -- α over training ----------------------------------------------------------------------------------------------------


def alphas_over_training(trainer):
    seen = []
    watch(trainer, lambda _: seen.append([c.record.alpha for c in trainer.vllm_generation.last_batch.completions]))
    trainer.train()
    return seen


def test_alpha_follows_its_schedule_from_the_teacher_to_the_student(make):
    trainer = make(alpha_schedule="linear", alpha_max_end=0.0, max_steps=4, max_completion_length=24)
    seen = alphas_over_training(trainer)
    assert logged(trainer, "osd/schedule/alpha_max") == pytest.approx([1, 0.75, 0.5, 0.25])
    highest = [max(alpha.max() for alpha in step) for step in seen]
    assert highest[2] == pytest.approx(0.5)
    assert highest[3] == pytest.approx(0.25)
    trainer = make(alpha_schedule="cosine", alpha_min_end=1.0, alpha_schedule_steps=2, max_steps=4)
    seen = alphas_over_training(trainer)
    assert logged(trainer, "osd/schedule/alpha_min") == pytest.approx([0, 0.5, 1, 1])
    assert all((alpha == 1).all() for alpha in seen[2])


def test_a_run_without_a_schedule_is_not_left_with_anothers(make, engine):
    alphas_over_training(make(alpha_schedule="linear", alpha_max_end=0.0, alpha_schedule_steps=1, max_steps=2))
    assert engine.mixing.alpha_max == 0
    [step] = alphas_over_training(make(max_steps=1))
    assert max(alpha.max() for alpha in step) > 0.3


def test_a_share_of_the_completions_is_the_students_own(make):
    fields = {"mix_fraction": 0.5, "per_device_train_batch_size": 16, "max_steps": 4}
    seen = alphas_over_training(make(**fields))
    own = [[bool((alpha == 0).all()) for alpha in step] for step in seen]
    assert all((alpha > 0).all() for step in seen for alpha in step if (alpha != 0).any())
    assert 16 < sum(map(sum, own)) < 48  # 64 completions; 32 are expected, with a standard deviation of 4
    assert own[0] != own[1]
    assert [[bool((a == 0).all()) for a in step] for step in alphas_over_training(make(**fields))] == own


def test_a_row_can_ask_for_the_student_alone(make, monkeypatch):
    rows = [{**row, "mix": i % 3 != 0} for i, row in enumerate(ROWS)]
    trainer = make(rows=rows, per_device_train_batch_size=8)
    asked, unmixed = [], sampling_module.unmixed

    def watched(rows, *args, **kwargs):
        asked.append([row["mix"] for row in rows])
        return unmixed(rows, *args, **kwargs)

    monkeypatch.setattr(sampling_module, "unmixed", watched)
    seen = [[bool((alpha != 0).any()) for alpha in step] for step in alphas_over_training(trainer)]
    assert seen == asked
    assert {True, False} <= set(seen[0])


def test_a_mix_that_is_no_truth_value_is_refused(make):
    with pytest.raises(ValueError, match="the dataset's column 'mix' has 'no'; use true, or false"):
        make([{**row, "mix": "no"} for row in ROWS])


def test_only_the_first_tokens_are_mixed(make):
    trainer = make(mix_tokens=3, eval_dataset=None)
    for step in alphas_over_training(trainer):
        for alpha in step:
            assert (alpha[:3] > 0).all()
            assert (alpha[3:] == 0).all()


# -- the teacher's privilege --------------------------------------------------------------------------------------------


def test_the_gap_is_what_the_teachers_own_prompt_is_worth(make, teacher):
    """Over every token of the batch, against transformers. Measured noise: 6e-7 of 3 nats."""
    trainer = make(privilege_gap_steps=1, privilege_gap_tokens=10_000)
    batch, _ = sampled(trainer)
    completions = trainer.vllm_generation.last_batch.completions
    gaps = []
    for i, (row, completion) in enumerate(zip(ROWS[:8], completions, strict=True)):
        plain = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        with_it, without = (
            logp(teacher, ids, completion.token_ids) for ids in (trainer._renderer.teacher_ids([row])[0], plain)
        )
        gaps.append(with_it - without)
    gap = torch.cat(gaps)
    assert gap.abs().mean() > 0.05
    assert trainer._metrics["train"]["osd/privilege/gap"] == [pytest.approx(gap.mean().item(), abs=1e-4)]
    assert trainer._metrics["train"]["osd/privilege/gap_abs"] == [pytest.approx(gap.abs().mean().item(), abs=1e-4)]


def test_no_privilege_is_no_gap(make):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    trainer = make(rows, privilege_gap_steps=2, privilege_gap_tokens=5, max_steps=4, temperature=0.7)
    trainer.train()
    assert logged(trainer, "osd/privilege/gap") == pytest.approx([0, 0], abs=1e-4)
    assert logged(trainer, "osd/privilege/gap_abs") == pytest.approx([0, 0], abs=1e-4)


def test_measuring_the_gap_does_not_change_the_run(make, monkeypatch):
    """The planted error: without its own random state, the next step draws other tokens."""
    from contextlib import nullcontext

    plain, measured = (weights_after(make(max_steps=3, privilege_gap_steps=n)) for n in (0, 1))
    for name in plain:
        torch.testing.assert_close(measured[name], plain[name], rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(privilege_module.torch.random, "fork_rng", lambda **_: nullcontext())
    planted = weights_after(make(max_steps=3, privilege_gap_steps=1))
    assert max((planted[name] - plain[name]).abs().max() for name in plain) > 1e-3
