"""Every data set in its real layout, in every scenario, from files to results; what streams is exact; caches;
data.check."""

import fcntl
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import trees
from conftest import ENVIRONMENT, arguments, run
from PIL import Image, ImageOps
from test_bad_input import fails

from data import DataError, check
from data import stream as streams
from data.augment import ViewConfig
from data.cache import open_cache
from data.datasets import DATASETS, DOMAINS, load_dataset
from data.files import Files, decode
from data.stream import Crops, Stream, StreamLoader, evaluation_stream
from utils import checkpoint
from utils.run import Run

FLAGS = "--backbone resnet10 --width 4 --image_size 8 --epochs 1 --log_every 1 --eval knn --device cpu"
FLAGS += " --num_tasks 2 --moco_queue_size 64 --moco_hidden 32 --moco_dim 16"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folders of all made-up data sets."""
    root = tmp_path_factory.mktemp("data")
    wanted = (trees.ROOT / "data" / "imagenet100_classes.txt").read_text().split()
    trees.imagenet(root / "imagenet100", [*wanted, "n99999998", "n99999999"], train=2)
    trees.imagenet(root / "imagenet", trees.wordnet_ids(1000), train=1)
    trees.domainnet(root / "domainnet")
    trees.domainnet(root / "one_domain", classes=345, train=1, test=1, domains=DOMAINS[:1])
    trees.fill(
        root / "folder",
        [
            f"{split}/{task}/{name}"
            for split in ("train", "test")
            for task in "xyz"
            for name in ("ant", "bee")
        ],
        4,
    )
    trees.fill(
        root / "plain",
        [f"train/{name}" for name in ("ant", "bee")] + [f"val/{name}" for name in ("ant", "bee")],
        8,
    )
    trees.fill(root / "unlabelled", ["", "more/deeper"], 8)
    rng = np.random.default_rng(0)
    for name in ("cifar10", "cifar100"):
        for split in ("train", "test"):
            for label in range(int(name[5:])):
                place = root / name / split / f"{label:03d}"
                place.mkdir(parents=True)
                for i in range(4 if name == "cifar10" else 1):
                    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (root / "svhn").mkdir()
    for split in ("train", "test"):  # labels 1 to 10, of which 10 is the digit 0
        pixels, labels = (
            rng.integers(0, 256, (32, 32, 3, 40), dtype=np.uint8),
            np.arange(40, dtype=np.uint8)[:, None] % 10 + 1,
        )
        scipy.io.savemat(root / "svhn" / f"{split}_32x32.mat", {"X": pixels, "y": labels})
    place = root / "stl10" / "stl10_binary"
    place.mkdir(parents=True)
    (place / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    for split, count in (("train", 20), ("test", 20), ("unlabeled", 40)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(place / f"{split}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(place / f"{split}_y.bin")
    return root


@pytest.fixture(autouse=True)
def _no_checksums(monkeypatch):
    """torchvision compares the real files with known checksums; here are made-up ones."""
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5=None: True)
    monkeypatch.setattr("torchvision.datasets.STL10._check_integrity", lambda self: True)


# name of the folder: --dataset, flags that make epochs of three steps or more, scenarios (class1: joint)
SETS = {
    "digits": ("digits", "--batch_size 200 --moco_queue_size 200", "class data"),
    "cifar10": ("cifar10", "--batch_size 6", "class data"),
    "cifar100": ("cifar100", "--batch_size 16", "class data"),
    "svhn": ("svhn", "--batch_size 6", "class data"),
    "stl10": ("stl10", "--batch_size 6", "data"),
    "imagenet100": ("imagenet100", "--batch_size 32", "class data"),
    "imagenet": ("imagenet", "--batch_size 128 --moco_queue_size 128", "class data"),
    "domainnet": (
        "domainnet",
        "--batch_size 4 --num_tasks 3 --domain_order clipart real sketch",
        "domain data",
    ),
    "one_domain": ("domainnet", "--batch_size 16 --num_tasks 5 --domain_order real", "class"),
    "folder": ("folder", "--batch_size 2 --num_tasks 3", "domain class1 data"),
    "plain": ("folder", "--batch_size 2", "class data"),
    "unlabelled": ("folder", "--batch_size 2", "class1 data"),
}


def flags(data, name, scenario, out):
    dataset, extra, _ = SETS[name]
    extra += (
        " --scenario domain --num_tasks 3" if scenario == "domain" else f" --scenario {scenario.rstrip('1')}"
    )
    extra += " --num_tasks 1" if scenario == "class1" else ""
    return f"{FLAGS} --dataset {dataset} --data_dir {data / name} {extra} --out_dir {out}"


def same_networks(a, b):
    a, b = checkpoint.load(a), checkpoint.load(b)
    return all(torch.equal(a[part][k], b[part][k]) for part in ("backbone", "heads") for k in a[part])


class Crash(Exception):
    """Stands for a process that ends at once."""


def test_every_data_set_is_here():
    assert {dataset for dataset, *_ in SETS.values()} == DATASETS.keys()


@pytest.mark.parametrize(
    "name, scenario", [(name, s) for name, (*_, scenarios) in SETS.items() for s in scenarios.split()]
)
def test_from_files_to_results(data, name, scenario, tmp_path, monkeypatch, capsys):
    """Without worker processes, and with two and a crash in the middle of an epoch: the same bits."""
    call = flags(data, name, scenario, tmp_path / "a")
    assert run(f"{call} --workers 0") == 0
    out = capsys.readouterr().out
    results = tmp_path / "a" / "results.json"
    tasks = len(checkpoint.load(tmp_path / "a" / "split.pt"))
    if name == "unlabelled":
        assert "no labels" in out and "--probe_data_dir" in out and not results.exists()
    else:
        matrix = json.loads(results.read_text())["matrix"]
        assert [len(row) for row in matrix] == [tasks] * tasks
        if scenario == "data":  # every task is tested on the whole test set
            assert all(len(set(row)) == 1 for row in matrix)

    def save_and_crash(self, **parts):
        save(self, **parts)
        if self.step:
            raise Crash

    save = Run.save
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Run, "save", save_and_crash)
        run(call := f"{flags(data, name, scenario, tmp_path / 'b')} --workers 2 --save_every 2 --eval none")
    gc.collect()  # the crashed run's lock
    assert checkpoint.load(tmp_path / "b" / "last.pt")["counters"]["step"] == 2
    assert run(call) == 0
    a, b = ((tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in "ab")
    assert [line for line in a if '"kind": "eval"' not in line] == b
    assert same_networks(tmp_path / "a" / f"task{tasks - 1}.pt", tmp_path / "b" / f"task{tasks - 1}.pt")


def load(data, name, extra=""):
    dataset, *_ = SETS[name]
    return load_dataset(arguments(f"--dataset {dataset} --data_dir {data / name} {extra}"))


def test_contents(data):
    """Labels, classes and domains are those of the files."""
    train, _, test = load(data, "svhn")
    assert train.labels.tolist() == [(i % 10 + 1) % 10 for i in range(40)] and train.images.shape == (
        40,
        3,
        32,
        32,
    )
    train, probe, test = load(data, "stl10")
    assert (train.labels == -1).all() and train.images.shape == (40, 3, 96, 96)
    assert (
        probe.labels.tolist() == test.labels.tolist() == [i % 10 for i in range(20)]
        and probe.classes[3] == "class3"
    )
    train, probe, test = load(data, "imagenet100")
    assert (
        probe is train and len(train.classes) == 100 and len(train.labels) == 200 and len(test.labels) == 100
    )
    assert all(train.images.path(i).parent.name == train.classes[train.labels[i]] for i in range(200))
    train, _, test = load(data, "domainnet")
    assert train.domain_names == DOMAINS and len(train.labels) == 6 * 12 and len(test.labels) == 6 * 8
    for images in (train, test):
        for i, (label, domain) in enumerate(zip(images.labels.tolist(), images.domains.tolist())):
            place = images.images.path(i).parent
            assert (
                place.name == f"class{label}" == images.classes[label]
                and place.parent.name == DOMAINS[domain]
            )
    train, _, test = load(data, "folder", "--domain_order z x")
    assert train.domain_names == ("z", "x") and train.classes == ["ant", "bee"] and len(train.labels) == 16
    assert all(train.images.path(i).parent.parent.name == "zx"[train.domains[i]] for i in range(16))
    assert len(load(data, "unlabelled")[0].labels) == 16


def test_unlabelled_domains(data, tmp_path):
    """train/<task>/<image> with --scenario domain, evaluated with labels from elsewhere."""
    shutil.copytree(data / "plain" / "train", tmp_path / "plain" / "train")
    train, probe, test = load(tmp_path, "plain", "--scenario domain")
    assert train.domain_names == ("ant", "bee") and (train.labels == -1).all() and probe is test is None
    call = f"{FLAGS.replace('--num_tasks 2', '')} --dataset folder --data_dir {tmp_path / 'plain'}"
    call += " --scenario domain --batch_size 2"
    assert run(f"{call} --probe_data_dir {data / 'plain'} --out_dir {tmp_path / 'run'}") == 0
    matrix = json.loads((tmp_path / "run" / "results.json").read_text())["matrix"]
    assert [len(set(row)) for row in matrix] == [1, 1] and len(matrix[0]) == 2


def test_main_linear_keeps_to_the_tasks_of_the_run(data, tmp_path, capsys):
    import main_linear

    assert run(flags(data, "folder", "domain", tmp_path / "run") + " --domain_order z x --num_tasks 2") == 0
    matrix = json.loads((tmp_path / "run" / "results.json").read_text())["matrix"]
    fails(
        capsys,
        f"--run {tmp_path / 'run'} --domain_order x z",
        "--domain_order",
        "leave it out",
        script=main_linear,
    )
    fails(
        capsys, f"--run {tmp_path / 'run'} --cache disk", "--cache disk", "leave it out", script=main_linear
    )
    assert run(f"--run {tmp_path / 'run'} --protocol knn", main_linear) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["knn"]["matrix"] == matrix
    network = tmp_path / "run" / "task1.pt"
    assert (
        run(f"--checkpoint {network} --dataset digits --protocol knn", main_linear) == 0
    )  # other data, other tasks


def test_probe_data_dir(data, tmp_path, capsys):
    """Labels from elsewhere: for training without labels, in the run and afterwards."""
    import main_linear

    call = flags(data, "unlabelled", "data", tmp_path / "run")
    assert run(f"{call} --probe_data_dir {data / 'plain'}") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["matrix"]) == 2 and results["average_accuracy"] is not None
    linear = f"--run {tmp_path / 'run'} --protocol knn"
    assert run(linear, main_linear) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["knn"]["matrix"] == results["matrix"]
    fails(
        capsys,
        f"{call} --out_dir {tmp_path / 'x'} --probe_data_dir {data / 'unlabelled'}",
        "--probe_data_dir",
        "needs labelled",
    )
    assert run(f"{call} --out_dir {tmp_path / 'without'}") == 0
    capsys.readouterr()
    fails(
        capsys, f"--run {tmp_path / 'without'}", "no labelled images", "--probe_data_dir", script=main_linear
    )


# ---- decoding and streaming


def test_every_kind_of_file_is_upright_rgb(tmp_path):
    """To the bits of Pillow, which torchvision's decoder does not need."""
    for i, contents in enumerate(trees.odd_files()):
        path = tmp_path / str(i)
        path.write_bytes(contents)
        image = decode(path)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def files(data):
    return load(data, "folder")[0]


