"""The online probe: its equation, what it leaves alone, which images it sees, and that it goes on where it
was."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trees
from conftest import TINY, arguments, run, same, tiny

import main_cssl
from utils.distributed import Process
from utils.optim import warmup_cosine
from utils.run import Run

CPU = Process(torch.device("cpu"))
FLAGS = f"{TINY} --num_tasks 2 --epochs 1 --log_every 1"


def networks(folder):
    return [torch.load(folder / f"task{task}.pt") for task in (0, 1)]


def lines(folder):
    """Of metrics.jsonl, without what the probe adds; and what it adds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    network = [
        {k: v for k, v in row.items() if "online" not in k} for row in rows if "online" not in row["kind"]
    ]
    return network, [row["online_loss"] for row in rows if row["kind"] == "train" and "online_loss" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("online")
    torch.set_num_threads(1)
    for mode in ("off", "clean", "released"):
        assert run(f"{FLAGS} --online_probe {mode} --out_dir {root / mode}") == 0
    return root


def test_clean_changes_nothing(runs):
    """Losses, weights, running statistics, queues and the numbers of --eval are those of a run without a
    probe, bit for bit."""
    assert lines(runs / "clean")[0] == lines(runs / "off")[0] and lines(runs / "off")[1] == []
    for with_probe, without in zip(networks(runs / "clean"), networks(runs / "off")):
        assert same(with_probe["backbone"], without["backbone"]) and same(
            with_probe["heads"], without["heads"]
        )
        assert "online" not in without


def test_released_changes_running_statistics_alone(runs):
    """Those of the backbone and of the momentum network's; no gradient reaches a weight."""
    for with_probe, without in zip(networks(runs / "released"), networks(runs / "off")):
        for part, prefix in (("backbone", ""), ("heads", "momentum_encoder.backbone.")):
            changed = {k for k, v in without[part].items() if not torch.equal(with_probe[part][k], v)}
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            assert changed == {k for k in without[part] if k.startswith(prefix) and k.endswith(statistics)}


@pytest.mark.parametrize("mode", ["clean", "released"])
def test_results(runs, mode):
    """A matrix of its own, under its full name, beside that of --eval; each step logs its loss."""
    results = json.loads((runs / mode / "results.json").read_text())
    block = results[f"online_linear_{mode}"]
    assert "k-NN" in results["protocol"] and block["protocol"].startswith(f"online linear probe ({mode}): ")
    assert [len(row) for row in block["matrix"]] == [2, 2] and block["matrix"] != results["matrix"]
    assert (runs / mode / f"accuracy_matrix_online_linear_{mode}.png").exists()
    assert len(lines(runs / mode)[1]) == 44


@pytest.mark.parametrize("mode", ["clean", "released"])
def test_equation(mode):
    """In float64: softmax regression on detached features, SGD with momentum under LARS, its own unscaled
    rate, no weight decay; features and running statistics as if each batch had passed through the backbone
    alone."""
    torch.set_default_dtype(torch.float64)
    try:
        args = arguments(
            f"--regularizer finetune --precision fp32 --batch_size 12 --epochs 60 --online_probe {mode}"
        )
        args.stem = "cifar"
        learner = main_cssl.build_learner(args, CPU, SimpleNamespace(classes=range(5)))
        learner.begin_task(0, CPU.device)
        optimizer = main_cssl.build_optimizer(args, learner)
        views, labels = torch.randn(3, 3, 12, 3, 8, 8), torch.randint(0, 5, (3, 12))
        weight, bias = (p.detach().clone() for p in learner.online.parameters())
        momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for step, ((view1, view2, images), y) in enumerate(zip(views, labels)):
            reference = main_cssl.copy.deepcopy(learner.method)
            reference.backbone(view1), reference.backbone(view2)
            reference.momentum_encoder["backbone"](view1), reference.momentum_encoder["backbone"](view2)
            if mode == "released":
                reference.momentum_encoder["backbone"](images)
            h = reference.backbone.train(mode == "released")(images).detach()

            main_cssl.set_lr(optimizer, args, epoch=step, step=0, steps=4)
            loss, terms, student, teacher = learner(view1, view2, (images, y))
            assert (student.z[0].requires_grad, learner.method.backbone.training) == (True, True)
            probabilities = (h @ weight.T + bias).softmax(dim=1)
            torch.testing.assert_close(terms["online_loss"], -probabilities[range(12), y].log().mean())
            torch.testing.assert_close(
                terms["online_accuracy"], 100 * (probabilities.argmax(1) == y).double().mean()
            )
            torch.testing.assert_close(loss, terms["loss"] + terms["online_loss"])
            assert terms["loss"].equal(terms["ssl"])
            for got, want in zip(learner.method.buffers(), reference.buffers()):
                assert torch.equal(got, want)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            learner.after_step(student, teacher, step / 3)

            lr = warmup_cosine(step, 0.3, 60)
            error = (probabilities - F.one_hot(y, 5)) / 12
            for p, gradient, momentum in zip((weight, bias), (error.T @ h, error.sum(0)), momenta):
                local = min(
                    0.02 * p.norm() / (gradient.norm() + 1e-8) / lr, 1
                )  # MoCo's biases are under LARS, too
                p -= lr * momentum.mul_(0.9).add_(local * gradient)
            for got, want in zip(learner.online.parameters(), (weight, bias)):
                torch.testing.assert_close(got.detach(), want, rtol=1e-10, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_images():
    """Of all tasks, with their labels, in view 2's augmentation; another order each epoch, and again from the
    start where they are fewer than a task's steps need."""
    args = arguments("--online_probe clean --num_tasks 5 --solarize_p 0 1 --min_scale 1")
    _, probe, _, tasks = data = main_cssl.build_data(args, CPU)
    loaders = main_cssl.build_loaders(args, CPU, data[0], tasks)
    labelled = main_cssl.build_labelled_loaders(args, CPU, probe, loaders)
    assert [loader.steps for loader in labelled] == [loader.steps for loader in loaders]
    batches = [list(labelled[task].labelled(probe.labels, epoch)) for task, epoch in ((0, 0), (0, 1), (1, 0))]
    orders = [torch.cat(list(labelled[task].batches(epoch))) for task, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order.tolist()) for order in orders}) == 3
    for order, parts in zip(orders, batches):
        assert torch.equal(torch.cat([y for _, y in parts]), probe.labels[order]) and len(
            order.unique()
        ) == len(order)
        assert all(len(y.unique()) > 5 for _, y in parts)
    assert all(
        torch.equal(a, b) for a, b in zip(batches[0][3], next(labelled[0].labelled(probe.labels, 0, 3)))
    )
    image = probe.images[orders[0][:1]].float() / 255
    solarized = torch.where(image >= 0.5, 1 - image, image)  # which digits' black background is not
    assert (batches[0][0][0][0] - (solarized - probe.mean[0]) / probe.std[0]).abs().median() < 0.5
    few = type(labelled[0])(
        probe.images, torch.arange(70), 32, labelled[0].views, probe.mean, probe.std, 5, 0, steps=5
    )
    order = torch.stack(list(few.batches(0)))
    assert (
        torch.equal(order[0], order[2])
        and torch.equal(order[1], order[3])
        and not torch.equal(order[0], order[1])
    )


