"""The online probe: what it computes, what it leaves alone, which images it sees, and that it goes on where
it was."""

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
    for mode in ("off", "clean", "released"):
        assert run(f"{FLAGS} --online_probe {mode} --out_dir {root / mode}") == 0
    return root


def test_what_it_leaves_alone(runs):
    """clean: losses, weights, running statistics, queues and the numbers of --eval are those of a run without
    a probe, bit for bit. released: all but the running statistics of the backbone and of its momentum twin,
    in the first batch."""
    clean = [row for row in lines(runs / "clean") if "online" not in row["kind"]]
    assert lines(runs / "off") == [{k: v for k, v in row.items() if "online" not in k} for row in clean]
    off, clean, released = (outcome(runs / mode) for mode in ("off", "clean", "released"))
    assert all(
        same(clean[task][part], off[task][part]) for task in ("task0.pt", "task1.pt") for part in off[task]
    )
    for task in ("task0.pt", "task1.pt"):
        for part, prefix in (("backbone", ""), ("heads", "momentum_encoder.backbone.")):
            changed = {k for k, v in off[task][part].items() if not torch.equal(released[task][part][k], v)}
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            assert changed == {k for k in off[task][part] if k.startswith(prefix) and k.endswith(statistics)}


@pytest.mark.parametrize("mode", ["clean", "released"])
def test_results_and_resume(runs, mode, tmp_path, monkeypatch):
    """A matrix of its own beside that of --eval, and a loss for each step, of which a crash loses nothing."""
    results = json.loads((runs / mode / "results.json").read_text())
    block = results[f"online_linear_{mode}"]
    assert mode in block["protocol"] and block["protocol"] != results["protocol"]
    assert [len(row) for row in block["matrix"]] == [2, 2] and block["matrix"] != results["matrix"]
    assert (runs / mode / f"accuracy_matrix_online_linear_{mode}.png").exists()
    assert sum("online_loss" in row for row in lines(runs / mode) if row["kind"] == "train") == 8
    flags = f"{FLAGS} --online_probe {mode} --save_every 2 --out_dir {tmp_path}"
    crash(monkeypatch, flags, lambda run: run.task == 1 and run.step)
    assert run(flags) == 0 and same(outcome(tmp_path), outcome(runs / mode))


@pytest.mark.parametrize("mode", ["clean", "released"])
def test_equation(mode):
    """Softmax regression on detached features, with a rate of its own and no weight decay; features and
    running statistics are as if each batch had passed through the networks alone."""
    args, (_, probe, *_) = settled(f"--regularizer finetune --batch_size 12 --online_probe {mode}")
    learner = main_cssl.build_learner(args, CPU, probe)
    learner.begin_task(0, CPU.device)
    group, linear = main_cssl.build_optimizer(args, learner).param_groups[1], learner.online.classifier
    assert list(map(id, group["params"])) == list(map(id, linear.parameters()))
    assert (group["lr"], group["weight_decay"], group["lars_weight_decay"]) == (args.online_lr, 0, 0)
    (view1, view2, images), y = torch.randn(3, 12, 3, 8, 8), torch.randint(0, 10, (12,))
    alone = copy.deepcopy(learner.method)
    for network in (alone.backbone, alone.momentum_encoder["backbone"]):
        network(view1), network(view2)
    if mode == "released":
        alone.momentum_encoder["backbone"](images)
    h = alone.backbone.train(mode == "released")(images).detach()
    loss, terms, *_ = learner(view1, view2, (images, y))
    expected = F.cross_entropy(linear(h), y)
    torch.testing.assert_close([terms["online_loss"], loss], [expected, terms["ssl"] + expected])
    torch.testing.assert_close(terms["online_accuracy"], 100 * (linear(h).argmax(1) == y).float().mean())
    assert all(torch.equal(a, b) for a, b in zip(learner.method.buffers(), alone.buffers()))


def test_images():
    """Of all tasks, with their labels, in view 2's augmentation; another order each epoch, and again from the
    start where they are fewer than a task's steps need."""
    args, (train, probe, _, tasks) = settled("--online_probe clean --solarize_p 0 1 --min_scale 1")
    loader, labelled = main_cssl.build_loaders(args, CPU, train, probe, tasks, 0)
    same_order = probe, torch.arange(1438), 32, [ViewConfig(8)], args.seed, LABELLED
    orders = [torch.cat(list(Loader(*same_order, steps=loader.steps).batches(epoch))) for epoch in (0, 1)]
    assert not torch.equal(*orders) and len(orders[0].unique()) == 32 * loader.steps
    for epoch, order in enumerate(orders):
        batches = list(labelled(epoch, 0))
        assert torch.equal(torch.cat([y for _, y in batches]), probe.labels[order])
        assert all(len(y.unique()) > 5 for _, y in batches)
        assert torch.equal(next(labelled(epoch, 3))[0], batches[3][0])
    image = probe.images[orders[1][0]].float() / 255
    solarized = torch.where(image >= 0.5, 1 - image, image)  # which digits' black background is not
    assert (batches[0][0][0] - (solarized - probe.mean[0]) / probe.std[0]).abs().median() < 0.5
    first, second, *again = Loader(probe, torch.arange(70), 32, [ViewConfig(8)], 5, 0, steps=4).batches(0)
    assert torch.equal(again[0], first) and torch.equal(again[1], second) and not torch.equal(first, second)


def test_init_from(runs, tmp_path, capsys):
    """The classifier goes on from a task0.pt that has one, as in an unbroken run; one without is refused."""
    flags, clean, without = f"{FLAGS} --init_from", runs / "clean", runs / "off" / "task0.pt"
    assert run(f"{flags} {clean / 'task0.pt'} --online_probe clean --out_dir {tmp_path / 'a'}") == 0
    assert (tmp_path / "a" / "results.json").read_bytes() == (clean / "results.json").read_bytes()
    fails(
        capsys,
        f"{flags} {without} --online_probe clean --out_dir {tmp_path / 'b'}",
        "--online_probe",
        str(without),
    )
    assert run(f"{flags} {clean / 'task0.pt'} --eval none --out_dir {tmp_path / 'c'}") == 0
    assert "left out: classifier" in capsys.readouterr().out


def test_unreadable_images(tmp_path, capsys):
    """Have a label that does not count; and a method without a momentum network has a probe, too."""
    probe, features, labels = OnlineProbe(6, 3, "clean"), torch.randn(4, 6), torch.tensor([0, -1, 2, 1])
    assert same(probe(features, labels), probe(features[labels >= 0], labels[labels >= 0]))
    root = trees.fill(tmp_path / "data", "train test", "a b", count=16)
    trees.spoil(root / "train" / "a" / "7.JPEG")
    flags = f"{tiny('simclr')} --dataset folder --data_dir {root} --num_tasks 1 --epochs 1 --batch_size 8"
    flags += f" --workers 0 --skip_corrupt --eval none --online_probe released --out_dir {tmp_path / 'run'}"
    assert run(flags) == 0 and "7.JPEG" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())) == ["online_linear_released"]
