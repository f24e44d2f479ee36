"""Recorded supervision: the loss of two hidden states equals the divergence written out over full logits."""

from types import SimpleNamespace

import pytest
import torch

from trainers.losses import Head, head_of, logit_scale, on_shared_vocabulary, pad_hidden, recorded_divergence

B, T, V, H_S, H_T = 3, 5, 11, 8, 6


def head(rows, hidden, *, seed=0, bias=False, scale=1.0, softcap=None):
    rng = torch.Generator().manual_seed(seed)
    bias_V = torch.randn(rows, generator=rng) if bias else None
    return Head(weight_VH=torch.randn(rows, hidden, generator=rng), bias_V=bias_V, scale=scale, softcap=softcap)


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

    loss, entropy, tokens = recorded_divergence(given, hidden[1], student, teacher, mask, beta=beta, temperature=temperature)
    logp_s, logp_t = written_out(expected, student, temperature), written_out(hidden[1], teacher, temperature)
    reference = (divergence(logp_s, logp_t, beta) * mask).sum() / mask.sum()
    loss.backward()
    reference.backward()

    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.grad, expected.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, (-(logp_s.exp() * logp_s).sum(-1) * mask).sum().detach(), atol=1e-4, rtol=1e-5)
    assert tokens == mask.sum()


def test_items_in_batch_divides_the_sum(hidden, mask):
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    mean, _, tokens = recorded_divergence(*hidden, *heads, mask, beta=1.0, temperature=1.0)
    total, _, _ = recorded_divergence(*hidden, *heads, mask, beta=1.0, temperature=1.0, num_items_in_batch=torch.tensor(28.0))
    torch.testing.assert_close(total * 28, mean * tokens)


@pytest.mark.parametrize(("rows_s", "rows_t"), [(V, V + 3), (V + 3, V)])
def test_different_vocabulary_paddings_are_cut_to_the_shared_ids(hidden, mask, rows_s, rows_t):
    student, teacher = head(rows_s, H_S, seed=1, bias=True), head(rows_t, H_T, seed=2, bias=True)
    cut = [Head(weight_VH=h.weight_VH[:V], bias_V=h.bias_V[:V], scale=1.0, softcap=None) for h in (student, teacher)]
    loss, *_ = recorded_divergence(*hidden, student, teacher, mask, beta=0.5, temperature=1.0)
    expected, *_ = recorded_divergence(*hidden, *cut, mask, beta=0.5, temperature=1.0)
    torch.testing.assert_close(loss, expected)


def test_a_student_that_zero3_keeps_in_shards_cannot_be_cut():
    student, teacher = head(V + 3, H_S), head(V, H_T)
    student.weight_VH.ds_shape = torch.Size([V + 3, H_S])
    with pytest.raises(ValueError, match="ZeRO-3"):
        on_shared_vocabulary(student, teacher)


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
    padded = pad_hidden(kept, T, torch.device("cpu"))
    assert padded.shape == (3, T, H_T)
    assert padded.sum(-1).tolist() == [[6, 6, 0, 0, 0], [0] * 5, [12, 12, 12, 12, 0]]


def test_a_masked_error_leaves_loss_and_gradient_finite(hidden):
    mask = torch.tensor([[1] * T, [0] * T, [1] * T])
    recorded = [hidden[1][0], None, hidden[1][2]]
    student = hidden[0].clone().requires_grad_()
    heads = head(V, H_S, seed=1), head(V, H_T, seed=2)
    loss, *_ = recorded_divergence(
        student, pad_hidden(recorded, T, torch.device("cpu")), *heads, mask, beta=0.5, temperature=1.0
    )
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all()


def test_a_batch_of_errors_only_is_refused():
    with pytest.raises(RuntimeError, match="every completion of the batch ended in an error"):
        pad_hidden([None, None], T, torch.device("cpu"))
