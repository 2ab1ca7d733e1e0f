"""Made-up data sets in the layouts of the real ones: JPEG and other files of several sizes and modes."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from data.datasets import DOMAINS

ROOT = Path(__file__).resolve().parent.parent


def picture(seed, height=40, width=50):
    """A smooth random colour image with some noise, like a photograph to an encoder."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), dtype=float)
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def encode(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def odd_files():
    """Bytes of one image of every kind that a real collection holds."""
    turned = Image.Exif()
    turned[274] = 6
    image = picture(0)
    return [
        encode(image),
        encode(picture(1, 64, 33), quality=60, progressive=True),
        encode(image.convert("L")),
        encode(image.convert("CMYK")),
        encode(picture(2), exif=turned),
        encode(image.quantize(16), "PNG"),
        encode(image.convert("RGBA"), "PNG"),
        encode(picture(3, 30, 90), subsampling=0),
    ]


def fill(root, folders, count, seed=0, suffix=".JPEG"):
    """`count` files in each folder below root, taking turns with odd_files; links of them, to be made
    quickly."""
    pool = root / ".pool"
    pool.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(odd_files()):
        if not (pool / str(i)).exists():
            (pool / str(i)).write_bytes(data)
    number = seed
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            os.link(pool / str(number % 8), root / folder / f"{i}{suffix}")
            number += 1
    return root


def wordnet_ids(count):
    return [f"n{i:08d}" for i in range(count)]


def imagenet(root, names, train=2, test=1):
    fill(root, [f"train/{name}" for name in names], train)
    return fill(root, [f"val/{name}" for name in names], test, seed=3)


def domainnet(root, classes=4, train=3, test=2, domains=DOMAINS):
    """DIR/<domain>/<class>/<image> with its two lists."""
    for domain in domains:
        fill(root, [f"{domain}/class{c}" for c in range(classes)], train + test, suffix=".jpg")
        for split, files in (("train", range(train)), ("test", range(train, train + test))):
            lines = [f"{domain}/class{c}/{i}.jpg {c}\n" for c in range(classes) for i in files]
            (root / f"{domain}_{split}.txt").write_text("".join(lines))
    return root
