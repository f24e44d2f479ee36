"""Recorded supervision: the loss of two hidden states equals the divergence written out over full logits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from osd.train import divergence as divergence_module
from osd.train.divergence import DIVERGENCES, Divergence, token_logprobs
from osd.train.lm_head import Head, head_of, logit_scale
from osd.train.losses import batch_loss, pad_column, pad_rows
from tests.heads import H_S, H_T, B, T, V, head


def written_out(hidden_BTH, of, temperature):
    """log-probabilities [B, T, V] the plain way."""
    logits = hidden_BTH @ of.weight_VH.T
    logits = (logits if of.bias_V is None else logits + of.bias_V) * of.scale
    if of.softcap is not None:
        logits = of.softcap * torch.tanh(logits / of.softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def divergence(logp_s, logp_t, beta):
    """Per-token generalised JSD as TRL defines it."""
    if beta == 0:
        return (logp_t.exp() * (logp_t - logp_s)).sum(-1)
    if beta == 1:
        return (logp_s.exp() * (logp_s - logp_t)).sum(-1)
    mixed = torch.log((1 - beta) * logp_s.exp() + beta * logp_t.exp())
    kl_t = (logp_t.exp() * (logp_t - mixed)).sum(-1)
    kl_s = (logp_s.exp() * (logp_s - mixed)).sum(-1)
    return beta * kl_t + (1 - beta) * kl_s


@pytest.fixture
def hidden():
    rng = torch.Generator().manual_seed(7)
    return torch.randn(B, T, H_S, generator=rng), torch.randn(B, T, H_T, generator=rng)


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("extras", [{}, {"bias": True, "scale": 0.5, "softcap": 3.0}])
def test_loss_and_gradient_equal_the_written_out_divergence(hidden, mask, beta, temperature, extras):
    student, teacher = head(V, H_S, seed=1, **extras), head(V, H_T, seed=2, **extras)
    given, expected = (hidden[0].clone().requires_grad_() for _ in range(2))

    of = Divergence(beta=beta, temperature=temperature)
    loss, entropy, tokens, clipped = batch_loss(given, hidden[1], student, teacher, mask, of=of)
    logp_s, logp_t = written_out(expected, student, temperature), written_out(hidden[1], teacher, temperature)
    reference = (divergence(logp_s, logp_t, beta) * mask).sum() / mask.sum()
    loss.backward()
    reference.backward()

    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.grad, expected.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, (-(logp_s.exp() * logp_s).sum(-1) * mask).sum().detach(), atol=1e-4, rtol=1e-5)
    assert tokens == mask.sum()
    assert clipped == 0


def test_items_in_batch_divides_the_sum(hidden, mask):
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    mean = batch_loss(*hidden, *heads, mask, of=Divergence())
    total = batch_loss(*hidden, *heads, mask, of=Divergence(), num_items_in_batch=torch.tensor(28.0))
    torch.testing.assert_close(total.loss * 28, mean.loss * mean.tokens)


@pytest.mark.parametrize(("rows_s", "rows_t"), [(V, V + 3), (V + 3, V)])
def test_different_vocabulary_paddings_are_cut_to_the_shared_ids(hidden, mask, rows_s, rows_t):
    student, teacher = head(rows_s, H_S, seed=1, bias=True), head(rows_t, H_T, seed=2, bias=True)
    cut = [Head(weight_VH=h.weight_VH[:V], bias_V=h.bias_V[:V], scale=1.0, softcap=None) for h in (student, teacher)]
    loss, *_ = batch_loss(*hidden, student, teacher, mask, of=Divergence(beta=0.5))
    expected, *_ = batch_loss(*hidden, *cut, mask, of=Divergence(beta=0.5))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.0625}, 0.0625),
        ({"logit_scale": None, "lm_head_multiplier": 2.0}, 2.0),
        ({"logits_scaling": 8.0, "model_type": "granite"}, 1 / 8),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
)
def test_logit_scale_under_every_name(config, scale):
    text = SimpleNamespace(**config)
    text.get_text_config = lambda: text
    assert logit_scale(text) == scale
    assert head_of(torch.empty(V, H_S), None, text).scale == scale


def test_hidden_states_are_padded_and_errors_become_zeros():
    kept = [torch.ones(2, H_T), None, torch.full((4, H_T), 2.0)]
    padded = pad_rows(kept, T, torch.empty(V, H_T), torch.device("cpu"))
    assert padded.shape == (3, T, H_T)
    assert padded.sum(-1).tolist() == [[6, 6, 0, 0, 0], [0] * 5, [12, 12, 12, 12, 0]]
    nothing = pad_rows([None, None], T, torch.empty(V, H_T, dtype=torch.bfloat16), torch.device("cpu"))
    assert torch.equal(nothing, torch.zeros(2, T, H_T, dtype=torch.bfloat16))


def test_a_masked_error_leaves_loss_and_gradient_finite(hidden):
    mask = torch.tensor([[1] * T, [0] * T, [1] * T])
    recorded = [hidden[1][0], None, hidden[1][2]]
    student = hidden[0].clone().requires_grad_()
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    padded = pad_rows(recorded, T, heads[1].weight_VH, torch.device("cpu"))
    loss = batch_loss(student, padded, *heads, mask, of=Divergence(beta=0.5)).loss
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all()


def test_columns_of_the_record_are_padded_and_errors_become_zeros():
    padded = pad_column([torch.tensor([-1.0, -2.0]), None], 3, torch.device("cpu"))
    assert padded.tolist() == [[-1, -2, 0], [0, 0, 0]]


# -- skewed divergences, by dense autograd in float64 -------------------------------------------------------------------


def skewed(logp_s, logp_t, kind, skew):
    first, second = (logp_t, logp_s) if kind == "skew_kl" else (logp_s, logp_t)
    return (first.exp() * (first - torch.log(skew * first.exp() + (1 - skew) * second.exp()))).sum(-1)


def leaves(hidden, student):
    """Copies of the student's hidden states, weight and bias in float64 that collect gradients; and the head they make."""
    given = [x.double().clone().requires_grad_() for x in (hidden, student.weight_VH, student.bias_V)]
    return given, replace(student, weight_VH=given[1], bias_V=given[2])


