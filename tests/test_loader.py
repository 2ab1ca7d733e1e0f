"""Image files: exact, whichever worker reads them and whatever becomes of it; and what --cache keeps."""

import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import get_context, resource_sharer
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import trees
from conftest import CPU, TINY, arguments, counters, fails, outcome, run, same, start
from PIL import Image, ImageOps
from torchvision.transforms.functional import InterpolationMode, resize

from data import augment, files, loader
from data.cache import open_cache
from data.datasets import load_dataset
from utils import UserError, distributed
from utils.distributed import Process

VIEWS = [augment.ViewConfig(16, 0.2, blur_p=0.5), augment.ViewConfig(16, 0.5, solarize_p=0.5)]
KEY, ALL, BEE = (5, 1, 3), torch.arange(24), "train/bee/9.JPEG"


@pytest.fixture
def root(tmp_path):
    return trees.fill(tmp_path, "train test", "ant bee", count=12)


@pytest.fixture
def images(root):
    return load_dataset(arguments(f"--dataset folder --data_dir {root}"))[0]


def made(images, indices=ALL, key=KEY):
    return loader.Crops(images.images, VIEWS)[indices, key][0]


def evaluated(images, rank=0, world=1, workers=0):
    args = SimpleNamespace(image_size=16, workers=workers, skip_corrupt=True)
    return list(loader.evaluation_batches(args, Process(CPU.device, rank, world), images))


def call(root, flags, out="run"):
    data = f"--dataset folder --data_dir {root} --num_tasks 1 --batch_size 2 --epochs 1 --workers 0"
    return f"{TINY} {data} --out_dir {root / out} {flags}"


def test_every_kind_of_file_is_upright_rgb(tmp_path):
    """To the bits of Pillow; 16 bits are brought to 8; of 32 and of floats nobody knows the range."""
    path = tmp_path / "x.tif"
    for content in trees.odd_files():
        path.write_bytes(content)
        image = ImageOps.exif_transpose(Image.open(path))
        expected = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
        assert np.array_equal(files.decode(path).permute(1, 2, 0).numpy(), np.asarray(expected))
    ramp = np.arange(256).reshape(16, 16)
    for pixels in (ramp.astype(np.uint16) * 257, ramp.astype(np.int32), ramp.astype(np.int32) * 257):
        Image.fromarray(pixels).save(path)
        assert torch.equal(files.decode(path)[1], torch.from_numpy(ramp).byte())
    for pixels in (ramp.astype(np.float32) / 255, ramp.astype(np.int32) - 1, ramp.astype(np.int32) * 258):
        Image.fromarray(pixels).save(path)
        with pytest.raises(UserError, match=str(path)):
            files.decode(path)


def test_crops_are_torchvisions_and_depend_on_the_sample_alone(images):
    together = made(images)
    assert together.shape == (24, 2, 3, 16, 16) and torch.equal(made(images, ALL.flip(0)), together.flip(0))
    others = [made(images, key=key) for key in ((5, 1, 4), (5, 2, 3), (6, 1, 3))]
    for other in (*others, together.flip(1)):  # some images are so wide that any draw gives the largest box
        assert (other == together).flatten(1).all(dim=1).double().mean() < 0.2
    for i in range(24):
        image = images.images.decode(i)
        u = torch.rand(4, 1, augment.CROP_TRIES, generator=loader.generator(*KEY, 1, i))
        top, left, h, w = map(int, augment.boxes(u, *torch.tensor(image.shape[1:]).view(2, 1), 0.5))
        part = image[:, top : top + h, left : left + w]
        expected = resize(part, [16, 16], InterpolationMode.BICUBIC, antialias=True)
        assert (together[i, 1].int() - expected.int()).abs().max() <= 2  # strides and rounding differ


def test_evaluation_sees_the_centre(images, monkeypatch):
    """7/8 of the short side; each image once and in order, whichever rank or worker reads it."""
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 4:60, 20:76] = 255
    centre = loader.Crops(SimpleNamespace(decode=lambda i: image), [augment.ViewConfig(56)])
    assert (centre[ALL[:1], None][0] == 255).all()
    monkeypatch.setattr(loader, "EVALUATION_BATCH", 10)
    x, y = map(torch.cat, zip(*evaluated(images, workers=2)))
    assert torch.equal(x, augment.normalize(made(images, key=None)[:, 0] / 255, images.mean, images.std))
    first, second = evaluated(images, 0, 2), evaluated(images, 1, 2)
    assert torch.equal(y, images.labels) and (len(first), len(second)) == (1, 2)
    assert torch.equal(torch.cat([x for x, _ in first + second]), x)


