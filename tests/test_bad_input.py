"""Bad input gets one line on stderr that says what is wrong, where, and what to do, and exit status 2."""

import re

import numpy as np
import pytest
import torch
from conftest import BASE, TINY, run
from PIL import Image

import main_cssl
import main_linear
from data.datasets import load_dataset


def fails(capsys, flags, *words, script=main_cssl):
    """Runs the script in this process; it must fail with status 2 and one line that holds all the words."""
    try:
        status = run(flags, script)
    except SystemExit as ended:  # from argparse
        status = ended.code
    error = capsys.readouterr().err.strip().splitlines()
    error = [line for line in error if not line.startswith(("decoding", "warning"))]
    assert status == 2, error
    assert len(error) == 1, error
    for word in words:
        assert word in error[0], error[0]


@pytest.fixture
def folders(tmp_path):
    """train/ and test/ with two classes of four images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return tmp_path / "data"


def pixels(data, extra=""):
    """uint8 [N, 3, H, W] of the training images."""
    return load_dataset(main_cssl.parse_arguments(small(data, data / "run", extra).split()))[0].images


def small(data, out, extra=""):
    flags = f"--dataset cifar100 --data_dir {data} --out_dir {out} --num_tasks 2 --batch_size 4"
    return f"{TINY} {flags} --moco_queue_size 8 {extra}"


def test_good_folders_train(folders, tmp_path, capsys):
    """The input that the other tests spoil is good."""
    assert run(small(folders, tmp_path / "run")) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_missing_data(tmp_path, capsys):
    fails(
        capsys,
        small(tmp_path / "nowhere", tmp_path / "run"),
        "no CIFAR100 in",
        "--download",
        "train/<class>/",
    )
    (tmp_path / "empty" / "train").mkdir(parents=True)
    fails(capsys, small(tmp_path / "empty", tmp_path / "run"), "holds no class folders")
    assert not (tmp_path / "run").exists()


def test_class_folder_without_images(folders, tmp_path, capsys):
    (folders / "train" / "cow").mkdir()
    fails(capsys, small(folders, tmp_path / "run"), str(folders / "train" / "cow"), "holds no images")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:60]),
        lambda p: p.write_text("no"),
    ],
)
def test_undecodable_image(folders, tmp_path, capsys, spoil):
    path = folders / "train" / "bee" / "2.png"
    spoil(path)
    fails(capsys, small(folders, tmp_path / "run"), "cannot decode", str(path))


def test_odd_images_are_read(folders):
    """Palette with transparency, grey, 16-bit grey and RGBA images become RGB; hidden files are passed
    over."""
    place = folders / "train" / "ant"
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(place / "0.png")
    Image.fromarray((ramp // 256).astype(np.uint8)).save(place / "1.png")
    Image.new("P", (8, 8), 3).save(place / "2.png", transparency=b"\x00\x10")
    Image.new("RGBA", (8, 8), (9, 8, 7, 100)).save(place / "3.png")
    (place / "._0.png").write_bytes(b"metadata")
    images = pixels(folders)
    assert len(images) == 8 and torch.equal(images[0], images[1]) and images[3, :, 0, 0].tolist() == [9, 8, 7]


def test_image_of_another_size(folders, tmp_path, capsys):
    Image.new("RGB", (9, 8)).save(folders / "test" / "bee" / "2.png")
    fails(capsys, small(folders, tmp_path / "run"), str(folders / "test" / "bee" / "2.png"), "9x8")


def test_different_classes(folders, tmp_path, capsys):
    (folders / "test" / "bee").rename(folders / "test" / "wasp")
    fails(capsys, small(folders, tmp_path / "run"), "different classes", "bee, wasp")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--dataset imagenette", ["--dataset", "'cifar100'"]),
        ("--method dino", ["--method", "'moco'"]),
        ("--regularizer ewc", ["--regularizer", "'cassle', 'pnr'"]),
        ("--backbone vgg", ["--backbone", "'resnet18'"]),
        ("--num_tasks 3", ["--num_tasks 3", "10 classes", "[1, 2, 5, 10]"]),
        ("--batch_size 512 --moco_queue_size 512", ["--batch_size 512", "images"]),
        ("--moco_queue_size 16", ["--moco_queue_size 16", "--batch_size 32"]),
        ("--out_dir /dev/null/run", ["/dev/null/run", "cannot be written"]),
        ("--epochs 0", ["--epochs", "a whole number from 1"]),
        ("--lr nan", ["--lr", "a number above 0"]),
        ("--moco_tau 0", ["--moco_tau", "a number above 0"]),
        ("--blur_p 0 1.5", ["--blur_p", "from 0 to 1"]),
        ("--save_every soon", ["--save_every", "90s"]),
        ("--mocoqueue 3", ["unrecognized arguments: --mocoqueue"]),
        ("--regularizer finetune --teacher_bn eval", ["unrecognized arguments: --teacher_bn"]),
        ("--init_from nothing.pt", ["nothing.pt"]),
        ("--method", ["--method", "expected one argument"]),
        ("--seed 99999999999999999999", ["--seed", "a whole number"]),
        ("--batch_size 1", ["--batch_size 1", "at least 2"]),
        ("--method byol --moco_tau 0.2", ["unrecognized arguments"]),
        ("--method byol --pnr_pseudo_negatives main", ["--pnr_pseudo_negatives", "both or none"]),
        ("--method falcon --falcon_codes 1", ["--falcon_codes 1"]),
        ("--cassle_weight -1 --regularizer cassle", ["--cassle_weight", "a number from 0"]),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, words):
    base = BASE if "--method" in flags else TINY
    fails(capsys, f"{base} --out_dir {tmp_path / 'run'} {flags}", *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path, capsys):
    fails(capsys, f"{TINY} --out_dir {tmp_path} --device cuda", "--device cuda", "--device cpu")


def test_checkpoint_of_another_architecture(tmp_path, capsys):
    flags = f"{TINY} --num_tasks 1 --epochs 1 --eval none --out_dir {tmp_path / 'one'}"
    assert run(flags) == 0
    file = tmp_path / "one" / "task0.pt"
    fails(
        capsys,
        f"{TINY} --width 8 --init_from {file} --out_dir {tmp_path / 'two'}",
        "another architecture",
        "conv1.weight",
        "--width 8",
    )
    fails(
        capsys,
        f"{TINY} --moco_dim 8 --init_from {file} --out_dir {tmp_path / 'two'}",
        "another architecture",
        "projector",
    )
    fails(capsys, f"--checkpoint {file} --backbone resnet18", "another architecture", script=main_linear)
    capsys.readouterr()


def test_main_linear_needs_a_network(tmp_path, capsys):
    fails(capsys, "--protocol knn", "--run DIR or --checkpoint FILE", script=main_linear)
    fails(capsys, f"--run {tmp_path}", "not a run folder", "config.json", script=main_linear)
    fails(capsys, f"--checkpoint {tmp_path / 'x.pt'}", "no checkpoint", script=main_linear)
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    fails(capsys, f"--checkpoint {tmp_path / 'x.pt'}", "--dataset", script=main_linear)
    fails(
        capsys,
        f"--checkpoint {tmp_path / 'x.pt'} --dataset digits",
        "another architecture",
        script=main_linear,
    )


def test_diverged_run_names_step_task_and_checkpoint(tmp_path, capsys, monkeypatch):
    """A NaN in the loss at a known step of the second task."""
    from losses.moco import MoCo

    ssl, calls = MoCo.ssl, []

    def poisoned(self, out, negatives=None):
        calls.append(0)
        return ssl(self, out, negatives) * (float("nan") if len(calls) == 50 else 1.0)

    monkeypatch.setattr(MoCo, "ssl", poisoned)
    flags = f"{TINY} --num_tasks 2 --out_dir {tmp_path / 'run'} --log_every 10"
    fails(capsys, flags, "not finite at step 49", "task 1", str(tmp_path / "run" / "last.pt"))
    monkeypatch.undo()
    assert run(flags) == 0


def test_cache(folders, tmp_path, capsys):
    """Decoded once; a stale, truncated or damaged cache is made again; one that cannot be written is done
    without."""
    first = pixels(folders)
    cache = next(folders.glob(".cifar100_train_*.cache"))
    written = cache.stat().st_mtime_ns
    assert torch.equal(pixels(folders), first) and cache.stat().st_mtime_ns == written
    whole = cache.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], b"", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        cache.write_bytes(damaged)
        assert torch.equal(pixels(folders), first)
        assert re.search("warning: cache .* is damaged", capsys.readouterr().err)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folders / "train" / "ant" / "0.png")
    changed = pixels(folders)
    assert changed[0, :, 0, 0].tolist() == [1, 2, 3] and torch.equal(changed[1:], first[1:])
    cache.unlink()
    cache.mkdir()  # stands for a place that cannot be written, also to root
    assert torch.equal(pixels(folders), changed)
    assert "--cache_dir" in capsys.readouterr().err
    assert torch.equal(pixels(folders, f"--cache_dir {tmp_path / 'elsewhere'}"), changed)
    assert len(list((tmp_path / "elsewhere").glob("*.cache"))) == 2


def test_torchvision_layout(tmp_path, capsys, monkeypatch):
    """Its files are read as they are, and are refused where a checksum is not the known one: nothing foreign
    is unpickled."""
    import pickle

    from torchvision.datasets import CIFAR100

    rng, place = np.random.default_rng(0), tmp_path / "cifar-100-python"
    place.mkdir()
    names = [f"class{i}" for i in range(100)]
    pixels = rng.integers(0, 256, (200, 3072), dtype=np.uint8)
    for split in ("train", "test"):
        (place / split).write_bytes(
            pickle.dumps({"data": pixels, "fine_labels": [i % 100 for i in range(200)]})
        )
    (place / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    flags = f"{TINY} --dataset cifar100 --data_dir {tmp_path} --num_tasks 5"
    fails(capsys, flags, "no CIFAR100 in", "--download")
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    train, _, test = load_dataset(main_cssl.parse_arguments(flags.split()))
    assert (
        train.classes == names
        and train.images.shape == (200, 3, 32, 32)
        and test.labels.tolist() == [i % 100 for i in range(200)]
    )
    assert torch.equal(train.images[7], torch.from_numpy(pixels[7].reshape(3, 32, 32)))