def test_crops_are_torchvisions_and_depend_on_the_sample_alone(data):
    from torchvision.transforms.functional import InterpolationMode, resize

    images = files(data).images
    crops = Crops(images, 16, [0.2, 0.5])
    key = (5, 1, 3)
    together, problems = crops[torch.arange(24), key]
    assert together.shape == (24, 2, 3, 16, 16) and not problems
    shuffled = torch.randperm(24)
    assert torch.equal(crops[shuffled, key][0], together[shuffled])
    assert torch.equal(crops[torch.tensor([7]), key][0][0], together[7])
    others = [crops[torch.arange(24), other][0] for other in ((5, 1, 4), (5, 2, 3), (6, 1, 3))]
    for other in (
        *others,
        together.flip(1),
    ):  # the largest box is that of any draw in images much wider than high
        assert (other == together).flatten(1).all(dim=1).double().mean() < 0.2
    for i in range(24):
        image = images.decode(i)
        height, width = (torch.tensor([float(s)]) for s in image.shape[1:])
        top, left, h, w = (int(b) for b in crops.random_boxes(key, 1, [i], height, width))
        assert (
            0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h * w > 0.4 * height * width
        )
        expected = resize(
            image[:, top : top + h, left : left + w], [16, 16], InterpolationMode.BICUBIC, antialias=True
        )
        assert (
            together[i, 1].int() - expected.int()
        ).abs().max() <= 2  # its strides are others, and so is the rounding


