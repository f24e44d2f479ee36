"""Tests of the bias of importance weights for on-policy distillation, by enumerating all completions.

Student and teacher are tiny: 5 token ids, one of them the end, and at most 3 tokens give 85 completions. Expectations under
the sampling distribution are exact sums over all of them, so the tests of unbiasedness need no statistics.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from osd.core import MixingConfig
from osd.mixing import mix
from osd.train.divergence import Divergence
from osd.train.importance import CORRECTIONS, importance_weights
from osd.train.lm_head import Head
from osd.train.losses import batch_loss

# B completions (all 85), T tokens, V vocabulary, H hidden size.

V, T, END = 5, 3, 0
STUDENT_PROMPT, TEACHER_PROMPT = [1, 2], [3, 4, 1, 2]
BIAS_V = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0])  # logit bias: the sampling distribution differs from q*


def tiny(seed):
    torch.manual_seed(seed)
    size = dict(vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**size, num_key_value_heads=2, initializer_range=0.7, tie_word_embeddings=False)
    return LlamaForCausalLM(config).double().eval()


def every_completion():
    """Return ids [B, T] padded with END, and mask [B, T]."""
    whole = [y for y in itertools.product(range(V), repeat=T) if END not in y[:-1]]
    cut = [(*start, END) for n in range(T - 1) for start in itertools.product(range(1, V), repeat=n)]
    lengths = torch.tensor([len(y) for y in (*whole, *cut)])
    ids_BT = torch.tensor([[*y, *[END] * (T - len(y))] for y in (*whole, *cut)])
    return ids_BT, (torch.arange(T) < lengths[:, None]).long()


def hidden_states(model, prompt, ids_BT):
    ids = torch.cat([torch.tensor(prompt).expand(len(ids_BT), -1), ids_BT], 1)
    return model.model(ids).last_hidden_state[:, len(prompt) - 1 : -1]


def head(model):
    return Head(weight_VH=model.lm_head.weight, bias_V=None, scale=1.0, softcap=None)


@pytest.fixture(scope="module")
def world():
    """Hidden states of both models at every state, and the log-probabilities of all tokens."""
    student, teacher = tiny(2), tiny(1)
    ids_BT, mask_BT = every_completion()
    student_hidden, teacher_hidden = (
        hidden_states(m, p, ids_BT) for m, p in ((student, STUDENT_PROMPT), (teacher, TEACHER_PROMPT))
    )
    logits = [(h @ m.lm_head.weight.T).detach() for h, m in ((student_hidden, student), (teacher_hidden, teacher))]
    logq_BTV = mix(*(x.reshape(-1, V) for x in logits), MixingConfig()).logq_BV.double().log_softmax(-1).reshape(-1, T, V)

    def of_tokens(logp_BTV):
        return logp_BTV.gather(-1, ids_BT[..., None])[..., 0]

    return SimpleNamespace(
        student=student,
        teacher=teacher,
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden.detach(),
        mask=mask_BT,
        logp=of_tokens(logits[0].log_softmax(-1)),
        logq=of_tokens(logq_BTV),
        logp_draw=of_tokens((logq_BTV + BIAS_V).log_softmax(-1)),
    )


def probability(logp_BT, mask_BT):
    return (logp_BT * mask_BT).sum(1).exp()


def expected(world, probability_B, weight_BT, of):
    """Return E[Σ_t w_t D_t] over completions with these probabilities, and its gradient in the student's weights."""
    result = batch_loss(
        world.student_hidden,
        world.teacher_hidden,
        head(world.student),
        head(world.teacher),
        world.mask,
        of=of,
        weight_BT=weight_BT * probability_B[:, None],
        num_items_in_batch=1,
    )
    gradients = torch.autograd.grad(result.loss, list(world.student.parameters()), retain_graph=True)
    return result.loss.item(), torch.cat([g.flatten() for g in gradients])


def on_policy(world, of=None):
    return expected(world, probability(world.logp, world.mask), torch.ones_like(world.logp), of or Divergence(kind="skew_kl"))


def corrected(world, correction, clip=None, logp_draw=None, of=None):
    """Return the expectation of the corrected estimator under the sampling distribution, and its gradient."""
    given = world.logp_draw if logp_draw is None else logp_draw
    weight_BT, _ = importance_weights(world.logp, given, world.mask, correction=correction, clip=clip)
    drawn = probability(world.logp_draw, world.mask)
    return expected(world, drawn, weight_BT.double(), of or Divergence(kind="skew_kl"))


def error(world, *args, **kwargs):
    """Return the relative errors of the expected loss and of its expected gradient."""
    (loss, gradient), (wanted, wanted_gradient) = corrected(world, *args, **kwargs), on_policy(world)
    return abs(loss - wanted) / wanted, ((gradient - wanted_gradient).norm() / wanted_gradient.norm()).item()