def test_ranks_workers_and_resumed_epochs_see_the_same(images):
    def views(batches):
        return torch.stack([torch.stack(views) for views, _ in batches])

    whole = views(loader.Loader(images, ALL, 8, VIEWS, 5, 0).epoch(1))
    assert whole.shape == (3, 2, 8, 3, 16, 16)
    shares = [views(loader.Loader(images, ALL, 8, VIEWS, 5, 0, rank, 2).epoch(1)) for rank in (0, 1)]
    assert torch.equal(torch.cat(shares, dim=2), whole)
    working = loader.Loader(images, ALL, 8, VIEWS, 5, 0, workers=2)
    list(working.epoch(0))
    opened = os.listdir("/proc/self/fd")  # one for each batch that is left in shared memory
    for _ in range(5):
        assert torch.equal(views(working.epoch(1)), whole)
        assert torch.equal(views(working.epoch(1, 2)), whole[2:])
    assert len(os.listdir("/proc/self/fd")) <= len(opened)


def test_a_skipped_image_gives_its_place_to_the_next(root, images):
    """But not its label; and it takes no part in the evaluation."""
    whole, number = made(images), 23
    assert images.images.path(number) == root / BEE
    trees.spoil(root / BEE)
    whole[number] = whole[0]
    assert torch.equal(made(images), whole)
    train, expected = loader.Loader(images, ALL, 8, VIEWS, 5, 0, skip_corrupt=True), images.labels.clone()
    expected[number] = -1
    order, labels = torch.cat(list(train.batches(1))), torch.cat([y for _, y in train.epoch(1)])
    assert torch.equal(labels, expected[order]) and images.skipped.keys() == {number}
    assert torch.equal(torch.cat([y for _, y in evaluated(images)]), expected)
    for skipped in ({}, {0: "why", 1: "why"}):  # a batch without any image, for the first and the second time
        lost = replace(images, images=files.Files(root, ["a", "a"]), skipped=skipped)
        with pytest.raises(UserError, match=str(root / "a")):
            list(loader.Loader(lost, ALL[:2], 2, VIEWS, 5, 0, skip_corrupt=True).epoch(0))


def test_an_image_corrupt_in_the_middle_of_an_epoch(root, capsys):
    """Is named, and the run goes on from its checkpoint when it is mended, or from the start without it."""
    whole, flags = trees.spoil(root / BEE, (root / BEE).read_bytes()[:400]), "--save_every 1 --eval none"
    fails(capsys, call(root, flags), str(root / BEE), "--skip_corrupt")
    step = counters(root / "run")["step"]
    assert step > 0 and run(call(root, "--skip_corrupt --epochs 2 --eval none", "skipping")) == 0
    output = capsys.readouterr()
    assert "1 images could not be read" in output.out and output.err.count(BEE) == 1
    trees.spoil(root / BEE, whole)
    assert run(call(root, flags)) == 0 and f"step {step}" in capsys.readouterr().out