def test_centre_crops(data):
    """The centre 7/8 of the short side."""
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 4:60, 20:76] = 255
    stub = SimpleNamespace(decode=lambda i: image)
    assert (Crops(stub, 56)[torch.tensor([0]), None][0] == 255).all()
    images = files(data)
    labels = images.labels.clone()
    batches = list(
        evaluation_stream(
            images,
            slice(0, len(images.labels)),
            16,
            images.mean,
            images.std,
            None,
            CPU,
            workers=2,
            batch_size=10,
        )
    )
    assert [len(b) for b in batches] == [10, 10, 4] and torch.equal(images.labels, labels)


def stream_loader(images, rank=0, world=1, workers=0, skip=False):
    views = [ViewConfig(16, 0.2, blur_p=0.5), ViewConfig(16, 0.5, solarize_p=0.5)]
    stream = Stream(Crops(images, 16, [0.2, 0.5]), workers, CPU, skip)
    return StreamLoader(
        stream, torch.arange(len(images)), 8, views, (0.5,) * 3, (0.2,) * 3, 5, 0, rank, world
    )


def test_ranks_workers_and_resumed_epochs_see_the_same(data):
    images = files(data).images
    whole = list(stream_loader(images).epoch(1))
    assert len(whole) == 3
    workers = stream_loader(images, workers=2)
    list(workers.epoch(0))
    for got in (
        list(workers.epoch(1)),
        [None, *workers.epoch(1, first_step=1)],
    ):  # the same processes serve all epochs
        assert all(
            torch.equal(a, b) for g, w in zip(got, whole, strict=True) if g is not None for a, b in zip(g, w)
        )
    shares = [list(stream_loader(images, rank, 2).epoch(1)) for rank in (0, 1)]
    for step in range(3):
        for view in range(2):
            assert torch.equal(torch.cat([share[step][view] for share in shares]), whole[step][view])


