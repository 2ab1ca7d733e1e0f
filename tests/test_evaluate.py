"""Metrics on hand-computed matrices, the probe and k-NN against plain loops, and the collapse monitors."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import same

from models.resnet import build_backbone
from utils import evaluate, metrics
from utils.collapse import collapse_metrics

MATRIX = [[80.0, 20.0, 30.0], [70.0, 90.0, 40.0], [60.0, 85.0, 95.0]]


def test_metrics_by_hand():
    assert metrics.average_accuracy(MATRIX) == 80
    assert metrics.average_incremental_accuracy(MATRIX) == (80 + (70 + 90) / 2 + 80) / 3
    assert metrics.learning_accuracy(MATRIX) == pytest.approx((80 + 90 + 95) / 3)
    assert metrics.forgetting(MATRIX) == ((80 - 60) + (90 - 85)) / 2
    assert metrics.forward_transfer(MATRIX, [10.0, 15.0, 20.0]) == ((20 - 15) + (40 - 20)) / 2
    assert metrics.knowledge_gain(MATRIX) == ((90 - 20) + (95 - 40)) / 2
    # after task 0: (20 - 50 + 30 - 60) / 2 = -30; after task 1: 40 - 60 = -20
    assert metrics.plasticity(MATRIX, [40.0, 50.0, 60.0]) == -25
    assert metrics.summary(MATRIX, 3, "words", part="k20 task_level")["consolidation"] == 80
    alone = metrics.summary(MATRIX, 3, "words", alone=True)  # networks of their own forget nothing
    assert alone["learning_accuracy"] > 0 and alone["forgetting"] is alone["knowledge_gain"] is None
    # a task that gets better after it was learned was never forgotten, but counts as no less than nothing
    assert metrics.forgetting([[50.0, 0.0], [60.0, 70.0]]) == 0


def test_task_rows_by_hand():
    """Classes 0 and 3 are task 0, 1 and 2 task 1."""
    scores = torch.tensor(
        [[0.35, 0.4, 0.05, 0.2], [0.1, 0.4, 0.3, 0.2], [0.3, 0.2, 0.1, 0.4], [0.0, 0.5, 0.3, 0.2]]
    )
    tasks, parts = (
        SimpleNamespace(names=[["a", "d"], ["b", "c"]]),
        [torch.tensor([0, 2]), torch.tensor([1, 3])],
    )
    owner = evaluate.owners(tasks, SimpleNamespace(classes=list("abcd"), labels=torch.tensor(0)))
    assert owner.tolist() == [0, 1, 1, 0]
    masked, level = evaluate.task_rows(scores, torch.tensor([0, 1, 0, 2]), parts, owner, scores)
    assert masked == [50.0, 50.0] and level == [100.0, 100.0]
    parts = [torch.tensor([1, 2]), torch.tensor([0, 3])]
    assert evaluate.task_rows(scores, torch.tensor([1, 0, 0, -1]), parts, owner, scores)[1] == [50.0, 0.0]


def test_clustering():
    """Three blobs are found whatever their names are; codes that split them lose no purity, but matches."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 5) + 50 * F.one_hot((labels + 1) % 3, 5)
    labels[:3] = -1  # unreadable
    found = evaluate.clustering(x, labels, 3, 0, torch.arange(300) % 6)
    assert (found["nmi"], found["ari"], found["accuracy"]) == (100, 100, 100)
    assert found["codes_accuracy"] < 52 and 60 < found["codes_nmi"] < 100 > found["codes_ari"]


def test_what_is_not_known_is_null():
    """Without a random backbone's row, after one task, and after two of three."""
    cases = [(MATRIX, None, (80, 12.5, None)), ([[80.0]], [10.0], (80, None, None))]
    cases += [(MATRIX[:2], [10.0, 15.0, 20.0], (80, 10, 5))]
    for matrix, random_row, expected in cases:
        block = metrics.summary(matrix, 3, "words", random_row)
        assert tuple(block[x] for x in ("average_accuracy", "forgetting", "forward_transfer")) == expected
        assert (block["plasticity"], block["matrix"], block["tasks"]) == (None, matrix, 3)


def test_accuracy_row():
    labels, predictions = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([0, 1, 1, 3, 3, 3])
    parts = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    assert evaluate.accuracy_row(predictions, labels, parts) == [66.6667, 66.6667]
    labels[3] = -1  # an image that could not be read
    assert evaluate.accuracy_row(predictions, labels, parts) == [66.6667, 100.0]


