"""The papers' offline probe: random crops and flips that pass through the network anew in each epoch; one
classifier for each domain beside the joint one."""

import json

import pytest
import torch
import trees
from conftest import TINY, arguments, run

import main_cssl
import main_linear
from data.loader import evaluation_batches
from utils import evaluate
from utils.distributed import Process

CPU = Process(torch.device("cpu"))
STATS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_views():
    """Crops and flips, no change of colour; a function of the key and of the batch's number, whichever rank
    makes it."""
    torch.manual_seed(0)
    colours = torch.randint(0, 256, (700, 3, 1, 1), dtype=torch.uint8).expand(-1, -1, 12, 12)
    plain = torch.cat(list(evaluation_batches(colours, 0, 8, *STATS)))
    views = torch.cat(list(evaluation_batches(colours, 0, 8, *STATS, key=(5, 1))))
    torch.testing.assert_close(views, plain, rtol=0, atol=1e-4)
    images = torch.randint(0, 256, (512, 3, 12, 12), dtype=torch.uint8)
    images = torch.cat((images, images[:188]))
    first, again, other = (
        torch.cat(list(evaluation_batches(images, 0, 8, *STATS, key=(5, epoch)))) for epoch in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert all(
        (a != b).flatten(1).any(1).float().mean() > 0.9
        for a, b in ((first, other), (first[:188], first[512:]))
    )
    assert torch.equal(
        torch.cat(list(evaluation_batches(images[512:], 1, 8, *STATS, key=(5, 1)))), first[512:]
    )
    half = images.clone()
    half[:, :, :, :6], half[:, :, :, 6:] = 0, 255  # dark on the left
    views = torch.cat(list(evaluation_batches(half, 0, 8, *STATS, key=(5, 1))))
    left, right = views[:, :, :, 0].mean((1, 2)), views[:, :, :, -1].mean((1, 2))
    assert 0.4 < (left > right).sum() / (left != right).sum() < 0.6


def test_each_epoch_anew(tmp_path, monkeypatch):
    """In a run and in main_linear.py, which gives the same numbers under a name of its own."""
    monkeypatch.setattr(evaluate, "PROBE_EPOCHS", 4)
    passes, frozen_features = [], main_cssl.frozen_features

    def counted(args, process, backbone, images, epoch=None):
        passes.append((len(images.labels), epoch))
        return frozen_features(args, process, backbone, images, epoch)

    monkeypatch.setattr(main_cssl, "frozen_features", counted)
    flags = f"{TINY} --num_tasks 2 --epochs 1 --eval linear --probe_views"
    assert run(f"{flags} augmented --out_dir {tmp_path / 'a'}") == 0
    once = [(359, None), (1438, 0), (1438, 1), (1438, 2), (1438, 3)]
    assert passes == 3 * once  # a random network, and two tasks
    passes.clear()
    assert run(f"{flags} cached --out_dir {tmp_path / 'c'}") == 0 and passes == 3 * [
        (359, None),
        (1438, None),
    ]
    augmented, cached = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ac")
    assert "random resized crop" in augmented["protocol"] and "no augmentation" in cached["protocol"]
    assert augmented["matrix"] != cached["matrix"]
    assert run(f"--run {tmp_path / 'a'}", main_linear) == 0
    assert run(f"--run {tmp_path / 'a'} --probe_views cached", main_linear) == 0
    after = json.loads((tmp_path / "a" / "results.json").read_text())
    assert after["linear_augmented"] == augmented and after["linear"] == cached


@pytest.fixture(scope="module")
def domainnet(tmp_path_factory):
    return trees.domainnet(tmp_path_factory.mktemp("data"), train=6, test=4)


@pytest.mark.parametrize("views", ["cached", "augmented"])
def test_domains(domainnet, tmp_path, monkeypatch, views):
    """A second matrix, each of whose columns is that of a classifier which has seen its own domain's images
    alone."""
    monkeypatch.setattr(evaluate, "PROBE_EPOCHS", 5)
    flags = f"{TINY} --dataset domainnet --data_dir {domainnet} --scenario domain --epochs 1 --batch_size 4"
    flags += f" --workers 0 --eval linear --probe_lr 1 --probe_views {views}"
    assert run(f"{flags} --domain_order real sketch --out_dir {tmp_path}") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    block = results["linear_per_domain"]
    assert "per domain" in block["protocol"] and "per domain" not in results["protocol"]
    assert [len(row) for row in block["matrix"]] == [2, 2] and len(block["random_backbone"]) == 2
    assert (tmp_path / "accuracy_matrix_linear_per_domain.png").exists()

    args = arguments(f"{flags} --domain_order real sketch")
    _, probe, test, tasks = main_cssl.build_data(args, CPU)
    backbone = main_cssl.build_learner(args, CPU).method.backbone
    backbone.load_state_dict(torch.load(tmp_path / "task1.pt")["backbone"])
    epochs = [
        main_cssl.frozen_features(args, CPU, backbone, probe, e if views == "augmented" else None)[0]
        for e in range(5)
    ]
    tested, labels = main_cssl.frozen_features(args, CPU, backbone, test)
    for domain in (0, 1):
        own, everything = (
            probe.domains == domain,
            torch.ones(int((probe.domains == domain).sum()), dtype=torch.bool),
        )
        alone = (lambda epoch, own=own: epochs[epoch][own]), probe.labels[own], [everything]
        (found,) = evaluate.linear_probe(*alone, tested, len(probe.classes), 1.0, 0.0, args.seed, 5)
        assert block["matrix"][1][domain] == evaluate.accuracy_row(found, labels, [tasks.test[domain]])[0]