def test_memory_does_not_grow(data):
    """Fifty epochs with workers; what is left of a leak of one batch an epoch would be far more."""

    def resident():
        return int(trees.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    loader = stream_loader(files(data).images, workers=1)
    for epoch in range(10):
        list(loader.epoch(epoch))
    before = resident()
    for epoch in range(10, 60):
        list(loader.epoch(epoch))
    assert resident() - before < 2e6
    open_files = len(list(trees.Path("/proc/self/fd").iterdir()))
    list(loader.epoch(60))
    assert len(list(trees.Path("/proc/self/fd").iterdir())) <= open_files


@pytest.fixture
def spoiled(data, tmp_path):
    """A copy of plain/ and one of its training files."""
    shutil.copytree(data / "plain", tmp_path / "plain")
    return tmp_path, tmp_path / "plain" / "train" / "bee" / "5.JPEG"


@pytest.mark.parametrize("workers", [0, 2])
def test_image_corrupt_in_the_middle_of_an_epoch(spoiled, tmp_path, capsys, workers):
    """Its path is named, the checkpoint stays, and the run goes on when the file is mended, or at once with
    --skip_corrupt."""
    root, path = spoiled
    call = f"{flags(root, 'plain', 'data', tmp_path / 'run')} --workers {workers} --save_every 1 --eval none"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    fails(capsys, call, "cannot decode", str(path), "--skip_corrupt")
    assert not list((tmp_path / "run").glob("task1.pt"))
    shutil.copytree(tmp_path / "run", tmp_path / "skipping")
    path.write_bytes(whole)
    assert run(call) == 0
    path.write_bytes(b"")
    capsys.readouterr()
    assert run(f"{call} --out_dir {tmp_path / 'skipping'} --skip_corrupt") == 0
    output = capsys.readouterr()
    assert (
        "1 training images could not be read" in output.out
        and str(path) in output.err
        and "the file is empty" in output.err
    )


def test_a_skipped_image_gives_its_place_to_the_next(spoiled):
    root, path = spoiled
    images = load(root, "plain")[0].images
    number = [images.path(i) for i in range(16)].index(path)
    whole = Crops(images, 16, [0.2, 0.5])[torch.arange(16), (1, 2, 3)][0]
    path.write_text("no image")
    crops, problems = Crops(images, 16, [0.2, 0.5])[torch.arange(16), (1, 2, 3)]
    assert list(problems) == [number] and str(path) in problems[number]
    assert torch.equal(crops[number], whole[number + 1 if number < 15 else 0])
    kept = torch.arange(16) != number
    assert torch.equal(crops[kept], whole[kept])
    for count in (1, 2):
        lost = Stream(Crops(Files(root, ["a", "b"]), 16), 0, CPU, skip_corrupt=True)
        with pytest.raises(DataError, match="any other image of its batch"):
            list(lost.batches([(torch.arange(count), (1, 2, 3))], some=True))
    images = load(root, "plain")[0]
    list(
        evaluation_stream(
            images,
            slice(0, len(images.labels)),
            16,
            images.mean,
            images.std,
            None,
            CPU,
            0,
            skip_corrupt=True,
            batch_size=1,
        )
    )
    assert (images.labels == -1).nonzero().tolist() == [[number]]  # it takes no part in the evaluation


def test_a_stalled_or_killed_worker_is_an_error(data, tmp_path, capsys, monkeypatch):
    call = f"{flags(data, 'plain', 'data', tmp_path / 'run')} --workers 1 --eval none"
    monkeypatch.setattr(streams, "TIMEOUT", 1)
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5
    )  # seconds that PyTorch waits for a worker to end
    monkeypatch.setattr(Crops, "decode", lambda self, i, unreadable: time.sleep(30))
    fails(capsys, call, "no images came for", "--data_dir")
    monkeypatch.setattr(Crops, "decode", lambda self, i, unreadable: os.kill(os.getpid(), signal.SIGKILL))
    call = call.replace("/run", "/other")
    fails(capsys, call, "a worker process", "memory", "--workers")


