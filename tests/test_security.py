"""Whatever is read from a disk is data: a pickle with a command in it, in any place that is read, is refused
and not run."""

import pickle
import shutil

import pytest
import torch
import trees
from conftest import TINY, run
from test_bad_input import fails

import main_linear
from utils import checkpoint


class Command:
    """Unpickles as a call of open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(f"{TINY} --num_tasks 2 --epochs 1 --out_dir {folder}") == 0
    return folder


@pytest.fixture
def place(finished, tmp_path):
    """plant(name) puts the pickle in the place of a file of a finished run; nothing may have run when the
    test ends."""
    shutil.copytree(finished, tmp_path / "run")
    evil = pickle.dumps({"backbone": Command(tmp_path / "executed")})
    pickle.loads(evil)["backbone"].close()
    assert (tmp_path / "executed").exists()  # it is dangerous
    (tmp_path / "executed").unlink()

    def plant(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if str(name).endswith(".pt"):
                torch.save({"backbone": Command(tmp_path / "executed")}, tmp_path / name)
            else:
                (tmp_path / name).write_bytes(evil)
        return tmp_path

    yield plant
    assert not (tmp_path / "executed").exists()


def test_run_folder(place, capsys):
    root = place("run/last.pt", "run/last.prev.pt")
    call = f"{TINY} --num_tasks 2 --epochs 1 --out_dir {root / 'run'}"
    fails(capsys, call, "no readable checkpoint", "last.pt")


@pytest.mark.parametrize("name", ["split.pt", "task0.pt", "config.json"])
def test_other_files_of_a_run(place, capsys, name):
    root = place(f"run/{name}")
    if name == "split.pt":
        fails(capsys, f"{TINY} --num_tasks 2 --epochs 1 --out_dir {root / 'run'}", name, "Python objects")
    else:
        fails(
            capsys,
            f"--run {root / 'run'} --protocol knn",
            "config.json" if "config" in name else name,
            script=main_linear,
        )


def test_networks_from_elsewhere(place, capsys):
    root = place("network.pt")
    fails(
        capsys,
        f"{TINY} --init_from {root / 'network.pt'} --out_dir {root / 'x'}",
        "network.pt",
        "Python objects",
    )
    fails(
        capsys,
        f"--checkpoint {root / 'network.pt'} --dataset digits",
        "network.pt",
        "Python objects",
        script=main_linear,
    )


def test_data_files(place, capsys):
    """Lists, images, caches and torchvision's pickles, whose checksums are not the known ones."""
    data = f"{TINY} --num_tasks 2 --out_dir {{0}}/x --data_dir {{0}}"
    root = place(*(f"cifar-100-python/{name}" for name in ("train", "test", "meta")))
    fails(capsys, f"{data.format(root)} --dataset cifar100", "no CIFAR100")
    place("train_32x32.mat", "test_32x32.mat")
    fails(capsys, f"{data.format(root)} --dataset svhn", "no SVHN")
    trees.domainnet(root / "d", domains=("real",))
    place("d/real_train.txt")
    fails(capsys, f"{data.format(root / 'd')} --dataset domainnet --domain_order real", "real_train.txt")
    tree = trees.fill(root / "f", [f"{split}/{name}" for split in ("train", "test") for name in "ab"], 8)
    flags = f"{data.format(tree)} --dataset folder --batch_size 4 --epochs 1 --cache disk --cache_size 16"
    assert run(flags) == 0
    (cache,) = tree.glob(".folder_train*.cache")
    place(cache.relative_to(root))
    assert (
        run(f"{flags} --out_dir {root / 'y'}") == 0
        and "is damaged and is made again" in capsys.readouterr().err
    )
    first, again = (checkpoint.load(folder / "task1.pt")["backbone"] for folder in (tree / "x", root / "y"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    (tree / "train" / "a" / "0.JPEG").unlink()
    place("f/train/a/0.JPEG")
    fails(capsys, f"{flags} --out_dir {root / 'z'}", "cannot decode", "0.JPEG")