class Crash(Exception):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("mode", ["clean", "released"])
def test_resume(runs, mode, tmp_path, monkeypatch):
    def save_and_crash(self, **parts):
        save(self, **parts)
        if self.task == 1 and self.step > 5:
            raise Crash

    save = Run.save
    flags = f"{FLAGS} --online_probe {mode} --save_every 2 --out_dir {tmp_path}"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Run, "save", save_and_crash)
        run(flags)
    gc.collect()  # the crashed run's lock
    assert run(flags) == 0
    for name in ("metrics.jsonl", "results.json"):
        assert (tmp_path / name).read_text() == (runs / mode / name).read_text()
    for resumed, undisturbed in zip(networks(tmp_path), networks(runs / mode)):
        assert all(same(resumed[part], undisturbed[part]) for part in ("backbone", "heads", "online"))


def test_init_from(runs, tmp_path, capsys):
    """The classifier goes on from a task0.pt that has one, as in an unbroken run; one without is refused."""
    flags = f"{FLAGS} --online_probe clean --init_from"
    assert run(f"{flags} {runs / 'clean' / 'task0.pt'} --out_dir {tmp_path / 'a'}") == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == json.loads(
        (runs / "clean" / "results.json").read_text()
    )
    capsys.readouterr()
    assert run(f"{flags} {runs / 'off' / 'task0.pt'} --out_dir {tmp_path / 'b'}") == 2
    error = capsys.readouterr().err
    assert (
        "--online_probe" in error
        and "task0.pt" in error
        and len(error.splitlines()) == 1
        and not (tmp_path / "b").exists()
    )
    assert run(f"{FLAGS} --init_from {runs / 'clean' / 'task0.pt'} --out_dir {tmp_path / 'c'}") == 0
    assert "left out: classifier" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--eval knn", "--eval none"])
def test_unreadable_images(flags, tmp_path, capsys):
    """The image that takes an unreadable one's place is not learned under its label."""
    data = trees.fill(
        tmp_path / "data", [f"{split}/{name}" for split in ("train", "test") for name in "ab"], 16
    )
    broken = data / "train" / "a" / "7.JPEG"
    broken.unlink()
    broken.write_text("no image")
    flags += f" --dataset folder --data_dir {data} --scenario data --num_tasks 1 --skip_corrupt"
    flags += " --batch_size 8 --workers 0"
    assert run(f"{TINY} {flags} --online_probe clean --log_every 1 --out_dir {tmp_path / 'run'}") == 0
    assert "1 training images could not be read" in capsys.readouterr().out

    args = arguments(f"{flags} --online_probe clean")
    train, probe, _, tasks = main_cssl.build_data(args, CPU)
    loaders = main_cssl.build_loaders(args, CPU, train, tasks)
    (labelled,) = main_cssl.build_labelled_loaders(args, CPU, probe, loaders)
    order = torch.cat(list(labelled.batches(0)))
    labels = torch.cat([y for _, y in labelled.labelled(probe.labels, 0)])
    unreadable = [i for i in range(32) if probe.images.path(i) == broken]
    assert labels[order == unreadable[0]].tolist() == [-1] and (labels == -1).sum() == 1
    known = labels >= 0
    assert torch.equal(labels[known], probe.labels[order][known])


def test_without_a_momentum_network(tmp_path, capsys):
    flags = (
        f"{tiny('simclr')} --num_tasks 2 --epochs 1 --eval none --online_probe released --out_dir {tmp_path}"
    )
    assert run(flags) == 0
    assert "simclr has no momentum encoder" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert (
        list(results) == ["online_linear_released"] and len(results["online_linear_released"]["matrix"]) == 2
    )
