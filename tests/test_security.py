"""What is read from a disk is data: a pickle with a command in it is refused and not run, wherever it is."""

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
    def __reduce__(self):
        return open, (str(self), "w")


@pytest.fixture
def plant(tmp_path):
    """plant(name, ...) puts a pickle that would make a file in others' places, and returns its content."""
    command = {"backbone": Command(tmp_path / "executed")}
    pickle.loads(pickle.dumps(command))["backbone"].close()
    (tmp_path / "executed").unlink()  # it was dangerous

    def plant(*names):
        for path in (tmp_path / name for name in names):
            path.parent.mkdir(parents=True, exist_ok=True)
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
    """torchvision's pickles, whose checksums are not the known ones, and one in the place of another file."""
    flags = f"{TINY} --data_dir {tmp_path} --out_dir {tmp_path / 'x'} --dataset"
    plant(*(f"cifar-100-python/{name}" for name in ("train", "test", "meta")))
    fails(capsys, f"{flags} cifar100", "--data_dir")
    plant("train_32x32.mat", "test_32x32.mat")
    fails(capsys, f"{flags} svhn", "--data_dir")


def test_caches(plant, tmp_path, capsys):
    """The pixels, the index, or the table in it."""
    files = Files(trees.fill(tmp_path, "a", count=4), [f"a/{i}.JPEG" for i in range(4)])
    raw = open_cache(files, "x", tmp_path).path
    good, index = raw.read_bytes(), raw.with_suffix(".npz")
    for name in (raw.name, index.name, "x"):
        np.savez(index, table=np.array([plant()]), fingerprint=files.fingerprint())
        plant(name)
        open_cache(files, "x", tmp_path)
        assert raw.read_bytes() == good and raw.name in capsys.readouterr().err
