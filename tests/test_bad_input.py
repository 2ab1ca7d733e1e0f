"""Bad flags, networks and data sets: one line that names what is wrong, and nothing is written."""

import shutil

import pytest
import torch
import trees
from conftest import BASE, TINY, arguments, fails, run

import main_linear
from data import check
from data.datasets import load_dataset
from models.learner import Learner

BAD_FLAGS = """
--dataset imagenette; --method dino; --regularizer ewc; --backbone vgg; --num_tasks 3; --epochs 0;
--lr nan; --width 4; --width 4000000000000000000; --batch_size 512 --moco_queue_size 512;
--batch_size 1; --moco_queue_size 16;
--moco_tau 0; --blur_p 0 1.5; --out_dir /dev/null/run; --save_every soon; --mocoqueue 3;
--seed 9999999999999999999999; --teacher_bn eval --regularizer finetune;
--cassle_weight -1 --regularizer cassle; --domain_order a b; --moco_tau 0.2 --method byol;
--pnr_pseudo_negatives main --method byol; --falcon_codes 1 --method falcon
"""


@pytest.fixture
def bad(tmp_path, capsys):
    """bad(flags, *names): refused with a line that holds all the names."""
    base = f"{BASE} --out_dir {tmp_path / 'run'}"
    yield lambda flags, *names: fails(capsys, f"{base} {flags}", *names)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", BAD_FLAGS.split(";") + ["--device cuda"] * (not torch.cuda.is_available()))
def test_flags(bad, flags):
    bad(flags, flags.split()[0])


def test_a_batch_that_does_not_fit(tmp_path, capsys, monkeypatch):
    def full(self, view1, view2, labelled=None):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Learner, "forward", full)
    fails(capsys, f"{TINY} --num_tasks 1 --out_dir {tmp_path}", "out of memory", "lower --batch_size")


def test_networks(tmp_path, bad, capsys):
    assert run(f"{TINY} --num_tasks 1 --epochs 1 --eval none --out_dir {tmp_path / 'one'}") == 0
    file, foreign = tmp_path / "one" / "task0.pt", tmp_path / "x.pt"
    torch.save({"x": torch.ones(1)}, foreign)
    bad(f"{TINY} --num_tasks 1 --init_from {file} --width 16", str(file), "--width 16", "conv1.weight")
    bad(f"{TINY} --num_tasks 1 --init_from {file} --moco_dim 8", str(file), "projector")
    bad(f"{TINY} --num_tasks 5 --init_from {file}", str(file))  # another first task
    bad("--init_from no.pt", "no.pt")
    fails(capsys, "", "--run", "--checkpoint", script=main_linear)
    fails(capsys, f"--run {tmp_path}", "config.json", script=main_linear)
    for path in (file, foreign, tmp_path / "no.pt"):
        fails(capsys, f"--checkpoint {path} --dataset digits --width 16", str(path), script=main_linear)


def test_domainnet(tmp_path, bad):
    trees.domainnet(tmp_path, domains=("real", "quickdraw"))
    flags = f"--dataset domainnet --scenario domain --data_dir {tmp_path}"
    bad(flags, str(tmp_path / "painting"))
    flags += " --domain_order"
    bad(f"{flags} cartoon", "--domain_order cartoon")
    bad(f"{flags} real real", "--domain_order")
    bad(f"{flags} real quickdraw --num_tasks 3", "--num_tasks 3")
    shutil.rmtree(tmp_path / "quickdraw")
    bad(f"{flags} real quickdraw", str(tmp_path / "quickdraw"))
    good = (tmp_path / "real_train.txt").read_text()
    lines = "real/class0/0.jpg 345; real/class0/0.jpg -1; real/class0/0.jpg; real/class1/0.jpg 0"
    for line in f"{lines}; ../../class0/0.jpg 0; /etc/class0/0.jpg 0".split("; "):
        (tmp_path / "real_train.txt").write_text(f"{good}{line}\n")
        bad(f"{flags} real", "real_train.txt, line 13")


def test_imagenet(tmp_path, bad):
    names = trees.IMAGENET100.split()
    trees.fill(tmp_path, "train val", " ".join(names[2:]), count=1)
    bad(f"--dataset imagenet100 --data_dir {tmp_path}", f"{tmp_path}/train", *names[:2], "--dataset folder")
    bad(f"--dataset imagenet --data_dir {tmp_path}", f"{tmp_path}/train", "98", "--dataset folder")
    trees.fill(tmp_path, "train val", " ".join(names[:2]), count=1)
    bad(f"--dataset imagenet100 --data_dir {tmp_path} --download", "--download")
    shutil.rmtree(tmp_path / "val")
    trees.fill(tmp_path, "val", count=3)  # unsorted
    bad(f"--dataset imagenet100 --data_dir {tmp_path}", f"{tmp_path}/val")


