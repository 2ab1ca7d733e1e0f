"""The papers' offline probe: random crops anew in each epoch; a classifier for each domain."""

from types import SimpleNamespace

import pytest
import torch
import trees
from conftest import CPU, TINY, run, settled

import main_cssl
import main_linear
from data.datasets import ImageSet
from data.loader import evaluation_batches
from utils import evaluate
from utils.distributed import Process

FLAGS = f"{TINY} --epochs 1 --num_tasks 2 --batch_size 200 --moco_queue_size 200 --eval linear --probe_views"


def seen(pixels, epoch=None, rank=0, world=1):
    images = ImageSet(pixels, torch.zeros(len(pixels)), ["a"], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    args, process = (
        SimpleNamespace(image_size=8, seed=5, workers=0, skip_corrupt=False),
        Process(CPU.device, rank, world),
    )
    return torch.cat([x for x, _ in evaluation_batches(args, process, images, epoch)])


def test_views():
    """Crops and flips, no change of colour; a function of the epoch and the image's place alone."""
    images = torch.randint(0, 256, (700, 3, 12, 12), dtype=torch.uint8)
    colours = images[:, :, :1, :1].expand_as(images)
    torch.testing.assert_close(seen(colours, 1), seen(colours), rtol=0, atol=1e-4)
    images[512:] = images[:188]
    first, other = seen(images, 1), seen(images, 2)
    assert torch.equal(first, seen(images, 1)) and torch.equal(seen(images, 1, 1, 2), first[512:])
    for a, b in ((first, other), (first[:188], first[512:])):
        assert (a != b).flatten(1).any(1).float().mean() > 0.9
    images[:, :, :, :6], images[:, :, :, 6:] = 0, 255  # dark on the left
    left, right = (seen(images, 1)[:, :, :, column].mean((1, 2)) for column in (0, -1))
    assert 0.4 < (left > right).sum() / (left != right).sum() < 0.6


def test_each_epoch_anew(tmp_path, monkeypatch):
    """In a run and in main_linear.py, which gives the same numbers under a name of its own."""
    trees.no_pictures(monkeypatch)
    monkeypatch.setattr(evaluate, "PROBE_EPOCHS", 3)
    passes, batches = [], evaluate.evaluation_batches

    def counted(args, process, images, epoch=None):
        passes.append((len(images.labels), epoch))
        return batches(args, process, images, epoch)

    monkeypatch.setattr(evaluate, "evaluation_batches", counted)
    assert run(f"{FLAGS} augmented --out_dir {tmp_path / 'a'}") == 0
    assert run(f"{FLAGS} cached --out_dir {tmp_path / 'c'}") == 0
    assert passes[:12] == 3 * [(359, None), (1438, 0), (1438, 1), (1438, 2)]  # a random network, two tasks
    assert passes[12:] == 3 * [(359, None), (1438, None)]
    augmented, cached = trees.results(tmp_path / "a"), trees.results(tmp_path / "c")
    assert augmented["matrix"] != cached["matrix"] and augmented["protocol"] != cached["protocol"]
    assert run(f"--run {tmp_path / 'a'}", main_linear) == 0
    assert run(f"--run {tmp_path / 'a'} --probe_views cached", main_linear) == 0
    after = trees.results(tmp_path / "a")
    own = {b["settings"]["views"]: b for b in after.values() if isinstance(b, dict) and "settings" in b}
    for views, block in (("augmented", augmented), ("cached", cached)):
        assert {key: own[views][key] for key in block} == block


@pytest.mark.parametrize("views", ["cached", "augmented"])
def test_domains(tmp_path, monkeypatch, views):
    """A second matrix; each column is of a classifier that has seen its own domain's images alone."""
    trees.no_pictures(monkeypatch)
    monkeypatch.setattr(evaluate, "PROBE_EPOCHS", 3)
    root = trees.domainnet(tmp_path / "data", train=6, test=4, domains=("real", "sketch"))
    flags = f"{FLAGS} {views} --dataset domainnet --data_dir {root} --domain_order real sketch --probe_lr 1"
    flags += " --scenario domain --batch_size 4 --workers 0"
    assert run(f"{flags} --out_dir {tmp_path}") == 0
    results = trees.results(tmp_path)
    block = results["linear_per_domain"]
    assert "per domain" in block["protocol"] and "per domain" not in results["protocol"]
    assert [len(row) for row in block["matrix"]] == [2, 2] and len(block["random_backbone"]) == 2
    args, (_, probe, test, tasks) = settled(flags)
    learner = main_cssl.build_learner(args, CPU)
    learner.method.backbone.load_state_dict(torch.load(tmp_path / "task1.pt")["backbone"])
    extract = evaluate.features_of(args, CPU, learner.method.backbone)
    epochs = [extract(probe, *([epoch] * (views == "augmented")))[0] for epoch in range(3)]
    tested, labels = extract(test)
    for domain in (0, 1):
        own = probe.domains == domain
        alone = (lambda epoch, own=own: (epochs[epoch][own], probe.labels[own])), [torch.ones(24) > 0]
        (found,) = evaluate.linear_probe(*alone, tested, len(probe.classes), 1.0, 0.0, args.seed, 3)
        assert (
            block["matrix"][1][domain]
            == evaluate.accuracy_row(found.argmax(dim=1), labels, [tasks.test[domain]])[0]
        )