@pytest.mark.parametrize("kind", ["skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("skew", [0.1, 0.7])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("extras", [{"scale": 1.0, "softcap": None}, {"scale": 0.5, "softcap": 3.0}])
def test_skewed_divergences_equal_dense_autograd(hidden, mask, monkeypatch, kind, skew, rows, extras):
    """To float64 rounding, in the hidden states, the weight and the bias; in chunks of any size, clipped and weighted."""
    monkeypatch.setattr(divergence_module, "_CHUNK_LOGITS", rows * V)
    student, teacher = head(V, H_S, seed=1, bias=True, **extras), head(V, H_T, seed=2, bias=True, **extras)
    teacher = replace(teacher, weight_VH=teacher.weight_VH.double(), bias_V=teacher.bias_V.double())
    weight_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    given, of_given = leaves(hidden[0], student)
    dense, of_dense = leaves(hidden[0], student)

    per_token = skewed(written_out(dense[0], of_dense, 0.7), written_out(hidden[1].double(), teacher, 0.7), kind, skew)
    clip = per_token[mask != 0].mean().item()
    reference = (per_token.clamp(max=clip) * weight_BT * mask).sum() / mask.sum()
    of = Divergence(kind=kind, skew=skew, temperature=0.7, clip=clip)
    result = batch_loss(given[0], hidden[1].double(), of_given, teacher, mask, of=of, weight_BT=weight_BT)
    reference.backward()
    result.loss.backward()

    assert result.loss.dtype == torch.float64
    torch.testing.assert_close(result.loss, reference, atol=1e-12, rtol=1e-10)
    assert result.clipped == (per_token[mask != 0] > clip).sum() > 0
    for got, wanted in zip(given, dense, strict=True):
        assert wanted.grad.abs().max() > 1e-5
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-12, rtol=1e-9)
    logp = written_out(hidden[0].double(), of_dense, 0.7)
    torch.testing.assert_close(result.entropy, (-(logp.exp() * logp).sum(-1) * mask).sum().detach())


def test_skew_near_zero_is_the_plain_divergence(hidden, mask):
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    for kind, beta in (("skew_kl", 0.0), ("skew_reverse_kl", 1.0)):
        plain = batch_loss(*hidden, *heads, mask, of=Divergence(beta=beta)).loss
        nearly = batch_loss(*hidden, *heads, mask, of=Divergence(kind=kind, skew=1e-9)).loss
        torch.testing.assert_close(nearly, plain, atol=1e-3, rtol=1e-3)


def test_the_skewed_divergence_keeps_its_promise_under_autocast(hidden, mask):
    """bfloat16 factors, float32 sums: within bfloat16's rounding of the float32 loss, gradients in the leaves' dtype."""
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    of = Divergence(kind="skew_kl")
    exact = batch_loss(*hidden, *heads, mask, of=of).loss
    student = hidden[0].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batch_loss(student, hidden[1], *heads, mask, of=of).loss
    loss.backward()
    assert loss.dtype == student.grad.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)