def test_folder(tmp_path, bad):
    tasks = trees.fill(tmp_path / "tasks", "train test", "x y z", "ant bee", count=4)
    plain = trees.fill(tmp_path / "plain", "train test", "ant bee", count=4)
    flags = "--dataset folder --batch_size 2 --data_dir"
    bad(f"{flags} {plain} --scenario domain", f"{plain}/train", "--scenario domain")
    bad(f"{flags} {plain} --domain_order ant", "--domain_order")
    (tasks / "train" / "y" / "bee").rename(tasks / "train" / "y" / "cow")
    bad(f"{flags} {tasks} --scenario domain", f"{tasks}/train/x", "cow")
    shutil.rmtree(tasks / "train" / "y")
    bad(f"{flags} {tasks} --scenario domain", str(tasks), "(y ")
    (plain / "test" / "bee").rename(plain / "test" / "wasp")
    bad(f"{flags} {plain}", str(plain), "bee, wasp")
    trees.fill(plain, "train", "ant", "deep", count=1)
    bad(f"{flags} {plain}", "bee/3.JPEG", "ant/deep/0.JPEG")
    shutil.rmtree(plain / "train")
    bad(f"{flags} {plain}", "train/", "test/")
    unlabelled = trees.fill(tmp_path / "unlabelled", "a", count=4)
    bad(f"{flags} {unlabelled}", "--scenario class", "--num_tasks 1")
    bad(f"{flags} {unlabelled} --scenario data", "--num_tasks 5")
    bad(f"{flags} {unlabelled} --num_tasks 1 --online_probe clean", "--online_probe", "--probe_data_dir")


def test_small_images(tmp_path, bad, capsys):
    """--skip_corrupt leaves files out of what is held in memory, with or without a cache, new or old."""
    root = trees.small(tmp_path / "data", classes=10, count=4)
    path, flags = root / "train" / "003" / "1.png", f"--dataset cifar100 --batch_size 4 --data_dir {root}"
    (path.parent / "._1.png").write_bytes(b"metadata")  # of a file system; hidden files are passed over
    trees.spoil(path, b"")
    bad(flags, str(path), "--skip_corrupt")
    for cache in ("", f"--cache {tmp_path}", f"--cache {tmp_path}"):
        train, *_ = load_dataset(arguments(f"{flags} --skip_corrupt {cache}"))
        assert len(train.images) == len(train.labels) == 39 and (train.labels == 3).sum() == 3
        assert str(path) in capsys.readouterr().err
    trees.spoil(path, trees.encode(trees.picture(0, 8, 9), "PNG"))
    bad(flags, str(path), "9x8")
    path.parent.rename(root / "train" / "wasp")
    bad(flags, str(root), "003, wasp")
    (root / "train" / "cow").mkdir()
    bad(flags, f"{root}/train/cow")
    bad(f"{flags}/nowhere", "--data_dir", "--download", "nowhere")


def test_check(tmp_path, capsys):
    """Reports all that is there and all that is wrong; its status says whether training would run."""

    def checked(flags, status, *words):
        assert check.main(check.parse_arguments(flags.split())) == status
        out = capsys.readouterr().out
        assert all(word in out for word in words), out

    flags = f"--dataset domainnet --data_dir {trees.domainnet(tmp_path)} --scenario domain --batch_size"
    checked(f"{flags} 4", 0, "train: 72 images", "345 classes", "sketch: 12 images of 4 classes", "class2 18")
    checked(f"{flags} 13 --num_tasks 4", 2, "--num_tasks 4")
    root = trees.fill(tmp_path / "plain", "train test", "ant bee", count=4)
    paths = [root / "train/ant/0.JPEG", root / "train/bee/2.JPEG", root / "test/ant/1.JPEG"]
    for path, content in zip(paths, (b"", b"no image", paths[2].read_bytes()[:400])):
        trees.spoil(path, content)
    flags = f"--dataset folder --data_dir {root} --num_tasks 2 --batch_size"
    checked(f"{flags} 2", 2, "--skip_corrupt", *(f"{path} (" for path in paths))
    checked(f"{flags} 2 --skip_corrupt", 0)
    root = trees.small(tmp_path / "small", classes=2, count=4)
    trees.spoil(root / "test/001/2.png", trees.encode(trees.picture(0, 8, 9), "PNG"))
    checked(f"--dataset cifar100 --data_dir {root} --num_tasks 2 --batch_size 4", 2, "001/2.png: 9x8")
