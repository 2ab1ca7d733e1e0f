"""Offline evaluation: no number passes for another, and what each protocol writes."""

import json
import shutil

import pytest
import torch
import trees
from conftest import CPU, TINY, arguments, fails, run, same, settled, tiny

import main_linear
from data.datasets import load_dataset
from models.learner import Learner
from models.resnet import build_backbone
from utils import evaluate, metrics
from utils.run import write_results

FINETUNE = f"{TINY} --num_tasks 2 --regularizer finetune"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two tasks, and images of other classes."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        trees.no_pictures(patch)
        assert run(f"{FINETUNE} --out_dir {place / 'run'}") == 0
    trees.small(place / "cifar", classes=4, count=12)
    return place


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PROBE_EPOCHS", 3)
    return shutil.copytree(finished / "run", tmp_path / "run")


def linear(folder, flags=""):
    """What main_linear.py adds to the results of the run: blocks by part."""
    before = trees.results(folder)
    assert run(f"--run {folder} {flags}", main_linear) == 0
    after = trees.results(folder)
    assert {name: after[name] for name in before} == before
    return {block["settings"]["part"]: block for name, block in after.items() if name not in before}


def test_numbers_stand_beside_each_other(folder, capsys):
    """The protocol of training gives the numbers of training; whatever else is asked for has a name of its
    own."""
    trained = trees.results(folder)
    found = linear(folder, "--protocol knn")
    assert found[""]["matrix"] == trained["matrix"] != found["k20"]["matrix"]
    assert found[""]["forward_transfer"] == trained["forward_transfer"]
    assert "k 200" in found[""]["protocol"] and "k 20 " in found["k20"]["protocol"]
    flags = ["", "--probe_lr 0.5", "--probe_views augmented", "--label_fraction 0.1", "--normalize 0 1"]
    flags += ["--probe_momentum 0.9"]
    matrices = [linear(folder, flag)[""]["matrix"] for flag in flags]
    assert all(a != b for i, a in enumerate(matrices) for b in matrices[:i])
    sweep = linear(folder, "--probe_lr sweep --probe_momentum 0.5")[""]
    alone = linear(folder, f"--probe_lr {sweep['probe_lr'][1]} --probe_momentum 0.5")[""]
    assert sweep["matrix"][1] == alone["matrix"][1]
    assert linear(folder) == {}  # the same command writes the same numbers again
    assert "rows" in linear(folder, "--protocol knn --transfer digits")[""]  # beside the run's own matrix
    assert len(trees.results(folder)) == len(trained) + 2 + 8 + 2
    for flag in (
        "--num_tasks 10",
        "--dataset cifar10",
        "--scenario data",
        "--normalize 1 0",
        "--normalize nan 1",
        "--normalize sweep",
        "--probe_momentum 0.5",
    ):
        fails(capsys, f"--run {folder} --protocol knn {flag}", flag.split()[0], script=main_linear)


def test_transfer(finished, folder, tmp_path, capsys):
    """One number for each network; the same images give the same number whatever they are called, since the
    run's normalisation is used, unless another is asked for."""
    rows = {}
    for name in ("cifar10", "cifar100"):
        for how, words in (("run", "0.3053"), ("dataset", "0.4914"), ("0.5 0.25", "deviation 0.25 0.25")):
            found = linear(
                folder, f"--protocol knn --transfer {name}={finished / 'cifar'} --normalize {how}"
            )[""]
            assert words in found["protocol"] and "forgetting" not in found and "matrix" not in found
            rows[name, how] = found["rows"]
    assert [len(row) for row in rows["cifar10", "run"]] == [1, 1]
    assert all(rows["cifar10", how] == rows["cifar100", how] for how in ("run", "dataset", "0.5 0.25"))
    found = linear(folder, f"--protocol knn --probe_data_dir {finished / 'cifar'} --workers 0")
    assert len(found) == 2 and found[""]["settings"]["dataset"] == f"folder:{finished / 'cifar'}"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "train").symlink_to(finished / "cifar" / "train")
    found = linear(folder, f"--protocol knn --transfer {tmp_path / 'alone'} --val_split 0.25 --workers 0")
    assert found[""]["settings"]["val_split"] == 0.25
    fails(capsys, f"--run {folder} --transfer cifar11", "cifar11", script=main_linear)
    fails(capsys, f"--run {folder} --probe_lr run", "--probe_lr", "number or sweep", script=main_linear)
    shutil.copytree(finished / "cifar", tmp_path / "other")  # two sets of one name are two
    assert len(linear(folder, f"--protocol knn --transfer cifar10={tmp_path / 'other'}")) == 2


