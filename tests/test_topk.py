"""Top-k supervision: the rows that are recorded, and loss and gradient on them against the whole vocabulary.

N tokens, V vocabulary, k ids of a row.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from osd.core import TokenRecord
from osd.engine import topk as topk_module
from osd.engine.request import PairOptions, check_topk
from osd.engine.topk import ids_and_logprobs, top_k
from osd.train import divergence as divergence_module
from osd.train.divergence import Divergence, token_divergence
from osd.train.lm_head import Head, TopK
from osd.train.losses import batch_loss

V, H, N = 50, 8, 300
EACH_DIVERGENCE = [
    *(Divergence(beta=beta) for beta in (0.0, 0.3, 1.0)),
    *(Divergence(kind=kind, skew=skew) for kind in ("skew_kl", "skew_reverse_kl") for skew in (0.1, 0.7)),
]
IDENTITY = Head(weight_VH=torch.eye(V, dtype=torch.float64), bias_V=None, scale=1.0, softcap=None)


def divergences(function):
    return pytest.mark.parametrize("of", EACH_DIVERGENCE, ids=lambda of: f"{of.kind} {of.beta} {of.skew}")(function)


def terms(logp_s, logp_t, of):
    """A divergence as a sum of w · KL(a‖b): (w, log a, log b) of each term."""

    def mixed(first, second, share):
        return torch.log(share * first.exp() + (1 - share) * second.exp())

    if of.kind == "skew_kl":
        return [(1, logp_t, mixed(logp_t, logp_s, of.skew))]
    if of.kind == "skew_reverse_kl":
        return [(1, logp_s, mixed(logp_s, logp_t, of.skew))]
    if of.beta in (0, 1):
        return [(1, logp_s, logp_t) if of.beta else (1, logp_t, logp_s)]
    middle = mixed(logp_t, logp_s, of.beta)
    return [(of.beta, logp_t, middle), (1 - of.beta, logp_s, middle)]


def written_out(logp_s, logp_t, of):
    return sum(w * (a.exp() * (a - b)).sum(-1) for w, a, b in terms(logp_s, logp_t, of))


def random_logits(seed, sharpness=3.0, rows=N):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharpness


def rows_of(logp_NV, k):
    """Top-k rows in float64."""
    top = logp_NV.topk(k)
    rest_N1 = logp_NV.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top.indices.double(), top.values, rest_N1], -1)


# -- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, V])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 25])
def test_rows_are_the_largest_log_probabilities_and_the_mass_of_the_rest(monkeypatch, k, chunk):
    """Also of a policy so sure that one minus the others is nothing in float32; temperature 0 counts as 1."""
    monkeypatch.setattr(topk_module, "_CHUNK_LOGITS", chunk)
    logits_NV, temperature_N = random_logits(0, sharpness=6.0), torch.tensor([1.0, 0.6, 0.0]).repeat(N // 3)
    logits_NV[:30, 11] += 60
    divisor_N1 = torch.where(temperature_N == 0, 1.0, temperature_N)[:, None]
    id_Nk, logp_NO = ids_and_logprobs(top_k(logits_NV.float(), temperature_N, k))
    logp_NV = (logits_NV.float().double() / divisor_N1).log_softmax(-1)
    torch.testing.assert_close(logp_NO[:, :k].double(), logp_NV.topk(k).values, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logp_NO[:, :k].double(), logp_NV.gather(-1, id_Nk), atol=2e-5, rtol=1e-5)
    rest_N = logp_NV.scatter(-1, id_Nk, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(logp_NO[:, k].double(), rest_N, atol=2e-5, rtol=1e-5)
    assert (rest_N < -20).sum() >= 30


def test_options_that_contradict_or_are_out_of_range():
    with pytest.raises(ValueError, match="topk=3 with hidden=True: the record has one of them"):
        PairOptions(hidden=True, topk=3)
    with pytest.raises(ValueError, match="topk='3' is not a whole number"):
        PairOptions(topk="3")
    for wrong in (-1, V + 1):
        with pytest.raises(ValueError, match=rf"teacher_topk={wrong} is out of range: both models share 50 .* use 1 to 50"):
            check_topk(wrong, V, "teacher_topk")
    for shape in ((3, 5), (2, 4), (2,)):
        with pytest.raises(ValueError, match=r"teacher_topk_TX is .* use \[T, 2k \+ 1\] with T = 2"):
            TokenRecord(
                values_TR=torch.zeros(2, 10), teacher_hidden_TH=None, teacher_topk_TX=torch.zeros(shape), weights_version=0
            )


# -- the loss -----------------------------------------------------------------------------------------------------------


@divergences
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("extras", [{"scale": 1.0, "softcap": None}, {"scale": 0.5, "softcap": 3.0}])
def test_all_ids_give_the_whole_divergence(monkeypatch, of, rows, extras):
    """Loss, all gradients, entropy and clip to 1e-5, with rows as the engine records them; in chunks of any size."""
    monkeypatch.setattr(divergence_module, "_CHUNK_LOGITS", rows * V)
    rng = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    weight_BT, temperature = torch.rand(3, 5, generator=rng), 0.7
    shapes = (3, 5, H), (V + 2, H), (V + 2,)  # two ids of the student's are padding, and cut
    leaves = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    teacher_logits = random_logits(2, rows=15)
    row_BTX = top_k(teacher_logits.float(), torch.full((15,), temperature), V).view(3, 5, -1)
    logp_t = (teacher_logits / temperature).log_softmax(-1).view(3, 5, V)

    wanted = [x.clone().requires_grad_() for x in leaves]
    logits = (wanted[0] @ wanted[1][:V].T + wanted[2][:V]) * extras["scale"]
    logits = logits if extras["softcap"] is None else extras["softcap"] * torch.tanh(logits / extras["softcap"])
    logp_s = (logits / temperature).log_softmax(-1)
    per_token = written_out(logp_s, logp_t, of)
    clip = per_token[mask != 0].quantile(0.6).item()
    reference = (per_token.clamp(max=clip) * weight_BT * mask).sum() / mask.sum()
    reference.backward()

    given = [x.clone().requires_grad_() for x in leaves]
    student = Head(weight_VH=given[1], bias_V=given[2], **extras)
    of = replace(of, temperature=temperature, clip=clip)
    result = batch_loss(given[0], row_BTX, student, TopK(vocab_size=V), mask, of=of, weight_BT=weight_BT)
    result.loss.backward()

    torch.testing.assert_close(result.loss, reference, atol=0, rtol=1e-5)
    for got, expected in zip(given, wanted, strict=True):
        assert (got.grad - expected.grad).norm() < 1e-5 * expected.grad.norm()
    assert 0 < result.clipped < mask.sum()
    torch.testing.assert_close(result.entropy, (-(logp_s.exp() * logp_s).sum(-1) * mask).sum().detach())


def bounds(of, p, q, gap):
    """Bounds of the gap and of the gradient's error (in logits, L1), as docs/distillation.md states them."""
    if of.kind == "skew_kl":
        return p * torch.log1p((1 - of.skew) * q / (of.skew * p)), 2 * p
    if of.kind == "skew_reverse_kl":
        return q * torch.log1p((1 - of.skew) * p / (of.skew * q)), 2 * (1 - of.skew) * p / of.skew
    if of.beta == 0:
        return gap, 2 * p
    if of.beta == 1:
        return gap, 2 * (gap + q)
    return (of.beta * p + (1 - of.beta) * q) * torch.tensor(2.0).log(), 2 * of.beta * p


