"""Every data set in its real layout, in every scenario, from files to results."""

import json
import pickle
import shutil

import numpy as np
import pytest
import scipy.io
import torch
import trees
from conftest import CPU, TINY, arguments, crash, fails, outcome, run, same
from PIL import Image

import main_linear
from data import DATASETS, check
from data.datasets import DOMAINS, load_dataset
from models.resnet import build_backbone
from utils import evaluate

# folder, --dataset, scenarios ("joint": one task), flags for epochs of three steps or more
SETS = """
digits       digits       class,data         --batch_size 200 --moco_queue_size 200
textured     textured_digits  data           --batch_size 200 --moco_queue_size 200
cifar10      cifar10      class,data         --batch_size 6
cifar100     cifar100     class,data         --batch_size 16
svhn         svhn         class,data         --batch_size 6
stl10        stl10        data               --batch_size 6
imagenet100  imagenet100  class,data         --batch_size 32
imagenet     imagenet     class,data         --batch_size 128 --moco_queue_size 128
domainnet    domainnet    domain,data        --batch_size 4 --num_tasks 3 --domain_order clipart real sketch
one_domain   domainnet    class              --batch_size 38 --num_tasks 3 --domain_order real
folder       folder       domain,joint,data  --batch_size 2 --num_tasks 3
plain        folder       class,data         --batch_size 2
unlabelled   folder       joint,data         --batch_size 2
"""
SETS = {name: parts for name, *parts in (line.split(maxsplit=3) for line in SETS.strip().splitlines())}
CASES = [(name, scenario) for name, (_, scenarios, _) in SETS.items() for scenario in scenarios.split(",")]
TEN = [f"class{i}" for i in range(10)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of all made-up data sets; CIFAR-10 is in torchvision's files, CIFAR-100 in class folders."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 2), ("val", 1)):
        trees.fill(root / "imagenet100", split, f"{trees.IMAGENET100} n99999998 n99999999", count=count)
    trees.fill(root / "imagenet", "train val", " ".join(f"n{i:08d}" for i in range(1000)), count=1)
    trees.domainnet(root / "domainnet")
    trees.domainnet(root / "one_domain", classes=345, train=1, test=1, domains=DOMAINS[:1])
    trees.fill(root / "folder", "train test", "x y z", "ant bee", count=4)
    trees.fill(root / "plain", "train val", "ant bee", count=8)
    trees.fill(root / "unlabelled", ". more/deeper", count=8)
    trees.small(root / "cifar100", classes=100, count=1)
    for place in ("cifar10/cifar-10-batches-py", "svhn", "stl10/stl10_binary"):
        (root / place).mkdir(parents=True)
    parts = [{"data": trees.numbers(10, 3072, seed=i), "labels": list(range(10))} for i in range(6)]
    cifar = {f"data_batch_{i}": parts[i] for i in range(1, 6)} | {"test_batch": parts[0]}
    for name, content in (cifar | {"batches.meta": {"label_names": TEN}}).items():
        (root / "cifar10" / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    (root / "stl10" / "stl10_binary" / "class_names.txt").write_text("\n".join(TEN))
    for split, count in (("train", 40), ("test", 20), ("unlabeled", 40)):
        labels = np.arange(count, dtype=np.uint8)[:, None] % 10 + 1  # 1 to 10; SVHN's 10 is the digit 0
        svhn = {"X": trees.numbers(32, 32, 3, count), "y": labels}
        scipy.io.savemat(root / "svhn" / f"{split}_32x32.mat", svhn)
        trees.numbers(count, 3, 96, 96).tofile(root / "stl10" / "stl10_binary" / f"{split}_X.bin")
        labels.tofile(root / "stl10" / "stl10_binary" / f"{split}_y.bin")
    return root


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    """torchvision compares the real files with known checksums, which these do not have."""
    for name in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.check_integrity", lambda *_: True)
    trees.no_pictures(monkeypatch)


def flags(data, name, extra=""):
    dataset, _, steps = SETS[name]
    base = f"{TINY} --dataset {dataset} --data_dir {data / name} --epochs 1 --log_every 1 --num_tasks 2"
    return f"{base} --workers 0 {steps} {extra}"


def load(data, name, extra=""):
    return load_dataset(arguments(f"--dataset {SETS[name][0]} --data_dir {data / name} {extra}"))


@pytest.mark.parametrize("name, scenario", CASES)
def test_from_files_to_results(data, name, scenario, tmp_path, monkeypatch, capsys):
    """Without worker processes, and with two and a crash in the middle of an epoch: the same bits."""
    extra = "--num_tasks 1" if scenario == "joint" else f"--scenario {scenario}"
    assert run(flags(data, name, f"{extra} --out_dir {tmp_path / 'a'}")) == 0
    a, tasks = outcome(tmp_path / "a"), len(list(tmp_path.glob("a/task*.pt")))
    if name == "unlabelled":
        assert "--probe_data_dir" in capsys.readouterr().out and "results.json" not in a
    else:
        assert [len(row) for row in json.loads(a.pop("results.json"))["matrix"]] == [tasks] * tasks
    call = flags(data, name, f"{extra} --workers 2 --save_every 2 --eval none --out_dir {tmp_path / 'b'}")
    crash(monkeypatch, call, lambda run: run.step)
    assert run(call) == 0
    trained = [line for line in a["metrics.jsonl"].splitlines(True) if b'"kind": "eval"' not in line]
    assert same(outcome(tmp_path / "b"), a | {"metrics.jsonl": b"".join(trained)})


def test_contents(data):
    """Images, labels, classes and domains are those of the files."""
    assert {dataset for dataset, *_ in SETS.values()} == set(DATASETS)
    (plain, *_), (train, _, test) = load(data, "digits"), load(data, "textured")
    assert torch.equal(train.labels, plain.labels) and not torch.equal(train.images[:9], test.images[:9])
    similar = (train.images.float().mean((2, 3)) - plain.images.float().mean((2, 3))).abs()
    assert train.images.shape[1:] == (3, 16, 16) and 10 < similar.mean() < 100  # neither black nor the same
    assert torch.equal(train.images, load(data, "textured")[0].images)
    train, _, test = load(data, "cifar10")
    assert train.labels.tolist() == 5 * list(range(10)) and train.classes == test.classes == TEN
    assert np.array_equal(train.images[13], trees.numbers(10, 3072, seed=2)[3].reshape(3, 32, 32))
    train, _, test = load(data, "cifar100")
    assert train.labels.tolist() == test.labels.tolist() == list(range(100))
    assert np.array_equal(test.images[7].permute(1, 2, 0), trees.numbers(8, 8, 3, seed=107))
    train, _, test = load(data, "svhn")
    assert train.labels.tolist() == 4 * [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(test.images[7].permute(1, 2, 0), trees.numbers(32, 32, 3, 20)[..., 7])
    train, probe, test = load(data, "stl10")
    assert (train.labels == -1).all() and train.images.shape == (40, 3, 96, 96) and probe.classes == TEN
    assert probe.labels.tolist() == 4 * list(range(10)) and test.labels.tolist() == 2 * list(range(10))
    assert np.array_equal(test.images[7].mT, trees.numbers(20, 3, 96, 96)[7])  # files are by column
    train, probe, test = load(data, "imagenet100")
    assert probe is train and train.classes == sorted(trees.IMAGENET100.split())
    assert [train.images.path(i).parent.name for i in range(200)] == [train.classes[i] for i in train.labels]
    assert test.labels.tolist() == list(range(100)) and len(load(data, "unlabelled")[0].labels) == 16
    for name, order, count in (("domainnet", DOMAINS, 120), ("folder", ("z", "x"), 32)):
        train, _, test = load(data, name, f"--domain_order {' '.join(order)}")
        assert len(train.labels) + len(test.labels) == count and train.domain_names == order
        for images in (train, test):
            for i, (label, domain) in enumerate(zip(images.labels, images.domains)):
                assert images.images.path(i).parts[-3:-1] == (order[domain], images.classes[label])


def test_labels_from_elsewhere(data, tmp_path, capsys):
    """--probe_data_dir, in the run and in main_linear.py; images without labels in a folder for each task."""
    shutil.copytree(data / "plain" / "train", tmp_path / "plain" / "train")
    call = flags(tmp_path, "plain", "--scenario domain --domain_order bee ant --out_dir")
    train, probe, test = load(tmp_path, "plain", "--scenario domain")
    assert train.domain_names == ("ant", "bee") and (train.labels == -1).all() and probe is test is None
    assert run(f"{call} {tmp_path / 'run'} --probe_data_dir {data / 'plain'}") == 0
    matrix = trees.results(tmp_path / "run")["matrix"]
    assert [len(set(row)) for row in matrix] == [1, 1] and len(matrix[0]) == 2  # each time all of test/
    for flag in ("--domain_order ant bee", "--cache_size 20"):
        fails(capsys, f"--run {tmp_path / 'run'} {flag}", flag.split()[0], script=main_linear)
    assert run(f"--run {tmp_path / 'run'} --protocol knn", main_linear) == 0
    found = trees.results(tmp_path / "run")
    assert [block["matrix"] for name, block in found.items() if name.endswith("labels=1.0")] == [matrix]
    other = f"--checkpoint {tmp_path / 'run' / 'task1.pt'} --dataset digits --protocol knn"  # has other tasks
    assert run(other, main_linear) == 0
    wrong = f"--probe_data_dir {data / 'unlabelled'}"
    fails(capsys, f"{call} {tmp_path / 'x'} {wrong}", wrong)
    assert run(f"{call} {tmp_path / 'without'}") == 0
    fails(capsys, f"--run {tmp_path / 'without'}", "--probe_data_dir", script=main_linear)


def test_val_split(data, tmp_path, capsys):
    """Without test/ a share of each class, the same each time, is for testing and not trained on."""
    shutil.copytree(data / "plain" / "train", tmp_path / "train")
    call = f"--dataset folder --data_dir {tmp_path} --val_split"
    train, _, test = load_dataset(arguments(f"{call} 0.25"))
    names = [set(images.images.names.tolist()) for images in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(train.labels) + len(test.labels)
    counts = [torch.bincount(images.labels) for images in (train, test)]
    assert torch.equal(counts[1], ((counts[0] + counts[1]) * 0.25).round().long())
    again = load_dataset(arguments(f"{call} 0.25"))[2].images.names
    assert same(again.tolist(), test.images.names.tolist())
    for share, where in (("0.01", tmp_path), ("0.2", data / "plain"), ("0.2", data / "unlabelled")):
        fails(capsys, f"{TINY} --dataset folder --data_dir {where} --val_split {share}", "--val_split")
    folder = tmp_path / "run"  # trained on all images, tested afterwards on a share of them
    assert run(flags(tmp_path.parent, "plain", f"--data_dir {tmp_path} --out_dir {folder}")) == 0
    fails(capsys, f"--run {folder}", "--val_split", script=main_linear)
    assert run(f"--run {folder} --protocol knn --val_split 0.25", main_linear) == 0
    (name, block) = next(iter(trees.results(folder).items()))
    assert "val_split=0.25" in name and len(block["matrix"]) == 2


def test_sequence(tmp_path, capsys):
    """Different sets in a row, of other sizes and of grey images: each evaluated on its own classes, by its
    own neighbours; a run of two grows by a third."""
    trees.small(tmp_path / "tall", classes=3, count=40)
    trees.small(tmp_path / "grey", classes=2, count=40)
    for folder, mode, size in (("tall", "RGB", (9, 13)), ("grey", "L", (16, 16))):
        for path in (tmp_path / folder).rglob("*.png"):
            Image.open(path).convert(mode).resize(size).save(path)
    sets = f"digits folder:{tmp_path / 'tall'} folder:{tmp_path / 'grey'}"
    call = f"{TINY} --epochs 1 --image_size 8 --num_tasks"
    two, three = tmp_path / "two", tmp_path / "three"
    assert run(f"{call} 2 --out_dir {two} --sequence {sets.rpartition(' ')[0]}") == 0
    assert run(f"{call} 3 --out_dir {three} --init_from {two} --sequence {sets}") == 0
    a, b = (trees.results(folder)["matrix"] for folder in (two, three))
    assert [row[:2] for row in b[:2]] == a and len(b) == 3 and len(b[0]) == 3
    assert "for each data set" in trees.results(three)["protocol"]
    train, _, test = load_dataset(arguments(f"--image_size 8 --sequence {sets}"))
    assert train.domain_names == ("digits", "tall", "grey") and len(train.classes) == 15
    assert train.images.shape[2:] == (8, 8) and train.mean == load_dataset(arguments())[0].mean
    backbone = build_backbone("resnet10", 8, "cifar")
    backbone.load_state_dict(torch.load(three / "task2.pt")["backbone"])
    extract = evaluate.features_of(arguments("--image_size 8 --precision fp32"), CPU, backbone)
    for domain, accuracy in enumerate(b[2]):
        (x, y), (queries, truth) = (
            extract(images.subset((images.domains == domain).nonzero()[:, 0])) for images in (train, test)
        )
        (votes,) = evaluate.knn(x, y, queries, 15)
        assert accuracy == round(100 * float((votes.argmax(1) == truth).double().mean()), 4)
    assert check.main(check.parse_arguments(f"--sequence {sets} --batch_size 8".split())) == 0
    assert run(f"--run {three} --transfer digits", main_linear) == 0
    (tmp_path / "moved").mkdir()
    (tmp_path / "tall").rename(tmp_path / "moved" / "tall")  # a set may move, but stays what it is
    moved = sets.replace(str(tmp_path / "tall"), str(tmp_path / "moved" / "tall"))
    assert run(f"{call} 3 --out_dir {three} --init_from {two} --sequence {moved}") == 0
    assert run(f"--run {three} --sequence {moved}", main_linear) == 0
    fails(capsys, f"--run {three} --sequence digits {moved}", "--sequence", script=main_linear)
    sets = moved
    joint = tmp_path / "joint"  # learns from all, and is tested on each by its own classifier
    assert run(f"{call} 1 --out_dir {joint} --sequence {sets}") == 0
    protocols = {trees.results(folder)["protocol"] for folder in (three, joint)}
    (row,) = trees.results(joint)["matrix"]
    assert len(row) == 3 and len(protocols) == 1
    assert trees.results(joint)["average_accuracy"] == pytest.approx(sum(row) / 3)
    assert run(f"--run {joint}", main_linear) == 0
    wrong_sets = {"digits": "--sequence", "nosuch:x": "nosuch:x", f"folder:{two}": str(two)}
    wrong_sets |= {"cifar10 --scenario data": "--scenario", "cifar10 --cache c": "--cache"}
    for wrong, told in wrong_sets.items():
        fails(capsys, f"{call} 2 --out_dir {tmp_path / 'x'} --sequence digits {wrong}", told)
    fails(
        capsys,
        f"{call} 3 --out_dir {tmp_path / 'x'} --init_from {two} --sequence {sets} --width 16",
        "--width",
    )