def test_labels(folder, capsys):
    """The share of each class, the same for every network and each time, and saved; no class goes without."""
    linear(folder, "--protocol knn --label_fraction 0.1")
    file = folder / "labels.json"
    ((name, drawn),) = json.loads(file.read_text()).items()
    assert name == "dataset=digits labels=0.1 seed=5 val_split=None"
    labels = load_dataset(arguments())[0].labels
    counts = torch.bincount(labels).mul(0.1).round().long()
    assert sorted(set(drawn)) == drawn and torch.equal(torch.bincount(labels[drawn]), counts)
    file.unlink()
    assert linear(folder, "--protocol knn --label_fraction 0.1") == {}
    assert json.loads(file.read_text()) == {name: drawn}
    for flags in ("--label_fraction 0.001", "--label_fraction 0.1 --protocol clustering"):
        fails(capsys, f"--run {folder} {flags}", "--label_fraction", script=main_linear)


def test_task_masked(folder, capsys):
    """Within the task's own classes no less is right; consolidation is read off the task level."""
    found = linear(folder, "--protocol knn --task_masked")
    kinds = ("task_masked", "task_level")
    assert set(found) == {"", "k20", *kinds, *(f"k20 {kind}" for kind in kinds)}
    for own, masked in zip(found[""]["matrix"], found["task_masked"]["matrix"]):
        assert all(a <= b for a, b in zip(own, masked))
    last = found["task_level"]["matrix"][-1]
    assert found["task_level"]["consolidation"] == sum(last) / 2 and found[""]["consolidation"] is None
    network = torch.load(folder / "task1.pt")["backbone"]
    backbone = build_backbone("resnet10", 8, "cifar")
    backbone.load_state_dict(network)
    args, (_, probe, test, tasks) = settled("--num_tasks 2")
    extract = evaluate.features_of(args, CPU, backbone)
    (x, y), (queries, truth) = extract(probe), extract(test)
    own = torch.isin(y, torch.tensor([*map(int, tasks.names[0])]))  # a k-NN that knows the first task alone
    (votes,) = evaluate.knn(x[own], y[own], queries[tasks.test[0]], 10)
    right = (votes.argmax(1) == truth[tasks.test[0]]).double().mean()
    assert found["task_masked"]["matrix"][1][0] == round(100 * float(right), 4)
    assert (
        "k 20 " in found["k20 task_masked"]["protocol"]
        and "task-masked" in found["k20 task_masked"]["protocol"]
    )
    flags = f"--checkpoint {folder / 'task1.pt'} --task_masked --scenario data"
    fails(capsys, flags, "--task_masked", script=main_linear)


def test_clustering(tmp_path, monkeypatch):
    trees.no_pictures(monkeypatch)
    call = f"{tiny('falcon')} --num_tasks 2 --epochs 1 --eval none --regularizer finetune"
    assert run(f"{call} --out_dir {tmp_path / 'run'}") == 0
    (tmp_path / "run" / "results.json").write_text("{}")
    found = linear(tmp_path / "run", "--protocol clustering")
    names = ["nmi", "ari", "accuracy", "codes_nmi", "codes_ari", "codes_accuracy"]
    assert set(found) == {""} and "FALCON's codes" in found[""]["protocol"]
    assert all(len(found[""][name]) == 2 and 0 <= min(found[""][name]) <= 100 for name in names)
    assert len({found[""][name][1] for name in names}) == 6


def test_one_network(finished, folder, tmp_path, capsys):
    """Its own data set and settings come with a taskN.pt; the architecture is read off any file."""
    row = trees.results(folder)["matrix"][1]
    out = f"--protocol knn --out {tmp_path / 'out.json'}"
    assert run(f"--checkpoint {folder / 'task1.pt'} {out}", main_linear) == 0
    torch.save({"state_dict": build_backbone("resnet34", 8, "imagenet").state_dict()}, tmp_path / "theirs.pt")
    assert run(f"--checkpoint {tmp_path / 'theirs.pt'} --dataset digits {out}", main_linear) == 0
    blocks = json.loads((tmp_path / "out.json").read_text())
    assert len(blocks) == 4 and next(iter(blocks.values()))["rows"] == [row]
    theirs, cifar = (
        f"--checkpoint {tmp_path / 'theirs.pt'}",
        f"--dataset cifar10 --data_dir {finished / 'cifar'}",
    )
    fails(capsys, theirs, "--dataset", script=main_linear)
    fails(capsys, f"{theirs} --dataset digits --out {tmp_path / 'no' / 'x'}", "--out", script=main_linear)
    capsys.readouterr()
    assert run(f"--checkpoint {folder / 'task1.pt'} {cifar} --protocol knn", main_linear) == 0
    assert "mean 0.3053" in capsys.readouterr().out  # as the network's own images were normalised
    fails(
        capsys,
        f"--checkpoint {tmp_path / 'theirs.pt'} --dataset digits --width 16",
        "--width",
        script=main_linear,
    )