def test_a_clipped_token_has_no_gradient_and_counts_as_the_clip(hidden, mask):
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    student = hidden[0].clone().requires_grad_()
    per_token = divergence(written_out(hidden[0], heads[0], 1.0), written_out(hidden[1], heads[1], 1.0), 1.0)
    clip = per_token[mask != 0].mean().item()
    result = batch_loss(student, hidden[1], *heads, mask, of=Divergence(clip=clip))
    result.loss.backward()
    above = (per_token > clip) & (mask != 0)
    assert 0 < above.sum() < mask.sum()
    assert result.clipped == above.sum()
    assert (student.grad[above] == 0).all()
    assert (student.grad[~above & (mask != 0)].abs().sum(-1) > 0).all()
    torch.testing.assert_close(result.loss, (per_token.clamp(max=clip) * mask).sum() / mask.sum(), atol=1e-5, rtol=1e-5)


def test_weights_multiply_each_token_and_not_the_divisor(hidden, mask):
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    weight_BT = torch.arange(B * T, dtype=torch.float32).reshape(B, T)
    per_token = divergence(written_out(hidden[0], heads[0], 1.0), written_out(hidden[1], heads[1], 1.0), 0.3)
    loss = batch_loss(*hidden, *heads, mask, of=Divergence(beta=0.3), weight_BT=weight_BT).loss
    torch.testing.assert_close(loss, (per_token * weight_BT * mask).sum() / mask.sum(), atol=1e-5, rtol=1e-5)


def test_a_batch_without_tokens_is_a_finite_zero(hidden):
    for kind in DIVERGENCES:
        student = hidden[0].clone().requires_grad_()
        nothing = torch.zeros(B, T)
        result = batch_loss(student, hidden[1], head(V, H_S), head(V, H_T), nothing, of=Divergence(kind=kind))
        result.loss.backward()
        assert result.loss == 0
        assert (student.grad == 0).all()


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_log_probabilities_of_given_tokens(hidden, monkeypatch, rows):
    monkeypatch.setattr(divergence_module, "_CHUNK_LOGITS", rows * V)
    student = head(V, H_S, seed=1, bias=True, softcap=3.0)
    tokens = torch.randint(0, V, (B * T,), generator=torch.Generator().manual_seed(0))
    got = token_logprobs(hidden[0].reshape(-1, H_S), student, tokens, 0.7)
    wanted = written_out(hidden[0].reshape(-1, H_S), student, 0.7).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
