"""Every loss against a loop written from its equation (docs/METHODS.md), on odd shapes and scales; and finite
in bf16 training."""

import math

import pytest
import torch
from conftest import arguments, tiny

import main_cssl
from losses import METHODS, REGULARIZERS
from losses.barlow import barlow_loss
from losses.byol import cosine_distance
from losses.contrastive import contrastive_distillation, info_nce
from losses.falcon import falcon_loss
from losses.vicreg import covariance_loss, variance_loss
from models import build_backbone
from models.learner import Outputs
from utils.distributed import Process

CPU = Process(torch.device("cpu"))
SHAPES = [(2, 3), (5, 7), (8, 4), (13, 1), (3, 16)]  # N, D
SCALES = [1e-3, 1.0, 1e3]


def pairs(n, d, scale, count=2, seed=0):
    """`count` lists of two float64 [n, d] tensors."""
    x = scale * torch.randn(
        count, 2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return [list(pair) for pair in x]


def unit(x):
    return x / math.sqrt(float((x * x).sum()))


def cos(a, b):
    return float(unit(a) @ unit(b))


def nce(query, positive, negatives, tau):
    """-ln of the positive's share, for one query."""
    terms = [math.exp(cos(query, k) / tau) for k in [positive, *negatives]]
    return -math.log(terms[0] / sum(terms))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def entropy_like(p, q):
    return -float((p * q.log()).sum())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n, d", SHAPES)
def test_against_loops(n, d, scale):
    z, f = pairs(n, d, scale)
    near = {"rel": 1e-9, "abs": 1e-9}
    queues = [torch.nn.functional.normalize(torch.randn(k, d, dtype=torch.float64), dim=1) for k in (5, 4)]
    loop = mean(nce(z[0][i], f[0][i], [*queues[0], *queues[1]], 0.3) for i in range(n))
    assert float(info_nce(z[0], f[0], queues, 0.3)) == pytest.approx(loop, **near)

    a, b = torch.cat(z), torch.cat(f)
    loop = mean(
        (
            nce(a[i], b[i], [b[k] for k in range(2 * n) if k != i], 0.3)
            + nce(b[i], a[i], [a[k] for k in range(2 * n) if k != i], 0.3)
        )
        / 2
        for i in range(2 * n)
    )
    assert float(contrastive_distillation(z, f, 0.3)) == pytest.approx(loop, **near)
    assert float(cosine_distance(z[0], f[0])) == pytest.approx(
        mean(2 - 2 * cos(x, y) for x, y in zip(z[0], f[0])), **near
    )

    columns = z[0].T.tolist()
    variances = [sum((x - mean(c)) ** 2 for x in c) / (n - 1) for c in columns]
    loop = mean(max(0.0, 1 - math.sqrt(v + 1e-4)) for v in variances)
    assert float(variance_loss(z[0])) == pytest.approx(loop, **near)
    covariances = [
        sum((x - mean(p)) * (y - mean(q)) for x, y in zip(p, q)) / (n - 1)
        for i, p in enumerate(columns)
        for j, q in enumerate(columns)
        if i != j
    ]
    assert float(covariance_loss(z[0])) == pytest.approx(
        sum(c * c for c in covariances) / d, rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("n, d", SHAPES)
def test_simclr_pnr_loop(n, d):
    """Both losses, written for each anchor i with the other view j."""
    z, f, g = pairs(n, d, 1.0, count=3)
    args = arguments("--simclr_tau 0.3 --simclr_tau_distill 0.4", "simclr")
    method = METHODS["simclr"](build_backbone("resnet10", 4, "cifar"), args)
    out, old, pred = Outputs(z=z), Outputs(z=f), Outputs(z=g)
    a, b, p, tau = torch.cat(z), torch.cat(f), torch.cat(g), 0.4
    others = [[k for k in range(2 * n) if k != i] for i in range(2 * n)]
    main = reg = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        total = sum(math.exp(cos(a[i], a[k]) / tau) + math.exp(cos(a[i], b[k]) / tau) for k in others[i])
        main += (-cos(a[i], a[j]) / tau + math.log(total)) / (2 * n)
        total = sum(math.exp(cos(p[i], b[k]) / tau) + math.exp(cos(p[i], a[k]) / tau) for k in others[i])
        reg += (-cos(p[i], b[i]) / tau + math.log(total)) / (2 * n)
    assert float(method.ssl(out, negatives=old)) == pytest.approx(main, rel=1e-9)
    assert float(method.align(pred, old, negatives=out)) == pytest.approx(reg, rel=1e-9)
    totals = [sum(math.exp(cos(a[i], a[k]) / 0.3) for k in others[i]) for i in range(2 * n)]
    plain = mean(-cos(a[i], a[(i + n) % (2 * n)]) / 0.3 + math.log(totals[i]) for i in range(2 * n))
    assert float(method.ssl(out)) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("scale", SCALES[:2])
@pytest.mark.parametrize("n, d", SHAPES[:3])
def test_barlow_loop(n, d, scale):
    z = pairs(n, d, scale)[0]

    def standard(column):
        centre = mean(column)
        deviation = math.sqrt(mean((x - centre) ** 2 for x in column) + 1e-5)
        return [(x - centre) / deviation for x in column]

    a, b = ([standard(c) for c in view.T.tolist()] for view in z)
    loop = 0.0
    for i in range(d):
        for j in range(d):
            c = sum(x * y for x, y in zip(a[i], b[j])) / n
            loop += 0.1 * ((c - 1) ** 2 if i == j else 5e-3 * c * c)
    assert float(barlow_loss(*z, 5e-3, 0.1)) == pytest.approx(loop, rel=1e-9)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize("n, c", [(2, 3), (5, 7), (8, 4)])
def test_falcon_loop(n, c, prior):
    a, b = pairs(n, c, 1.5)[0]
    p, q = a.softmax(1), b.softmax(1)
    loop = 0.0
    for x, y in ((p, q), (q, p)):
        m = [mean(float(x[i, j]) for i in range(n)) for j in range(c)]
        reverse = mean(sum(float(x[i, j]) * math.log(c * m[j]) for j in range(c)) for i in range(n))
        matching = reverse if prior == "reverse" else mean(-math.log(c * m[j]) for j in range(c))
        loop += (matching + 0.7 * mean(entropy_like(x[i], y[i]) for i in range(n))) / 2
    assert float(falcon_loss(a, b, 0.7, prior)) == pytest.approx(loop, rel=1e-9)


@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("regularizer", ["cassle", "pnr"])
@pytest.mark.parametrize("method", METHODS)
def test_finite_in_bf16(method, regularizer, norm):
    """Loss and gradients of a later task under bf16 autocast, features of that norm; the loss itself is
    float32."""
    args = main_cssl.parse_arguments(
        f"{tiny(method)} --precision bf16 --regularizer {regularizer} --batch_size 8".split()
    )
    args.stem = "cifar"
    learner = main_cssl.build_learner(args, CPU)
    learner.begin_task(1, CPU.device)

    class Scaled(torch.nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, x):
            return norm * torch.nn.functional.normalize(self.backbone(x), dim=1)

    learner.method.backbone = Scaled(learner.method.backbone)
    loss, terms, out, _ = learner(*torch.randn(2, 8, 3, 8, 8))
    loss.backward()
    assert loss.dtype == torch.float32 and out.z[0].dtype == torch.float32
    assert all(t.isfinite() for t in terms.values())
    assert all(p.grad.isfinite().all() for p in learner.parameters() if p.grad is not None)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_go_where_they_must(method, regularizer):
    """None into teacher, momentum encoder, dictionary or queues; the predictor learns from the alignment
    alone, the student from both."""
    args = arguments(f"--precision fp32 --regularizer {regularizer} --batch_size 8", method)
    args.stem = "cifar"
    learner = main_cssl.build_learner(args, CPU)
    learner.begin_task(0, CPU.device)
    assert not any(
        "teacher" in name or name.startswith("regularizer") for name, _ in learner.named_parameters()
    )
    learner.begin_task(1, CPU.device)
    loss, terms, _, _ = learner(*torch.randn(2, 8, 3, 8, 8))
    if regularizer != "finetune":
        predictor = list(learner.regularizer.predictor.parameters())
        assert all(
            g is None
            for g in torch.autograd.grad(terms["ssl"], predictor, retain_graph=True, allow_unused=True)
        )
        student = learner.method.projector[0].weight
        assert all(
            torch.autograd.grad(t, student, retain_graph=True)[0].abs().sum() > 0 for t in terms.values()
        )
    loss.backward()
    for name, p in learner.named_parameters():
        frozen = "teacher" in name or name.startswith("method.momentum_encoder.")
        assert p.requires_grad != frozen and (p.grad is None) == frozen, name
    assert not any(name.endswith(("dictionary", "queue.rows")) for name, _ in learner.named_parameters())