def test_unfinished_run(folder, capsys):
    """What is there is evaluated, and what is missing is told."""
    (folder / "task1.pt").unlink()
    capsys.readouterr()
    assert [len(row) for row in linear(folder, "--protocol knn")[""]["matrix"]] == [2]
    assert "without task1.pt" in capsys.readouterr().out
    shutil.move(folder / "task0.pt", folder / "task1.pt")
    fails(capsys, f"--run {folder}", "task0.pt", script=main_linear)


def test_plasticity(folder, tmp_path, capsys, monkeypatch):
    """Against networks that each began with the same random weights and saw one task."""
    trees.no_pictures(monkeypatch)
    starts = []

    def begin_task(self, *args):
        starts.append({name: value.clone() for name, value in self.method.state_dict().items()})
        begin(self, *args)

    begin = Learner.begin_task
    monkeypatch.setattr(Learner, "begin_task", begin_task)
    alone = f"{FINETUNE} --single_tasks --out_dir {tmp_path / 'alone'}"
    assert run(alone) == 0 and len(starts) == 2 and same(*starts)
    matrix, reference = (trees.results(path)["matrix"] for path in (folder, tmp_path / "alone"))
    expected = metrics.plasticity(matrix, [reference[k][k] for k in (0, 1)])
    assert expected is not None and trees.results(folder)["plasticity"] is None
    fails(
        capsys,
        f"--run {folder} --protocol knn --reference {tmp_path / 'alone'}",
        "--reference",
        script=main_linear,
    )
    linear(tmp_path / "alone", "--protocol knn")
    found = linear(folder, f"--protocol knn --reference {tmp_path / 'alone'}")
    assert found[""]["plasticity"] == pytest.approx(expected)
    out = f"--protocol knn --reference {tmp_path / 'alone'} --out {tmp_path / 'out.json'}"
    assert run(f"--run {folder} {out}", main_linear) == 0
    blocks = json.loads((tmp_path / "out.json").read_text())
    assert next(iter(blocks.values()))["plasticity"] == pytest.approx(expected)
    assert all(f"network={folder} reference=" in name for name in blocks)
    assert run(f"{FINETUNE} --reference {tmp_path / 'alone'} --out_dir {tmp_path / 'again'}") == 0
    assert trees.results(tmp_path / "again")["plasticity"] == pytest.approx(expected)
    fails(capsys, f"{FINETUNE} --reference {folder} --out_dir {tmp_path / 'x'}", "--reference")
    for changed in ("--seed 6", "--epochs 1"):
        flags = f"{FINETUNE} {changed} --reference {tmp_path / 'alone'} --out_dir {tmp_path / 'x'}"
        fails(capsys, flags, changed.split()[0])
    fails(capsys, f"{TINY} --single_tasks --out_dir {tmp_path / 'x'}", "--single_tasks")


def test_a_network_that_diverged(folder, capsys):
    """Is named before the others are evaluated; it cannot be evaluated, nor exported."""
    network = torch.load(folder / "task1.pt")
    network["backbone"]["conv1.weight"][0] = torch.nan
    torch.save(network, folder / "task1.pt")
    fails(capsys, f"--run {folder} --protocol knn", "task1.pt", "not finite", script=main_linear)


def write_ten(path, first):
    for number in range(first, first + 10):
        write_results(path, {str(number): number})


def test_two_evaluations_at_once(tmp_path):
    """Of one run: the numbers of both are kept."""
    path, context = tmp_path / "results.json", torch.multiprocessing.get_context("fork")
    writers = [context.Process(target=write_ten, args=(path, first)) for first in (0, 10, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(json.loads(path.read_text()).values()) == list(range(30))