def test_probabilities_of_all_completions_sum_to_one(world):
    assert len(world.mask) == 85
    for logp in (world.logp, world.logp_draw, world.logq):
        assert probability(logp, world.mask).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("correction", ["prefix", "sequence"])
def test_prefix_and_sequence_weights_are_unbiased(world, correction):
    assert max(error(world, correction)) < 1e-6  # the weights are float32; measured 1e-7


def test_uncorrected_samples_are_biased(world):
    loss, gradient = error(world, "none")
    assert loss > 0.1  # measured 0.22
    assert gradient > 0.5  # measured 0.86


def test_prefix_weights_are_unbiased_for_other_divergences_and_token_clips(world):
    for of in (Divergence(beta=0.0), Divergence(beta=0.5, temperature=0.7), Divergence(kind="skew_reverse_kl", clip=0.3)):
        (loss, gradient), (wanted, wanted_gradient) = corrected(world, "prefix", of=of), on_policy(world, of)
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert (gradient - wanted_gradient).norm() < 1e-5 * wanted_gradient.norm()


def test_weights_by_q_instead_of_the_sampling_distribution_are_biased(world):
    assert min(error(world, "prefix", logp_draw=world.logq)) > 0.02


def test_token_weights_correct_only_one_step(world):
    """Exact for the first two tokens and biased after them. The bias is smaller here than without a correction."""
    assert max(error(world, "none")) > max(error(world, "token")) > 1e-3
    first_two = SimpleNamespace(**{**vars(world), "mask": world.mask * torch.tensor([1, 1, 0])})
    weight_BT, _ = importance_weights(world.logp, world.logp_draw, world.mask, correction="token", clip=None)
    drawn, on = probability(world.logp_draw, world.mask), probability(world.logp, world.mask)
    ones = torch.ones_like(world.logp)
    of = Divergence(kind="skew_kl")
    assert expected(first_two, drawn, weight_BT.double(), of)[0] == pytest.approx(
        expected(first_two, on, ones, of)[0], rel=1e-6
    )


def test_weighting_by_the_tokens_own_ratio_corrects_nothing(world):
    """Weighting D_t by ρ_t has the same expectation as no weights. So "token" uses the ratio of the previous step."""
    own_BT = (world.logp - world.logp_draw).exp()
    drawn = probability(world.logp_draw, world.mask)
    of = Divergence(kind="skew_kl")
    assert expected(world, drawn, own_BT, of)[0] == pytest.approx(corrected(world, "none")[0], rel=1e-6)


def test_clipping_lowers_the_estimate_and_is_reported(world):
    """Truncation biases the estimate downwards. The clipped weights are reported."""
    weights = {
        clip: importance_weights(world.logp, world.logp_draw, world.mask, correction="sequence", clip=clip)
        for clip in (None, 1.0)
    }
    assert not weights[None][1].any()
    assert weights[1.0][1].any()
    assert weights[1.0][0].max() == 1
    assert (weights[1.0][0] == weights[None][0].clamp(max=1)).all()
    assert corrected(world, "sequence", clip=1.0)[0] < 0.98 * on_policy(world)[0]


def test_prefix_weights_vary_less_than_sequence_weights(world):
    drawn = probability(world.logp_draw, world.mask)
    variance = {}
    for correction in ("prefix", "sequence"):
        weight_BT, _ = importance_weights(world.logp, world.logp_draw, world.mask, correction=correction, clip=None)
        weight_BT = weight_BT.double() * world.mask
        mean_T = drawn @ weight_BT
        variance[correction] = drawn @ weight_BT.square() - mean_T.square()
    assert variance["prefix"][0].item() == pytest.approx(0, abs=1e-6)
    assert (variance["prefix"] < variance["sequence"]).all()


def test_samples_of_the_student_have_weight_one(world):
    for correction in CORRECTIONS:
        weight_BT, clipped_BT = importance_weights(world.logp, world.logp, world.mask, correction=correction, clip=1.0)
        assert (weight_BT == 1).all()
        assert not clipped_BT.any()


def test_padding_does_not_affect_weights():
    """Values after the end of a completion are ignored, including NaN."""
    logp, mask = torch.tensor([[-1.0, -2.0, float("nan")]]), torch.tensor([[1, 1, 0]])
    weight_BT, _ = importance_weights(logp, torch.tensor([[-2.0, -2.5, 0.0]]), mask, correction="sequence", clip=None)
    assert weight_BT[0, 0].item() == pytest.approx(torch.tensor(1.5).exp().item())
