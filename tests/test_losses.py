"""Every loss is the loop written from its equation (docs/METHODS.md), on odd shapes and scales; is finite in
bf16 training; and sends its gradients where they must go."""

import math
from statistics import covariance, fmean, pvariance
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, settled

import main_cssl
from losses import METHODS, REGULARIZERS, find
from losses.barlow import barlow_loss
from losses.byol import cosine_distance
from losses.contrastive import BLOCK, LogSumExp, contrastive_distillation, info_nce
from losses.falcon import falcon_loss
from losses.vicreg import covariance_loss, variance_loss
from models.learner import Outputs


def cos(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def nce(query, positive, negatives, tau=0.3):
    """-ln of the positive's share, for one query."""
    terms = [math.exp(cos(query, k) / tau) for k in [positive, *negatives]]
    return -math.log(terms[0] / sum(terms))


def cosines(z, f, g):
    queues = [F.normalize(g[0], dim=1), F.normalize(g[1][1:], dim=1)]
    loop = fmean(nce(x, y, torch.cat(queues)) for x, y in zip(z[0], f[0]))
    yield info_nce(z[0], f[0], queues, 0.3), loop
    a, b = list(torch.cat(z)), list(torch.cat(f))
    both = [nce(x[i], y[i], y[:i] + y[i + 1 :]) for x, y in ((a, b), (b, a)) for i in range(len(a))]
    yield contrastive_distillation(z, f, 0.3), fmean(both)
    yield cosine_distance(z[0], f[0]), fmean(2 - 2 * cos(x, y) for x, y in zip(z[0], f[0]))


def simclr(z, f, g):
    """Its loss, and both of PNR's; row i is no candidate of anchor i."""
    args = arguments("--simclr_tau 0.3 --simclr_tau_distill 0.4", "simclr")
    method = find("simclr")(SimpleNamespace(feature_dim=4), args)
    student, teacher, predicted = Outputs(z=z), Outputs(z=f), Outputs(z=g)
    a, b, p, other_view = (list(torch.cat(views)) for views in (z, f, g, z[::-1]))

    def loop(anchors, positives, banks, tau):
        others = [[y for bank in banks for y in bank[:i] + bank[i + 1 :]] for i in range(len(anchors))]
        totals = [sum(math.exp(cos(x, y) / tau) for y in ys) for x, ys in zip(anchors, others)]
        return fmean(math.log(t) - cos(x, y) / tau for t, x, y in zip(totals, anchors, positives))

    yield method.ssl(student), loop(a, other_view, [a], 0.3)
    yield method.ssl(student, negatives=teacher), loop(a, other_view, [a, b], 0.4)
    yield method.align(predicted, teacher, negatives=student), loop(p, b, [b, a], 0.4)


def vicreg(z, f, g):
    columns = z[0].T.tolist()
    yield variance_loss(z[0]), fmean(max(0, 1 - math.sqrt(covariance(c, c) + 1e-4)) for c in columns)
    squares = (covariance(p, q) ** 2 for p in columns for q in columns if p is not q)
    yield covariance_loss(z[0]), sum(squares) / len(columns)


def barlow(z, f, g):
    """The correlations of the standardised columns."""
    a, b = ([[(x - fmean(c)) / math.sqrt(pvariance(c) + 1e-5) for x in c] for c in v.T.tolist()] for v in z)
    entries = {(i, j): fmean(x * y for x, y in zip(p, q)) for i, p in enumerate(a) for j, q in enumerate(b)}
    loop = 0.1 * sum((c - 1) ** 2 if i == j else 5e-3 * c**2 for (i, j), c in entries.items())
    yield barlow_loss(*z, 5e-3, 0.1), loop


def falcon(z, f, g):
    """Of bounded logits, as its are; the mean code m has to be uniform."""
    logits = [1.5 * x.tanh() for x in z]
    p, q = (x.softmax(dim=1) for x in logits)
    entropy = fmean(-float(x @ y.log()) for x, y in [*zip(p, q), *zip(q, p)])
    ms = [[fmean(column) for column in x.T.tolist()] for x in (p, q)]
    reverse = fmean(sum(x * math.log(len(m) * x) for x in m) for m in ms)
    forward = fmean(-math.log(len(m) * x) for m in ms for x in m)
    for prior, divergence in (("reverse", reverse), ("forward", forward)):
        yield falcon_loss(*logits, 0.7, prior), divergence + 0.7 * entropy


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("n, d", [(2, 3), (5, 7), (8, 4), (13, 1), (3, 16)])
@pytest.mark.parametrize("losses", [cosines, simclr, vicreg, barlow, falcon])
def test_losses_are_their_loops(losses, n, d, scale):
    rng = torch.Generator().manual_seed(0)
    z, f, g = scale * torch.randn(3, 2, n, d, generator=rng, dtype=torch.float64)
    for ours, loop in losses(list(z), list(f), list(g)):
        assert float(ours) == pytest.approx(loop, rel=1e-9)


def test_sum_over_a_queue_is_the_plain_one():
    """Block by block, the gradient with it: for queues of any size, and where e^x alone would overflow."""
    for rows, size in ((1, 2.0), (BLOCK + 7, 20.0), (3 * BLOCK, 2000.0)):
        rng = torch.Generator().manual_seed(rows)
        q, keys = (torch.randn(n, 16, generator=rng, dtype=torch.float64) for n in (9, rows))
        q, keys = (size * F.normalize(q, dim=1)).requires_grad_(), F.normalize(keys, dim=1)
        (ours, gradient), (plain, expected) = (
            (value, torch.autograd.grad((value * torch.arange(9)).sum(), q)[0])
            for value in (LogSumExp.apply(q, keys), torch.logsumexp(q @ keys.T, dim=1))
        )
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("regularizer", ["cassle", "pnr"])
@pytest.mark.parametrize("method", METHODS)
def test_finite_in_bf16(method, regularizer, norm):
    """Loss and gradients of a later task, for features of that norm; the loss itself is in float32."""
    args, _ = settled(f"--batch_size 8 --precision bf16 --regularizer {regularizer}", method)
    learner = main_cssl.build_learner(args, CPU)
    learner.begin_task(1, CPU.device)
    learner.method.backbone.register_forward_hook(lambda module, x, h: norm * F.normalize(h, dim=1))
    loss, terms, student, _ = learner(*torch.randn(2, 8, 3, 8, 8))
    loss.backward()
    assert loss.dtype == student.z[0].dtype == torch.float32
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    assert all(x.isfinite().all() for x in (*terms.values(), *gradients))


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_go_where_they_must(method, regularizer):
    """Into the student from every term, into the predictor from all but the SSL loss, into nothing frozen."""
    learner = main_cssl.build_learner(settled(f"--batch_size 8 --regularizer {regularizer}", method)[0], CPU)
    learner.begin_task(0, CPU.device)
    assert not any("teacher" in name or "regularizer" in name for name, _ in learner.named_parameters())
    learner.begin_task(1, CPU.device)
    loss, terms, _, _ = learner(*torch.randn(2, 8, 3, 8, 8))
    keep, student = {"retain_graph": True, "allow_unused": True}, learner.method.projector[0].weight
    assert all(torch.autograd.grad(term, student, **keep)[0].abs().sum() > 0 for term in terms.values())
    if regularizer != "finetune":
        predictor = list(learner.regularizer.predictor.parameters())
        assert not any(x is not None for x in torch.autograd.grad(terms["ssl"], predictor, **keep))
    loss.backward()
    for name, p in learner.named_parameters():
        frozen = "teacher" in name or "momentum_encoder" in name or name.endswith(("dictionary", "rows"))
        assert p.requires_grad != frozen and (p.grad is None) == frozen, name
