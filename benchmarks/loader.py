"""Images per second from JPEG files to two normalised float views: this project's loader, without and with
a cache, and torchvision's ImageFolder with a two-crop pipeline on PIL images in a DataLoader with the
same number of workers.

    python -m benchmarks.loader --workers 2

The files are made up (500x375 pixels by default) and read from the page cache of the machine. Every round is
one epoch over all of them; the contenders take turns, so that a busy machine slows them all alike, and the
median round counts. Then the parts are timed apart, on one core. With a GPU the colours and the blur of this
project's views are its work.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import timeit
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

import main_cssl
from benchmarks.plain import PilViews, pil_parts
from benchmarks.step import in_turn
from data import augment, default_workers
from data.augment import ViewConfig
from data.datasets import IMAGENET_STATS, load_dataset
from data.files import decode
from data.loader import Loader, crop, generator
from utils import distributed


def make_files(root, count, width, height):
    """Smooth colours with some noise: about 70 kB at 500x375, as photographs of that size."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = root / "train" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), dtype=np.float32)
        noisy = smooth + rng.normal(0, 8, smooth.shape).astype(np.float32)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(place / f"{i}.jpg", quality=90)


def configs(size):
    """The papers' views of ImageNet-100."""
    return [ViewConfig(size, blur_p=blur, solarize_p=solarize) for blur, solarize in ((1.0, 0.0), (0.1, 0.2))]


def theirs(root, args, device):
    """A function that runs through one epoch."""
    transform = PilViews(configs(args.image_size), *IMAGENET_STATS)
    files = torchvision.datasets.ImageFolder(root / "train", transform)
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    pinned = device.type == "cuda"
    loader = DataLoader(files, args.batch_size, True, drop_last=True, pin_memory=pinned, **workers)
    return lambda: deque((v.to(device, non_blocking=True) for views, _ in loader for v in views), 0)


def ours(root, args, device, *cache):
    flags = main_cssl.parse_arguments(["--dataset", "folder", "--data_dir", str(root), *cache])
    train = load_dataset(flags)[0]
    train.to(device)
    indices, views = torch.arange(len(train.labels)), configs(args.image_size)
    loader = Loader(train, indices, args.batch_size, views, 0, 0, workers=args.workers)
    epochs = itertools.count()
    return lambda: deque(loader.epoch(next(epochs)), 0)


def seconds(function, items):
    """Milliseconds per item, the best of three runs."""
    return 1000 * min(timeit.repeat(lambda: [function(x) for x in items], number=1, repeat=3)) / len(items)


def time_parts(root, size):
    """Milliseconds per image (both views) of every part, on one core: {part: (this project, PIL)}."""
    torch.set_num_threads(1)
    paths = sorted(root.glob("train/*/*.jpg"))[:32]
    tensors, pictures = [decode(p) for p in paths], [Image.open(p).convert("RGB") for p in paths]
    parts = {"decode": (seconds(decode, paths), seconds(lambda p: Image.open(p).convert("RGB"), paths))}

    boxes = (
        torch.stack(augment.draw_boxes(2, *tensors[0].shape[1:], 0.08, generator(0)), dim=1).int().tolist()
    )
    views = [pil_parts(v, *IMAGENET_STATS) for v in configs(size)]

    def pil(part, pictures):
        return seconds(lambda image: [view[part](image) for view in views], pictures)

    parts["crop"] = seconds(lambda x: [crop(x, box, size) for box in boxes], tensors), pil("crop", pictures)
    crops = torch.stack([crop(x, boxes[0], size) for x in tensors])
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in crops]
    timed = []
    blurs = [v.blur_p for v in configs(size)]
    for jitter_p, grey_p, blur_p in ((0.8, 0.2, (0, 0)), (0, 0, blurs), (0, 0, (0, 0))):
        own = [ViewConfig(size, jitter_p=jitter_p, grey_p=grey_p, blur_p=b) for b in blur_p]

        def both(x, own=own):
            for v in own:
                augment.make_view(x, augment.draw(v, len(x), None, None, generator(1)), v, *IMAGENET_STATS)

        timed.append(seconds(both, [crops]) / len(crops))
    plain = timed[2]
    parts["colour"] = timed[0] - plain, pil("colour", pictures)
    parts["blur"] = timed[1] - plain, pil("blur", pictures)
    parts["flip, solarise, float, normalise"] = plain, pil("rest", pictures)
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--threads", type=int, default=1, help="of the main process, beside the workers")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = distributed.start("auto").device
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_files(root, args.images, args.width, args.height)
        contenders = {
            "ImageFolder, PIL, DataLoader": theirs(root, args, device),
            "this project": ours(root, args, device),
            "this project, --cache DIR": ours(root, args, device, "--cache", f"{folder}/cache"),
        }
        times = in_turn(device, contenders, args.rounds)  # a round before starts the workers
        parts = time_parts(root, args.image_size)
    print(
        f"{args.images} JPEG files of {args.width}x{args.height}, two views of {args.image_size} px, batch "
        f"{args.batch_size}"
    )
    print(
        f"{args.workers} workers, {args.threads} thread(s) beside them, {os.cpu_count()} cores, "
        f"{device.type}, {args.rounds} rounds"
    )
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    count = args.images // args.batch_size * args.batch_size
    rates = {name: count / statistics.median(found) for name, found in times.items()}
    for name, rate in rates.items():
        print(f"{name:32}{rate:8.0f} images/s{rate / rates['ImageFolder, PIL, DataLoader']:7.2f}x")
    print(f"\n{'ms per image, one core':36}{'this project':>14}{'PIL':>8}")
    for name, (own, pil) in parts.items():
        print(f"{name:36}{own:14.2f}{pil:8.2f}")


if __name__ == "__main__":
    main()