def test_a_stalled_or_killed_worker_is_an_error(root, capsys, monkeypatch):
    monkeypatch.setattr(loader, "TIMEOUT", 1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # to wait for their end
    monkeypatch.setattr(loader.Crops, "decode", lambda *_: time.sleep(10))
    fails(capsys, call(root, "--workers 1 --eval none"), "--data_dir")
    monkeypatch.setattr(loader.Crops, "decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    fails(capsys, call(root, "--workers 1 --eval none"), "--workers")


def test_an_error_is_told_once_workers_have_ended(root, capsys, monkeypatch):
    """PyTorch's handler of SIGCHLD would tell of their end too once the error lets go of their iterators."""
    handlers, explain = [], distributed.explain
    note = lambda error: handlers.append(signal.getsignal(signal.SIGCHLD)) or explain(error)  # noqa: E731
    monkeypatch.setattr(distributed, "explain", note)
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    monkeypatch.setattr(loader, "TIMEOUT", 1)
    monkeypatch.setattr(loader.Crops, "decode", lambda *_: time.sleep(10))
    fails(capsys, call(root, "--workers 1 --eval none"), "--data_dir")
    assert handlers == [signal.SIG_DFL]


def test_no_thread_hands_over_what_a_worker_shall_read(images):
    """It would print a traceback where the worker has been ended."""
    resource_sharer.stop()
    assert evaluated(images, workers=1)
    assert not [thread for thread in threading.enumerate() if "_serve" in thread.name]


def test_signals_lose_nothing(root):
    """SIGKILL of the main process frees the folder; after SIGTERM to all processes, as batch systems send it,
    the workers go on until the run has saved; in the end, and after an error, none is left."""
    trees.spoil(root / BEE)
    flags, jobs = "--workers 2 --epochs 500 --eval none --save_every 5", []
    failing = start(call(root, flags, "failing"))
    for kill, number in ((os.kill, signal.SIGKILL), (os.killpg, signal.SIGTERM)):
        before, job = (
            counters(root / "run"),
            start(call(root, f"{flags} --skip_corrupt"), start_new_session=True),
        )
        while counters(root / "run") == before:
            assert job.poll() is None, job.stderr.read()
        kill(job.pid, number)
        jobs.append(job)
    for job, status, words in ((jobs[1], 143, "SIGTERM"), (failing, 2, BEE)):
        _, error = job.communicate(timeout=120)  # until the last process that could write has ended
        error = [line for line in error.splitlines() if not line.startswith("warning")]
        assert job.returncode == status and [words in line for line in error] == [True], error
    jobs[0].communicate(timeout=120)


def test_what_is_cached(root, images):
    """Reduced images; or, without a size, the same as in the files."""
    plain = images.images
    cached = files.Files(plain.root, plain.names, open_cache(plain, "x", root, 20))
    for i in range(24):
        image, small = plain.decode(i)[None].float(), cached.decode(i)
        height, width = image.shape[2:]
        assert min(small.shape[1:]) == 20 and abs(small.shape[2] / small.shape[1] - width / height) < 0.06
        expected = torch.nn.functional.interpolate(image, small.shape[1:], mode="bicubic", antialias=True)
        assert (small - expected[0].clamp(0, 255)).abs().max() < 2
    part = pickle.loads(pickle.dumps(cached))[torch.tensor([5, 2])]  # for workers that are not forks
    assert part.path(1) == plain.path(2) and torch.equal(part.decode(1), cached.decode(2))
    whole = open_cache(plain, "x", root)
    assert all(torch.equal(whole.image(i), plain.decode(i)) for i in range(24))
    nothing = open_cache(files.Files(root, ["no.png", "none.png"]), "x", root, skip_corrupt=True)
    assert nothing.image(0) is None


def test_a_damaged_or_stale_cache_is_made_again(root, images, capsys):
    def contents():
        open_cache(images.images, "x", root, 20)
        return {path: path.read_bytes() for path in (raw, raw.with_suffix(".npz"))}

    raw = open_cache(images.images, "x", root, 20).path
    good = contents()
    for path, whole in good.items():
        other = bytearray(whole) + b"x" * (path == raw)
        other[whole.find(b"PK\1\2") + 8] ^= 1  # by which the index, a zip file, would be encrypted
        for damaged in (b"", b"a" * 5000, whole[:100], whole[:-1], other):
            path.write_bytes(damaged)
            assert contents() == good and str(raw) in capsys.readouterr().err
        path.unlink()
        assert contents() == good
    trees.spoil(root / BEE, trees.encode(trees.picture(9, 20, 20), "PNG"))
    assert torch.equal(open_cache(images.images, "x", root, 20).image(23), files.decode(root / BEE))
    assert "damaged" not in capsys.readouterr().err


def test_several_processes_make_one_cache(root, images, monkeypatch):
    def counted(path, decode=files.decode):
        with open(root / "decoded", "a") as log:
            log.write("x")
        return decode(path)

    monkeypatch.setattr(files, "decode", counted)
    with get_context("fork").Pool(3) as pool:
        pool.starmap(open_cache, [(images.images, "x", root / "cache")] * 3, chunksize=1)
    assert (root / "decoded").read_text() == "x" * 24
    assert {path.suffix for path in (root / "cache").iterdir()} == {".lock", ".npz", ".raw"}


def test_cached_runs(root, capsys, monkeypatch):
    """With and without workers the same bits; each image is decoded once; what goes wrong is told."""
    trees.no_pictures(monkeypatch)
    flags, whole = f"--batch_size 4 --cache {root / 'cache'} --cache_size 20", trees.spoil(root / BEE)
    fails(capsys, call(root, flags), BEE, "--skip_corrupt")
    assert [path.suffix for path in (root / "cache").iterdir()] == [".lock"]
    assert run(call(root, f"{flags} --skip_corrupt --eval none")) == 0 and BEE in capsys.readouterr().err
    trees.spoil(root / BEE, whole)
    assert run(call(root, flags, "a")) == 0
    written = {path: path.stat().st_mtime_ns for path in (root / "cache").glob("*.raw")}
    assert run(call(root, f"{flags} --workers 2", "b")) == 0
    assert same(outcome(root / "b"), outcome(root / "a"))
    assert written == {path: path.stat().st_mtime_ns for path in (root / "cache").glob("*.raw")}
    fails(capsys, call(root, f"{flags} --cache {root / BEE}", "c"), "--cache", BEE)  # is no folder
    monkeypatch.setattr("data.cache.write", Mock(side_effect=OSError(28, "No space left on device")))
    fails(capsys, call(root, f"{flags} --cache_size 10", "c"), "--cache", "no space left")
