"""Splits, metrics on hand-computed matrices, the probe and k-NN."""

import pytest
import torch
import torch.nn.functional as F
from conftest import arguments

from models import build_backbone
from utils import evaluate
from utils.collapse import health

MATRIX = [[80.0, 20.0, 30.0], [70.0, 90.0, 40.0], [60.0, 85.0, 95.0]]


def test_metrics_by_hand():
    assert evaluate.average_accuracy(MATRIX) == 80
    assert evaluate.forgetting(MATRIX) == ((80 - 60) + (90 - 85)) / 2
    assert evaluate.forward_transfer(MATRIX, [10.0, 15.0, 20.0]) == ((20 - 15) + (40 - 20)) / 2
    # after task 0: (20 - 50 + 30 - 60) / 2 = -30; after task 1: 40 - 60 = -20
    assert evaluate.plasticity(MATRIX, [40.0, 50.0, 60.0]) == -25
    # a task that gets better after it was learned was never forgotten, but does not count as less than
    # nothing
    assert evaluate.forgetting([[50.0, 0.0], [60.0, 70.0]]) == 0


def test_what_is_not_known_is_null():
    block = evaluate.summary(MATRIX, 3, "words", None)
    assert block["plasticity"] is None and block["forward_transfer"] is None and block["tasks"] == 3
    one = evaluate.summary([[80.0]], 1, "words", [10.0])
    assert one["average_accuracy"] == 80 and one["forgetting"] is None and one["forward_transfer"] is None
    partial = evaluate.summary(MATRIX[:2], 3, "words", [10.0, 15.0, 20.0])
    assert (
        partial["average_accuracy"] == 80 and partial["forgetting"] == 10 and partial["forward_transfer"] == 5
    )
    assert partial["matrix"] == MATRIX[:2]


def test_accuracy_row():
    labels, predictions = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([0, 1, 1, 3, 3, 3])
    parts = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    assert evaluate.accuracy_row(predictions, labels, parts) == [66.6667, 66.6667]
    labels[3] = -1  # an image that could not be read
    assert evaluate.accuracy_row(predictions, labels, parts) == [66.6667, 100.0]


def test_knn_against_a_loop():
    torch.manual_seed(0)
    train, labels, test = torch.randn(50, 8), torch.randint(0, 4, (50,)), torch.randn(20, 8)
    got = evaluate.knn(train, labels, test, 4, k=7, temperature=0.07, chunk=6)
    for x, prediction in zip(test, got):
        cosine = F.cosine_similarity(x[None], train)
        votes = torch.zeros(4, dtype=torch.float64)
        for i in cosine.argsort(descending=True)[:7]:
            votes[labels[i]] += (cosine[i].double() / 0.07).exp()
        assert prediction == votes.argmax()
    assert evaluate.knn(train, labels, test, 4, k=200).shape == (20,)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linear_probe_against_torch(momentum):
    """The same softmax regression as a plain loop over the same batches."""
    torch.manual_seed(0)
    x = torch.randn(600, 5)
    y = (x @ torch.randn(5, 3)).argmax(1)
    everything = torch.ones(600, dtype=torch.bool)
    (got,) = evaluate.linear_probe(
        lambda _: x, y, [everything], x, 3, lr=0.5, momentum=momentum, seed=1, epochs=10
    )
    w, b = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, requires_grad=True)
    rng, speed = torch.Generator().manual_seed(1), [torch.zeros(3, 5), torch.zeros(3)]
    for epoch in range(10):
        lr = 0.5 * (1 if epoch < 6 else 0.1 if epoch < 8 else 0.01)
        order = torch.randperm(600, generator=rng)
        for batch in order.split(256):
            grads = torch.autograd.grad(F.cross_entropy(x[batch] @ w.T + b, y[batch]), [w, b])
            with torch.no_grad():
                for p, g, v in zip((w, b), grads, speed):
                    p -= lr * v.mul_(momentum).add_(g)
    expected = (x @ w.T + b).argmax(1)
    assert (got == expected).float().mean() > 0.99 and (got == y).float().mean() > 0.9


def test_evaluation_leaves_the_backbone_alone():
    """No tensor changes, the mode comes back, and a backbone that does change is caught."""
    backbone = build_backbone("resnet10", 4, "cifar").train()
    images = torch.randn(40, 3, 8, 8)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    features = evaluate.extract(backbone, images.split(16))
    assert features.shape == (40, 32) and backbone.training
    torch.testing.assert_close(features, backbone.eval()(images))
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())

    def drift():
        for part in images.split(16):
            backbone.bn1.running_mean.add_(1)
            yield part

    with pytest.raises(AssertionError, match="changed the backbone"):
        evaluate.extract(backbone, drift())


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_classify_learns_separable_classes(protocol):
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = F.one_hot(y, 4) + 0.1 * torch.randn(400, 4)
    args, known = arguments(f"--eval {protocol} --probe_lr 0.5"), torch.arange(300) < 200
    both = evaluate.classify(args, evaluate.ALONE, lambda _: x[:300], y[:300], [known, ~known], x[300:], 4)
    assert all(torch.equal(predictions, y[300:]) for predictions in both)


def test_collapse_monitors():
    """Each falls to its floor when its collapse is there, and reads high when it is not."""
    torch.manual_seed(0)
    x, even = torch.randn(2000, 8), torch.arange(2000) % 10
    good, values = health(x, (even, 10))
    assert good["feature_std"] > 0.95 and good["effective_rank"] > 7.9 and good["code_entropy"] > 0.999
    assert good["intracluster_variance"] > 0.95
    torch.testing.assert_close(values.float(), torch.linalg.svdvals(x - x.mean(0)), rtol=1e-4, atol=1e-4)
    assert health(x * 0.01 + 1)[0]["feature_std"] < 0.05
    assert health(x[:, :2] @ torch.randn(2, 8))[0]["effective_rank"] < 2.01
    assert health(x, (torch.zeros(2000, dtype=torch.long), 10))[0]["code_entropy"] == 0
    dead, _ = health(torch.ones(50, 8), (torch.zeros(50, dtype=torch.long), 10))
    assert dead == {"feature_std": 0, "effective_rank": 1, "code_entropy": 0, "intracluster_variance": 0}
    assert health(torch.randn(10, 8)[even], (even, 10))[0]["intracluster_variance"] < 1e-6
