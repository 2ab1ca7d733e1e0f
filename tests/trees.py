"""Made-up data sets in the layouts of the real ones: JPEG and other files of several sizes and modes."""

import io
import json
import os
from itertools import product

import numpy as np
from conftest import ROOT
from PIL import Image

from data.datasets import DOMAINS

IMAGENET100 = (ROOT / "data" / "imagenet100_classes.txt").read_text()


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(seed, height=40, width=50):
    """A smooth random colour image, like a photograph to an encoder."""
    coarse = Image.fromarray(numbers(height // 8 + 2, width // 8 + 2, 3, seed=seed))
    return coarse.resize((width, height), Image.BICUBIC)


def encode(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def odd_files():
    """Bytes of one image of every kind that a real collection holds."""
    image, turned = picture(0), Image.Exif()
    turned[274] = 6
    files = [encode(image), encode(picture(1, 64, 33), quality=60, progressive=True)]
    files += [encode(image.convert("L")), encode(image.convert("CMYK")), encode(picture(2), exif=turned)]
    files += [encode(image.quantize(16), "PNG"), encode(image.convert("RGBA"), "PNG")]
    files += [encode(Image.new("P", (50, 40), 3), "PNG", transparency=b"\x00\x10")]
    return files + [encode(picture(3, 30, 90), subsampling=0), encode(picture(4)), encode(picture(5))]


def fill(root, *levels, count, suffix=".JPEG"):
    """`count` images, links of odd_files, in each folder below root. levels: the folders' names on each."""
    (root / ".pool").mkdir(parents=True, exist_ok=True)
    pool = [root / ".pool" / str(number) for number in range(11)]
    for path, content in zip(pool, odd_files(), strict=True):
        path.write_bytes(content)
    for number, folder in enumerate(product(*(names.split() for names in levels))):
        root.joinpath(*folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            os.link(pool[(number * count + i) % 11], root.joinpath(*folder, f"{i}{suffix}"))
    return root


def small(root, classes, count):
    """train/<class>/ and test/<class>/ with images of 8x8 pixels: a CIFAR in folders."""
    for i, (split, label, n) in enumerate(product(("train", "test"), range(classes), range(count))):
        (root / split / f"{label:03d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers(8, 8, 3, seed=i)).save(root / split / f"{label:03d}" / f"{n}.png")
    return root


def spoil(path, content=b"no image"):
    """Puts other bytes into the place of a file, which may be a link; returns what was there."""
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return whole


def no_pictures(patch):
    """Pictures of the results, which take longer than tiny runs, are left empty."""
    for name in ("plot_matrix", "plot_spectrum", "save"):
        patch.setattr(f"utils.plots.{name}", lambda *_: None)
    patch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", lambda *_: None)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def domainnet(root, classes=4, train=3, test=2, domains=DOMAINS):
    """DIR/<domain>/<class>/<image> with its two lists; returns DIR."""
    names = [f"class{c}" for c in range(classes)]
    fill(root, " ".join(domains), " ".join(names), count=train + test, suffix=".jpg")
    for domain, split in product(domains, ("train", "test")):
        numbers = range(train) if split == "train" else range(train, train + test)
        lines = [f"{domain}/{name}/{i}.jpg {c}\n" for c, name in enumerate(names) for i in numbers]
        (root / f"{domain}_{split}.txt").write_text("".join(lines))
    return root
