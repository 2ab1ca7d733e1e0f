"""Image files: finding them below a folder, and decoding one."""

import hashlib
import io
import os
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data import DataError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29, and to be removed in favour of a package of its own
    decode_jpeg = None

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
CHUNK = 256  # images read at a time, so that what waits stays small
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # far larger images are refused


class Files:
    """Image files that are decoded when they are needed, or read from a cache of them (data/cache.py).

    root: their folder; names: their paths below it, as strings or as the array of bytes that is kept here: a
    list of a million strings would be copied, page by page, into every worker process.
    """

    def __init__(self, root, names, cache=None):
        self.root, self.cache = Path(root), cache
        self.names = (
            names
            if isinstance(names, np.ndarray)
            else np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        )

    def __len__(self):
        return len(self.names)

    def __getitem__(self, indices):
        """The chosen files, from an int64 tensor or array."""
        rows = np.asarray(indices)
        return Files(self.root, self.names[rows], None if self.cache is None else self.cache[rows])

    def path(self, i):
        return self.root / os.fsdecode(bytes(self.names[i]))

    def decode(self, i):
        """uint8 [3, H, W], RGB, upright. Raises DataError if the file cannot be read."""
        image = None if self.cache is None else self.cache.image(i)
        return decode(self.path(i)) if image is None else image

    def checksum(self):
        """Of the names."""
        return zlib.crc32(b"\n".join(self.names.tolist()))

    def fingerprint(self):
        """Hexadecimal; changes whenever a file is added, removed, renamed, or written."""
        digest = hashlib.sha256()
        for i, name in enumerate(self.names.tolist()):
            try:
                status = os.stat(self.path(i))
                digest.update(b"%s|%d|%d\n" % (name, status.st_size, status.st_mtime_ns))
            except OSError:
                digest.update(name)  # what decodes it will say why
        return digest.hexdigest()


def decode(path):
    """uint8 [3, H, W], RGB, upright, in the memory format channels_last. Raises DataError if the file cannot
    be read."""
    try:
        return decode_bytes(np.fromfile(path, np.uint8))
    except Exception as error:  # Pillow promises no set of exceptions
        raise DataError(
            f"cannot decode {path} ({describe(error)}): replace or remove it, or pass --skip_corrupt"
        ) from error


def decode_bytes(data):
    """`decode` of a file's contents, uint8 [bytes]; raises whatever Pillow raises.

    torchvision, where it can, reads JPEG files faster than Pillow and to the same bits; Pillow reads the
    rest, and has the last word on files that torchvision refuses.
    """
    if not len(data):
        raise EOFError("the file is empty")
    if decode_jpeg is not None and data[:2].tobytes() == b"\xff\xd8":
        try:
            return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            pass
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def describe(error):
    """Why a file could not be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).split("\n")[0] or type(error).__name__


def bar(*iterable, **options):
    """tqdm for a terminal; elsewhere a line now and then, and none for what is quickly done."""
    terminal = sys.stderr.isatty()
    return tqdm(
        *iterable, **options, delay=0 if terminal else 30, mininterval=0.1 if terminal else 30, maxinterval=60
    )


def in_parallel(function, count, description):
    """Yields function(i) for i < count, in order, from a pool of threads, behind a progress bar.

    The decoders let go of the interpreter lock. Some hundreds of results at a time are in memory.
    """
    threads = torch.get_num_threads()
    progress = bar(desc=description, total=count, unit="image")
    try:
        with (
            progress,
            ThreadPoolExecutor(default_workers(), initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for start in range(0, count, CHUNK):
                for result in pool.map(function, range(start, min(start + CHUNK, count))):
                    yield result
                    progress.update()
    finally:
        torch.set_num_threads(threads)  # the pool's setting would reach every thread that is started after it


def to_rgb(image):
    """The Pillow image as RGB: turned as EXIF says, 16 bits brought to 8, transparency left out. Raises
    ValueError for numbers of an unknown range."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits or more, which convert would clip at 255
        pixels = np.asarray(image)
        wide = image.mode != "I" or pixels.max() > 255
        image = Image.fromarray((pixels >> 8 if wide else pixels).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def list_images(root, folders=None, strict=True):
    """The names of all images below root (or below these folders of it), sorted folder by folder; hidden ones
    are passed over.

    Raises DataError if there is no such folder, no image at all, a folder that cannot be read or that is met
    twice and, if strict, a folder with neither images nor folders in it.
    """

    def stop(error):
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no folder {root}: expected one folder of images per class in it; check --data_dir")
    names, met = [], set()
    for place in [root] if folders is None else [root / folder for folder in folders]:
        for folder, inner, files in os.walk(place, followlinks=True, onerror=stop):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in met:
                raise DataError(f"{folder} is a link to a folder that is read already: remove it")
            met.add((status.st_dev, status.st_ino))
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            images = sorted(f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
            if strict and not images and not inner and Path(folder) != root:
                raise DataError(
                    f"class folder {folder} holds no images (PNG, JPEG, WebP, ...): add some or remove the "
                    "folder"
                )
            prefix = os.path.relpath(folder, root)
            names += images if prefix == "." else [f"{prefix}/{name}" for name in images]
    if not names:
        raise DataError(
            f"{root} holds no class folders and no images: expected {root}/<class>/<image>.png or .jpg"
        )
    return names


def list_classes(root, folders=None):
    """root/<class>/<image>: the names of the images, their labels (int64 [N]) and the sorted class names.

    folders: the classes that are wanted, where not all are. Raises DataError where images lie elsewhere than
    in class folders.
    """
    names = list_images(root, folders)
    parts = [name.split("/") for name in names]
    odd = next((name for name, p in zip(names, parts) if len(p) != 2), None)
    if odd is not None:
        raise DataError(f"{Path(root) / odd} does not lie in a class folder: expected {root}/<class>/<image>")
    classes = sorted({p[0] for p in parts})
    number = {name: label for label, name in enumerate(classes)}
    return names, torch.tensor([number[p[0]] for p in parts]), classes


def default_workers():
    """Processes that decode, so that all ranks of this machine together use its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