@divergences
@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_the_loss_is_below_by_the_divergence_inside_the_rest(of, k, sharpness):
    """The gap to 1e-9, and loss and gradient within their bounds, which hold with little room to spare."""
    logits_NV, logp_t = random_logits(k, sharpness), random_logits(100 + k, sharpness).log_softmax(-1)
    given, wanted = (logits_NV.clone().requires_grad_() for _ in range(2))
    logp_s = wanted.log_softmax(-1)
    whole_N = written_out(logp_s, logp_t, of)
    lower_N, _ = token_divergence(given, rows_of(logp_t, k), IDENTITY, TopK(vocab_size=V), of)
    whole_N.sum().backward()
    lower_N.sum().backward()
    gap_N, error_N = (whole_N - lower_N).detach(), (given.grad - wanted.grad).abs().sum(-1)

    outside = torch.ones(N, V, dtype=torch.bool).scatter(-1, logp_t.topk(k).indices, False)

    def rest(logp_NV):  # its mass, and log-probabilities inside of it
        inside = logp_NV.detach()[outside].view(N, V - k)
        return inside.exp().sum(-1), inside.log_softmax(-1)

    expected_N = 0.0
    for w, a, b in terms(logp_s, logp_t, of):
        (mass_N, inside_a), (_, inside_b) = rest(a), rest(b)
        expected_N = expected_N + w * mass_N * (inside_a.exp() * (inside_a - inside_b)).sum(-1)
    torch.testing.assert_close(gap_N, expected_N, atol=1e-12, rtol=1e-9)
    most_N, most_error_N = bounds(of, rest(logp_t)[0], rest(logp_s)[0], gap_N)
    assert (gap_N <= most_N * (1 + 1e-9)).all()
    assert (error_N <= most_error_N * (1 + 1e-9)).all()
    assert (error_N / most_error_N).max() > 0.05


@divergences
def test_a_sure_teacher_keeps_the_mass_of_its_rest(of):
    """The teacher gives 1e-17 to what the student holds possible; a rest of one minus the others would be nothing."""
    teacher_NV, student_NV = random_logits(3, 1.0), random_logits(4, 1.0)
    teacher_NV[:, 7] += 40
    row_NX = top_k(teacher_NV.float(), torch.ones(N), V - 1)
    lower_N, _ = token_divergence(student_NV, row_NX, IDENTITY, TopK(vocab_size=V), of)
    whole_N = written_out(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), of)
    torch.testing.assert_close(lower_N, whole_N, atol=1e-5, rtol=1e-5)  # a rest of one id is that id


@divergences
def test_ids_that_the_teacher_excludes_leave_the_loss_finite_where_it_is(of):
    """Log-probabilities of minus infinity: forward and mixed divergences are finite, as is their gradient."""
    logp_t = random_logits(5).index_fill(-1, torch.arange(40), -torch.inf).log_softmax(-1)
    student = random_logits(6).requires_grad_()
    lower_N, _ = token_divergence(student, rows_of(logp_t, 20), IDENTITY, TopK(vocab_size=V), of)
    lower_N.sum().backward()
    if of.kind == "jsd" and of.beta == 1:
        assert (lower_N > 1e30).all()  # infinite by its definition
        return
    assert lower_N.isfinite().all()
    assert student.grad.isfinite().all()


def test_logits_exist_one_chunk_at_a_time(monkeypatch):
    """Sizes that autograd keeps, in the forward pass and inside of the backward pass."""
    monkeypatch.setattr(divergence_module, "_CHUNK_LOGITS", 10 * V)
    kept = []
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    student = Head(weight_VH=weight, bias_V=None, scale=1.0, softcap=None)
    row_NX = top_k(random_logits(7).float(), torch.ones(N), 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        token_divergence(hidden, row_NX, student, TopK(vocab_size=V), Divergence())[0].sum().backward()
    assert max(kept) == row_NX.numel() < N * V
