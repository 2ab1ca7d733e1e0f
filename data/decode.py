"""Class folders of small images, decoded once and kept as one uint8 array file."""

import contextlib
import hashlib
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data import DataError

SUFFIXES = {".png", ".jpg", ".jpeg"}


def load_folder(root, cache_dir=None):
    """Reads root/<class>/*.png|jpg, all of one size.

    Returns images uint8 [N, 3, H, W], labels int64 [N] and the sorted class names. The decoded array is kept in
    cache_dir, or beside the data; a cache that does not fit the files, or is damaged, is made again.
    """
    root = Path(root)
    paths, labels, classes = list_images(root)
    digest = _fingerprint(root, paths)
    cache = _cache_file(root, cache_dir)
    images = _read_cache(cache, digest)
    if images is None:
        images = _decode(paths, f"decoding {root}")
        _write_cache(cache, images, digest)
    return torch.from_numpy(images), torch.tensor(labels), classes


def list_images(root):
    """All images under root/<class>/, in sorted order: paths, labels, class names."""
    if not root.is_dir():
        raise DataError(f"no folder {root}: expected one folder of images per class in it; check --data_dir")
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise DataError(f"{root} holds no class folders: expected {root}/<class>/<image>.png or .jpg")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (root / name).iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not found:
            raise DataError(f"class folder {root / name} holds no PNG or JPEG images: add some or remove the folder")
        paths += found
        labels += [label] * len(found)
    return paths, labels, classes


def _decode(paths, description):
    """uint8 [N, 3, H, W], read by a pool of threads (Pillow's decoders let go of the interpreter lock)."""
    height, width, _ = _read(paths[0]).shape
    images = np.empty((len(paths), 3, height, width), dtype=np.uint8)

    def fill(i):
        image = _read(paths[i])
        if image.shape != (height, width, 3):
            raise DataError(
                f"{paths[i]} is {image.shape[1]}x{image.shape[0]} pixels where {paths[0]} is {width}x{height}: resize one"
            )
        images[i] = image.transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in tqdm(pool.map(fill, range(len(paths))), description, len(paths), unit="image", disable=None):
                pass
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def _read(path):
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode {path} ({type(error).__name__}): replace or remove it") from error


def _fingerprint(root, paths):
    """Changes whenever a file is added, removed, renamed, or written."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(root)}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cache_file(root, cache_dir):
    if cache_dir is None:
        return root.parent / f".{root.name}_uint8.npz"
    # two data sets may share a cache folder: the name tells them apart
    place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return Path(cache_dir) / f"{root.name}_{place}_uint8.npz"


def _read_cache(cache, digest):
    """The cached array, or None where there is none to trust: the archive's checksums guard the contents."""
    try:
        with np.load(cache, allow_pickle=False) as saved:
            return saved["images"] if str(saved["digest"]) == digest else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"warning: cache {cache} is damaged ({type(error).__name__}) and is made again", file=sys.stderr)
        return None


def _write_cache(cache, images, digest):
    """Written beside and renamed, so that another process sees all of it or nothing."""
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, images=images, digest=np.array(digest))
        os.replace(temporary, cache)
    except OSError as error:
        print(f"warning: cannot write {cache} ({error.strerror}): decoding again next time; --cache_dir names another place",
              file=sys.stderr)  # fmt: skip
        with contextlib.suppress(OSError):
            temporary.unlink()
