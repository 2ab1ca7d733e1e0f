"""The online probe: what it computes, leaves alone and sees, and that it goes on where it was."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import trees
from conftest import CPU, TINY, crash, fails, outcome, run, same, settled, tiny

import main_cssl
from data.augment import ViewConfig
from data.loader import LABELLED, Loader
from models.online import OnlineProbe

FLAGS = f"{TINY} --num_tasks 2 --epochs 1 --log_every 1 --batch_size 150 --moco_queue_size 150"


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run without, and of one with each kind of probe."""
    root = tmp_path_factory.mktemp("online")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        trees.no_pictures(patch)
        for mode in ("off", "clean", "released"):
            assert run(f"{FLAGS} --online_probe {mode} --out_dir {root / mode}") == 0
    return root


def test_what_it_leaves_alone(runs):
    """clean: losses, weights, running statistics, queues and --eval's numbers. released: weights, but not the
    running statistics of the backbone and of its momentum twin."""
    clean = [row for row in lines(runs / "clean") if "online" not in row["kind"]]
    assert lines(runs / "off") == [{k: v for k, v in row.items() if "online" not in k} for row in clean]
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for task in ("task0.pt", "task1.pt"):
        off, clean, released = (outcome(runs / mode)[task] for mode in ("off", "clean", "released"))
        for part, prefix in (("backbone", ""), ("heads", "momentum_encoder.backbone.")):
            assert same(clean[part], off[part])
            changed = {k for k, v in off[part].items() if not torch.equal(released[part][k], v)}
            assert changed == {k for k in off[part] if k.startswith(prefix) and k.endswith(statistics)}


@pytest.mark.parametrize("mode", ["clean", "released"])
def test_results_and_resume(runs, mode, tmp_path, monkeypatch):
    """A matrix of its own beside that of --eval, and a loss for each step, of which a crash loses nothing."""
    trees.no_pictures(monkeypatch)
    results = trees.results(runs / mode)
    block = results[f"online_linear_{mode}"]
    assert mode in block["protocol"] and block["protocol"] != results["protocol"]
    assert [len(row) for row in block["matrix"]] == [2, 2] and block["matrix"] != results["matrix"]
    assert sum("online_loss" in row for row in lines(runs / mode) if row["kind"] == "train") == 8
    flags = f"{FLAGS} --online_probe {mode} --save_every 2 --out_dir {tmp_path}"
    crash(monkeypatch, flags, lambda run: run.task == 1 and run.step)
    assert run(flags) == 0 and same(outcome(tmp_path), outcome(runs / mode))


@pytest.mark.parametrize("mode", ["clean", "released"])
def test_equation(mode):
    """Softmax regression on the features that the batch would have alone, with a rate of its own."""
    args, (_, probe, *_) = settled(f"--regularizer finetune --batch_size 12 --online_probe {mode}")
    learner = main_cssl.build_learner(args, CPU, probe)
    learner.begin_task(0, CPU.device)
    group, linear = main_cssl.build_optimizer(args, learner).param_groups[1], learner.online.classifier
    assert (group["lr"], group["lars_weight_decay"]) == (0.3, 0) and group["params"][0] is linear.weight
    (view1, view2, images), y = torch.randn(3, 12, 3, 8, 8), torch.randint(0, 10, (12,))
    alone = copy.deepcopy(learner.method.backbone)
    alone(view1), alone(view2)
    h = alone.train(mode == "released")(images).detach()
    loss, terms, *_ = learner(view1, view2, (images, y))
    expected = F.cross_entropy(linear(h), y)
    torch.testing.assert_close([terms["online_loss"], loss], [expected, terms["ssl"] + expected])
    assert all(torch.equal(a, b) for a, b in zip(learner.method.backbone.buffers(), alone.buffers()))


def test_images():
    """Of all tasks, in view 2's augmentation, in another order each epoch."""
    args, (train, probe, _, tasks) = settled("--online_probe clean --solarize_p 0 1 --min_scale 1")
    loader, labelled = main_cssl.build_loaders(args, CPU, train, probe, tasks, 0)
    twin = Loader(probe, torch.arange(1438), 32, [ViewConfig(8)], args.seed, LABELLED, steps=loader.steps)
    order, other = (torch.cat(list(twin.batches(epoch))) for epoch in (1, 0))
    batches = list(labelled(1, 0))
    labels = torch.cat([y for _, y in batches])
    assert torch.equal(labels, probe.labels[order]) and all(len(y.unique()) > 5 for _, y in batches)
    assert not torch.equal(order, other) and len(order.unique()) == len(order) == 32 * loader.steps
    assert torch.equal(next(labelled(1, 3))[0], batches[3][0])
    assert all((x * probe.std[0] + probe.mean[0]).max() < 0.501 for x, _ in batches)  # all are solarised


def test_init_from(runs, tmp_path, capsys):
    """The classifier goes on from a task0.pt that has one, as in an unbroken run; one without is refused."""
    off, clean = (f"--init_from {runs / mode / 'task0.pt'}" for mode in ("off", "clean"))
    flags = f"{FLAGS} --out_dir {tmp_path}"
    assert run(f"{flags}/a --online_probe clean {clean}") == 0
    assert trees.results(tmp_path / "a") == trees.results(runs / "clean")
    fails(capsys, f"{flags}/b --online_probe clean {off}", "--online_probe", "off/task0.pt")
    assert run(f"{flags}/c --eval none {clean}") == 0 and "left out: classifier" in capsys.readouterr().out


def test_unreadable_images(tmp_path, capsys):
    """Have a label that does not count; and a method without a momentum network has a probe, too."""
    probe, features, labels = OnlineProbe(6, 3, "clean"), torch.randn(4, 6), torch.tensor([0, -1, 2, 1])
    assert same(probe(features, labels), probe(features[labels >= 0], labels[labels >= 0]))
    root = trees.fill(tmp_path / "data", "train test", "a b", count=16)
    trees.spoil(root / "train" / "a" / "7.JPEG")
    flags = f"{tiny('simclr')} --dataset folder --data_dir {root} --num_tasks 1 --epochs 1 --batch_size 8"
    flags += f" --workers 0 --skip_corrupt --eval none --online_probe released --out_dir {tmp_path / 'run'}"
    assert run(flags) == 0 and "7.JPEG" in capsys.readouterr().err
    assert list(trees.results(tmp_path / "run")) == ["online_linear_released"]
