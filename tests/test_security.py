"""Whatever is read from a disk is data: a pickle with a command in it, in any place that is read, is refused
and not run."""

import pickle

import numpy as np
import pytest
import torch
import trees
from conftest import TINY, fails, run

import main_linear
from data.cache import open_cache
from data.files import Files


class Command(str):
    """Unpickles as a call of open(path, "w")."""

    def __reduce__(self):
        return open, (str(self), "w")


@pytest.fixture
def plant(tmp_path):
    """plant(name, ...) puts the pickle in the place of files below tmp_path; none may have run in the end."""
    command = {"backbone": Command(tmp_path / "executed")}
    pickle.loads(pickle.dumps(command))["backbone"].close()
    (tmp_path / "executed").unlink()  # without an error: it is dangerous

    def plant(*names):
        for path in (tmp_path / name for name in names):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            torch.save(command, path) if path.suffix == ".pt" else path.write_bytes(pickle.dumps(command))
        return command

    yield plant
    assert not (tmp_path / "executed").exists()


def test_networks_and_runs(plant, tmp_path, capsys):
    flags = f"{TINY} --num_tasks 1 --epochs 1 --eval none --out_dir {tmp_path / 'run'}"
    assert run(flags) == 0
    plant("run/last.pt", "run/last.prev.pt", "run/task0.pt", "x.pt")
    fails(capsys, flags, "last.pt")
    fails(capsys, f"{TINY} --init_from {tmp_path / 'x.pt'} --out_dir {tmp_path / 'x'}", "x.pt")
    fails(capsys, f"--checkpoint {tmp_path / 'x.pt'} --dataset digits", "x.pt", script=main_linear)
    fails(capsys, f"--run {tmp_path / 'run'} --protocol knn", "task0.pt", script=main_linear)
    plant("run/config.json")
    fails(capsys, f"--run {tmp_path / 'run'} --protocol knn", "config.json", script=main_linear)


def test_data_sets(plant, tmp_path, capsys):
    """torchvision's pickles have not the known checksums; lists and images are no pickles."""
    flags = f"{TINY} --data_dir {tmp_path} --out_dir {tmp_path / 'x'} --dataset"
    plant(*(f"cifar-100-python/{name}" for name in ("train", "test", "meta")))
    fails(capsys, f"{flags} cifar100", "--data_dir")
    plant("train_32x32.mat", "test_32x32.mat")
    fails(capsys, f"{flags} svhn", "--data_dir")
    trees.domainnet(tmp_path, domains=("real",))
    plant("real/class0/0.jpg")
    real = f"{flags} domainnet --domain_order real --num_tasks 1 --batch_size 12 --workers 0"
    fails(capsys, real, "real/class0/0.jpg")
    plant("real_train.txt")
    fails(capsys, real, "real_train.txt")


def test_caches(plant, tmp_path, capsys):
    """Pixels, the index, and a table in the index."""
    files = Files(trees.fill(tmp_path, "a", count=4), [f"a/{i}.JPEG" for i in range(4)])
    raw = open_cache(files, "x", tmp_path).path
    good, index = raw.read_bytes(), raw.with_suffix(".npz")
    for spoil in (
        lambda: plant(raw.name),
        lambda: plant(index.name),
        lambda: np.savez(index, table=np.array([plant()]), fingerprint=files.fingerprint()),
    ):
        spoil()
        open_cache(files, "x", tmp_path)
        assert raw.read_bytes() == good and raw.name in capsys.readouterr().err