def test_signals_lose_nothing(data, tmp_path):
    """SIGTERM to all processes, as batch systems send it: the workers go on until the run has saved, and end
    with it. SIGKILL to the main process: the workers end with it, and the folder is free at once."""
    call = (
        flags(data, "imagenet100", "data", tmp_path / "run")
        + " --workers 2 --epochs 500 --eval none --save_every 1h"
    )

    def start():
        arguments = [sys.executable, str(trees.ROOT / "main_cssl.py"), *call.split()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        job = subprocess.Popen(arguments, env=ENVIRONMENT, start_new_session=True, **pipes)
        while "step" not in (line := job.stdout.readline()):
            assert line, job.stderr.read()
        return job

    job = start()
    os.killpg(job.pid, signal.SIGTERM)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 143 and len(error.splitlines()) == 1 and "stopped by SIGTERM" in error, error
    counters = checkpoint.load(tmp_path / "run" / "last.pt")["counters"]
    assert counters["global_step"] > 0
    with pytest.raises(ProcessLookupError):
        os.killpg(job.pid, 0)  # nobody of its group is left
    job = start()
    job.kill()
    job.wait()
    time.sleep(0.1)
    with open(tmp_path / "run" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    job.communicate()


# ---- cache


def test_cache_holds_reduced_images(data, tmp_path):
    plain = files(data).images
    cached = Files(plain.root, plain.names)
    cached.cache = open_cache(cached, tmp_path / "cache", 20)
    for i in range(len(plain)):
        image, small = plain.decode(i), cached.decode(i)
        height, width = image.shape[1:]
        assert min(small.shape[1:]) == 20 and abs(small.shape[2] / small.shape[1] - width / height) < 0.06
        expected = torch.nn.functional.interpolate(
            image.unsqueeze(0).float(), small.shape[1:], mode="bicubic", antialias=True
        )[0]
        assert (small - expected.clamp(0, 255)).abs().max() < 2
    part = cached[torch.tensor([5, 2])]
    assert part.path(1) == plain.path(2) and torch.equal(part.decode(1), cached.decode(2))
    copy = pickle.loads(pickle.dumps(cached))  # for workers that are not forks
    assert torch.equal(copy.decode(3), cached.decode(3))
    same = Files(plain.root, plain.names)
    same.cache = open_cache(same, tmp_path / "whole")
    assert all(torch.equal(same.decode(i), plain.decode(i)) for i in range(len(plain)))


@pytest.mark.parametrize("cache", ["disk", "ram"])
def test_cached_runs(data, tmp_path, cache, capsys):
    """Workers or not, the same bits; --cache disk decodes once, --cache ram leaves nothing behind."""
    before = set(trees.Path("/dev/shm").iterdir())
    call = f"{flags(data, 'plain', 'class', tmp_path / 'a')} --cache {cache} --cache_size 20"
    call += f" --cache_dir {tmp_path / 'cache'}"
    assert run(f"{call} --workers 0") == 0
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.cache")}
    assert len(written) == (2 if cache == "disk" else 0)
    assert run(f"{call} --workers 2 --out_dir {tmp_path / 'b'}") == 0
    assert written == {p: p.stat().st_mtime_ns for p in written}
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()
    assert {p for p in trees.Path("/dev/shm").iterdir() if "folder" in p.name} <= before


def test_damaged_caches_are_made_again(data, tmp_path, capsys):
    images, path = files(data).images, tmp_path / "cache"
    good = open_cache(images, path, 20).image(3).clone()
    whole = path.read_bytes()
    for damaged in (b"a" * 5000, b"", whole[:100], whole[:-1], whole + b"x"):
        path.write_bytes(damaged)
        assert torch.equal(open_cache(images, path, 20).image(3), good)
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert path.read_bytes() == whole


def test_corrupt_small_images(data, tmp_path, capsys):
    """--skip_corrupt leaves images out of what is held in memory, whether or not the cache is there
    already."""
    shutil.copytree(data / "cifar10", tmp_path / "cifar10", ignore=shutil.ignore_patterns(".*"))
    path = tmp_path / "cifar10" / "train" / "003" / "1.png"
    path.write_bytes(b"")
    call = flags(tmp_path, "cifar10", "data", tmp_path / "run")
    fails(capsys, call, "cannot decode", str(path), "--skip_corrupt")
    for _ in range(2):
        train, *_ = load(tmp_path, "cifar10", "--skip_corrupt")
        assert len(train.images) == len(train.labels) == 39 and (train.labels == 3).sum() == 3
        assert str(path) in capsys.readouterr().err
    assert run(f"{call} --skip_corrupt") == 0
    fails(capsys, call.replace("/run", "/x"), "cannot decode", str(path))
    trees.picture(0).save(path)
    fails(capsys, call.replace("/run", "/x"), "1.png is 50x40", "others are 8x8")
    status, out = checked(capsys, f"--dataset cifar10 --data_dir {tmp_path / 'cifar10'} --batch_size 4")
    assert status == 2 and "50x40 pixels where others are 8x8" in out


def test_two_jobs_make_one_cache(data, tmp_path, monkeypatch, capsys):
    images = files(data).images
    decoded = []
    monkeypatch.setattr("data.cache.decode", lambda path: decoded.append(path) or decode(path))
    caches = []
    jobs = [
        threading.Thread(target=lambda: caches.append(open_cache(images, tmp_path / "cache", 20)))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(caches) == 3 and len(decoded) == len(images)
    assert all(torch.equal(cache.image(7), caches[0].image(7)) for cache in caches)


def test_cache_problems(spoiled, tmp_path, capsys, monkeypatch):
    root, path = spoiled
    call = f"{flags(root, 'plain', 'class', tmp_path / 'run')} --cache disk --cache_size 20 --eval none"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    fails(capsys, call, "cannot decode", str(path), "--skip_corrupt")
    assert not list((root / "plain").glob(".*.cache")) and not list((root / "plain").glob(".*.tmp"))
    assert run(f"{call} --skip_corrupt") == 0
    path.write_bytes(whole)  # written after the cache, which is made again
    assert run(f"{call} --out_dir {tmp_path / 'mended'}") == 0
    (tmp_path / "file").write_text("")
    fails(
        capsys,
        f"{call} --cache_dir {tmp_path / 'file'} --out_dir {tmp_path / 'x'}",
        "cannot write",
        "--cache_dir",
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.cache._write", full)
    fails(capsys, f"{call} --cache_size 10 --out_dir {tmp_path / 'x'}", "no space left", "--cache_dir")


# ---- bad input


def test_bad_trees(data, tmp_path, capsys):
    def bad(name, *words, scenario="class", extra=""):
        fails(capsys, f"{flags(tmp_path, name, scenario, tmp_path / 'run')} {extra}", *words)

    trees.domainnet(tmp_path / "domainnet", domains=DOMAINS[:2])
    three = "--domain_order real quickdraw --num_tasks 2"
    bad("domainnet", "clipart_train.txt", "--data_dir")
    shutil.rmtree(tmp_path / "domainnet" / "quickdraw" / "class1")
    bad("domainnet", "3 of 24 images", "quickdraw/class1/0.jpg", "unpack", scenario="domain", extra=three)
    lists = tmp_path / "domainnet" / "real_train.txt"
    good = lists.read_text()
    for line, words in {
        "real/class0/0.jpg 345": ("line 13", "label 345", "0 to 344"),
        "real/class0/0.jpg -1": ("label -1",),
        "real/class0/0.jpg": ("line 13", "<domain>/<class>/<image> <label>"),
        "../../class0/0.jpg 0": ("is not a path below",),
        "/etc/class0/0.jpg 0": ("is not a path below",),
        "real/class1/0.jpg 0": ("label 0 is class1 here and class0",),
    }.items():
        lists.write_text(f"{good}{line}\n")
        bad("domainnet", "real_train.txt", *words, scenario="domain", extra=three)
    bad("domainnet", "--domain_order cartoon", "real", extra="--domain_order cartoon")
    bad("domainnet", "names a domain twice", extra="--domain_order real real")

    trees.imagenet(
        tmp_path / "imagenet100", (trees.ROOT / "data" / "imagenet100_classes.txt").read_text().split()[2:], 1
    )
    bad("imagenet100", "train lacks 2 of", "n01558993 n01692333")
    shutil.copytree(data / "imagenet" / "train", tmp_path / "imagenet" / "train")
    trees.fill(tmp_path / "imagenet", ["val"], 3)
    bad("imagenet", "no class folders", "unsorted", "torchvision.datasets.ImageNet")
    shutil.rmtree(tmp_path / "imagenet" / "train" / "n00000007")
    bad("imagenet", "999 class folders", "--dataset folder")
    bad("imagenet", "--download", "by hand", extra=f"--data_dir {data / 'imagenet'} --download")

    shutil.copytree(data / "folder", tmp_path / "folder")
    (tmp_path / "folder" / "train" / "y" / "bee").rename(tmp_path / "folder" / "train" / "y" / "cow")
    bad("folder", "task folder", "/train/x", "other tasks (cow)", scenario="domain")
    shutil.rmtree(tmp_path / "folder" / "train" / "y")
    bad("folder", "different task folders", "y", scenario="domain", extra="--num_tasks 2")
    trees.fill(tmp_path / "plain", ["train/ant", "train/ant/deep"], 2)
    bad("plain", "throughout", "ant/1.JPEG", "ant/deep/1.JPEG")
    bad("plain", "no folder", extra=f"--data_dir {tmp_path / 'nowhere'}")
    bad("plain", "fewer than --batch_size 16", extra=f"--data_dir {data / 'plain'} --batch_size 16")
    bad(
        "plain", "has no domains", extra=f"--data_dir {data / 'cifar10'} --dataset cifar10", scenario="domain"
    )
    bad("plain", "<task>/<class>/<image>", extra=f"--data_dir {data / 'plain'}", scenario="domain")
    (tmp_path / "renamed" / "test" / "ant").mkdir(parents=True)
    bad("plain", "test/ but no train/", extra=f"--data_dir {tmp_path / 'renamed'}")
    trees.fill(tmp_path / "loop", ["a"], 2)
    (tmp_path / "loop" / "a" / "self").symlink_to(".")
    bad("plain", "a link to a folder", extra=f"--data_dir {tmp_path / 'loop'}", scenario="data")
    bad("plain", "--domain_order", "no domains", extra=f"--data_dir {data / 'plain'} --domain_order ant")
    bad("plain", "have no labels", "--scenario data", extra=f"--data_dir {data / 'unlabelled'}")
    assert not (tmp_path / "run").exists()


def test_resume_with_another_split(data, tmp_path, capsys):
    """split.pt is written once and compared."""
    call = flags(data, "plain", "data", tmp_path / "run")
    assert run(call) == 0
    indices = checkpoint.load(tmp_path / "run" / "split.pt")
    assert sorted(torch.cat(indices).tolist()) == list(range(16))
    checkpoint.save(tmp_path / "run" / "split.pt", indices[::-1])
    fails(capsys, call, "split.pt", "is not the split")


# ---- data.check


def checked(capsys, call):
    status = check.main(check.parse_arguments(call.split()))
    return status, capsys.readouterr().out


def test_check(data, tmp_path, capsys):
    good = f"--dataset domainnet --data_dir {data / 'domainnet'} --scenario domain --batch_size 4"
    status, out = checked(capsys, good)
    assert status == 0 and out.strip().endswith("training would run")
    for words in (
        "train: 72 images",
        "345 classes with",
        "domain sketch: 12 images of 4 classes",
        "class2 18",
    ):
        assert words in out, words
    assert checked(capsys, good.replace("size 4", "size 13"))[0] == 2
    shutil.copytree(data / "plain", tmp_path / "plain")
    train = tmp_path / "plain" / "train"
    (train / "ant" / "0.JPEG").unlink()
    (train / "ant" / "0.JPEG").write_bytes(b"")
    whole = (train / "ant" / "1.JPEG").read_bytes()
    (train / "ant" / "1.JPEG").unlink()
    (train / "ant" / "1.JPEG").write_bytes(whole[: len(whole) // 2])
    (train / "bee" / "2.JPEG").unlink()
    (train / "bee" / "2.JPEG").write_text("no image")
    bad = f"--dataset folder --data_dir {tmp_path / 'plain'} --batch_size 2 --num_tasks 2"
    status, out = checked(capsys, bad)
    assert (
        status == 2
        and "3 cannot be read" in out
        and "training would not run" in out
        and "--skip_corrupt" in out
    )
    for name in ("ant/0.JPEG", "ant/1.JPEG", "bee/2.JPEG"):
        assert f"cannot decode {train / name} (" in out
    assert checked(capsys, f"{bad} --skip_corrupt")[0] == 0
    status, out = checked(capsys, "--dataset digits --num_tasks 3 --batch_size 32")
    assert status == 2 and "does not divide the 10 classes" in out
    with pytest.raises(DataError, match="no folder"):
        check.main(check.parse_arguments(["--dataset", "folder", "--data_dir", str(tmp_path / "nowhere")]))


def test_unknown_pixels(tmp_path):
    """16 and 32 bits are brought to 8; floating point is refused; what surprises Pillow is an unreadable
    file."""
    ramp = np.arange(256).reshape(16, 16)
    for pixels in (ramp.astype(np.uint16) * 257, ramp.astype(np.int32), ramp.astype(np.int32) * 257):
        Image.fromarray(pixels).save(tmp_path / "x.tif")
        assert torch.equal(decode(tmp_path / "x.tif")[1], torch.from_numpy(ramp).byte())
    Image.fromarray(ramp.astype(np.float32) / 255).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="floating-point"):
        decode(tmp_path / "x.tif")