@pytest.mark.parametrize("k", [7, 200])  # 200: all of them
def test_knn_against_a_loop(k, monkeypatch):
    monkeypatch.setattr(evaluate, "KNN_CHUNK", 6)
    torch.manual_seed(0)
    train, labels, test = torch.randn(50, 8), torch.randint(0, 4, (50,)), torch.randn(20, 8)
    found, few = evaluate.knn(train, labels, test, 4, (k, 1), temperature=0.5)
    assert torch.equal(few.argmax(1), labels[(F.normalize(test) @ F.normalize(train).T).argmax(1)])
    for x, prediction in zip(test, found, strict=True):
        cosine, votes = F.cosine_similarity(x[None], train).double(), torch.zeros(4).double()
        for i in cosine.argsort(descending=True)[:k]:
            votes[labels[i]] += (cosine[i] / 0.5).exp()
        assert prediction.argmax() == votes.argmax()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linear_probe_against_a_loop(momentum):
    """The same softmax regression, its gradient written out, over the same batches."""
    torch.manual_seed(0)
    x, everything = torch.randn(600, 5).double(), torch.ones(600, dtype=torch.bool)
    y, inputs = (x @ torch.randn(5, 3).double()).argmax(1), F.pad(x, (0, 1), value=1)
    (found,) = evaluate.linear_probe(lambda epoch: (x, y), [everything], x, 3, 0.5, momentum, 1, epochs=10)
    rng, (w, v) = torch.Generator().manual_seed(1), torch.zeros(2, 6, 3).double()
    for lr in [0.5] * 6 + [0.05] * 2 + [0.005] * 2:
        for batch in torch.randperm(600, generator=rng).split(256):
            error = (inputs[batch] @ w).softmax(dim=1) - F.one_hot(y[batch], 3)
            v = momentum * v + inputs[batch].T @ error / len(batch)
            w -= lr * v
    torch.testing.assert_close(found, (inputs @ w).softmax(dim=1))
    assert (found.argmax(dim=1) == y).double().mean() > 0.9


def test_sweep_against_a_loop(monkeypatch):
    """The rate that is best on a tenth of the training images, each trained on the others alone."""
    monkeypatch.setattr(evaluate, "SWEEP", rates := (0.001, 0.03, 30.0, 1e38))  # the last diverges
    monkeypatch.setattr(evaluate, "SWEEP_EPOCHS", 10)
    torch.manual_seed(0)
    x, y = torch.randn(2000, 5), torch.randint(0, 3, (2000,))
    x[:, 0] += 1.5 * y
    held_out = torch.randperm(2000, generator=torch.Generator().manual_seed(1)) % 10 == 0
    whole, correct = torch.ones(2000, dtype=torch.bool), {}
    for lr in rates[:3]:
        learnt = (lambda epoch: (x[~held_out], y[~held_out])), [whole[~held_out]]
        (found,) = evaluate.linear_probe(*learnt, x[held_out], 3, lr, 0.0, 1, 10)
        correct[lr] = int((found.argmax(dim=1) == y[held_out]).sum())
    best = max(correct, key=correct.get)
    assert sorted(correct.values())[1] < correct[best]
    assert evaluate.choose_lr(lambda epoch: (x, y), whole, 3, 0.0, 1) == best


def test_evaluation_leaves_the_backbone_alone():
    """No tensor changes, the mode comes back, and a backbone that does change is caught."""
    backbone, images = build_backbone("resnet10", 8, "cifar").train(), torch.randn(40, 3, 8, 8)
    batches = list(zip(images.split(16), torch.arange(40).split(16)))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    features, labels = evaluate.extract_features(backbone, batches)
    assert backbone.training and same(before, dict(backbone.state_dict()))
    torch.testing.assert_close(features, backbone.eval()(images))
    assert torch.equal(labels, torch.arange(40))
    drifting = (batch for batch in batches if backbone.bn1.running_mean.add_(1) is not None)
    with pytest.raises(AssertionError, match="changed the backbone"):
        evaluate.extract_features(backbone, drifting)


def test_collapse_monitors():
    """Each falls to its floor when its collapse is there, and reads high when it is not."""
    torch.manual_seed(0)
    x, even, none = torch.randn(2000, 8), torch.arange(2000) % 10, torch.zeros(2000).long()
    good, values = collapse_metrics(x, (even, 10))
    assert good["feature_std"] > 0.95 and good["effective_rank"] > 7.9 and good["code_entropy"] > 0.999
    assert good["intracluster_variance"] > 0.95
    torch.testing.assert_close(values.float(), torch.linalg.svdvals(x - x.mean(0)), rtol=1e-4, atol=1e-4)
    assert collapse_metrics(x * 0.01 + 1)[0]["feature_std"] < 0.05
    assert collapse_metrics(x[:, :2] @ torch.randn(2, 8))[0]["effective_rank"] < 2.01
    assert collapse_metrics(x, (none, 10))[0]["code_entropy"] == 0
    dead, _ = collapse_metrics(torch.ones(50, 8), (none[:50], 10))
    assert dead == {"feature_std": 0, "effective_rank": 1, "code_entropy": 0, "intracluster_variance": 0}
    assert collapse_metrics(torch.randn(10, 8)[even], (even, 10))[0]["intracluster_variance"] < 1e-6


@pytest.mark.parametrize("dim, threads", [(8, 1), (2**15, 2)])
def test_small_steps_take_one_thread(dim, threads, monkeypatch):
    """And the others get their threads back."""
    monkeypatch.setattr(
        evaluate.SoftmaxRegression, "train_batches", lambda *_: found.append(torch.get_num_threads())
    )
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    probe = evaluate.SoftmaxRegression(dim, 10, [1.0], 0.0, 5, 100, evaluate.ALONE)
    probe.train_one_epoch(torch.zeros(3, dim), torch.zeros(3, dtype=torch.int64))
    assert [*found, torch.get_num_threads()] == [threads, 2]
    torch.set_num_threads(before)
