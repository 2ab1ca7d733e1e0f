"""Image files: finding them below a folder, and decoding them."""

import contextlib
import hashlib
import io
import os
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data import default_workers
from utils import UserError
from utils.log import bar

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
    list of a million strings would be copied, page by page, into every worker process."""

    def __init__(self, root, names, cache=None):
        self.root, self.cache, array = Path(root), cache, isinstance(names, np.ndarray)
        self.names = names if array else np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, indices):
        """The chosen files, from an int64 tensor or array."""
        rows = np.asarray(indices)
        return Files(self.root, self.names[rows], None if self.cache is None else self.cache[rows])

    def path(self, i):
        return self.root / os.fsdecode(bytes(self.names[i]))

    def decode(self, i):
        """uint8 [3, H, W], RGB, upright. Raises UserError if the file cannot be read."""
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
    """uint8 [3, H, W], RGB, upright, in the memory format channels_last. Raises UserError if it cannot be
    read. torchvision, where it can, reads JPEG files faster than Pillow and to the same bits; Pillow reads
    the rest, and has the last word on files that torchvision refuses."""
    try:
        data = np.fromfile(path, np.uint8)
        if decode_jpeg is not None and data[:2].tobytes() == b"\xff\xd8":
            with contextlib.suppress(RuntimeError):
                return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
    except Exception as error:  # Pillow promises no set of exceptions
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image that Pillow knows"
        raise UserError(f"cannot decode {path} ({reason})") from error


def to_rgb(image):
    """The Pillow image as RGB: turned as EXIF says, 16 bits brought to 8, transparency left out. Raises
    ValueError for numbers of an unknown range."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits or more, which convert would clip at 255
        pixels = np.asarray(image)
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 65535:
            raise ValueError("pixels outside 0 to 65535, whose range is not known")
        wide = image.mode != "I" or high > 255
        image = Image.fromarray((pixels >> 8 if wide else pixels).astype(np.uint8))
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def decode_all(files, title, convert=lambda image: image):
    """Yields convert(image) of every file in order, or the UserError of one that cannot be read, from a pool
    of threads (the decoders let go of the interpreter lock), behind a progress bar."""

    def load(i):
        try:
            return convert(files.decode(i))
        except UserError as error:
            return error

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(default_workers(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool, bar(desc=f"{title} {files.root}", total=len(files), unit="image") as progress:
            for start in range(0, len(files), CHUNK):
                for result in pool.map(load, range(start, min(start + CHUNK, len(files)))):
                    yield result
                    progress.update()
    finally:
        torch.set_num_threads(threads)  # the pool's setting would reach every thread that is started after it


def warn_or_raise(why, skip_corrupt):
    """For a file that cannot be read."""
    if not skip_corrupt:
        raise UserError(f"{why}: replace it, or pass --skip_corrupt")
    print(f"warning: skipped: {why}", file=sys.stderr)


def load_all(files, skip_corrupt, convert=lambda image: image):
    """uint8 [N, 3, H, W] of files that are all of one size once converted, and the int64 indices [N] of those
    that can be read: all, unless skip_corrupt. Raises UserError."""
    images = dict(enumerate(decode_all(files, "decoding", convert)))
    for i, error in [(i, image) for i, image in images.items() if isinstance(image, UserError)]:
        warn_or_raise(str(error), skip_corrupt)
        del images[i]
    if not images:
        raise UserError(f"no image of {files.root} can be read")
    common = Counter(image.shape for image in images.values()).most_common(1)[0][0]
    for i, image in images.items():
        if image.shape != common:
            size, others = (f"{shape[2]}x{shape[1]}" for shape in (image.shape, common))
            raise UserError(f"{files.path(i)} is {size} pixels where others are {others}: resize it")
    return torch.stack(list(images.values())).contiguous(), torch.tensor(list(images))


def list_images(root, folders=None, strict=True):
    """The names of all images below root (or below these folders of it), sorted folder by folder; hidden ones
    are passed over. Raises UserError if there is no such folder, no image at all, a folder that cannot be
    read and, if strict, a folder with neither images nor folders in it."""

    def stop(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    root, names = Path(root), []
    if not root.is_dir():
        advice = "check --data_dir, or --probe_data_dir"
        raise UserError(f"no folder {root}: expected one folder of images per class in it; {advice}")
    for place in [root] if folders is None else [root / folder for folder in folders]:
        for folder, inner, files in os.walk(place, followlinks=True, onerror=stop):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            images = sorted(f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
            if strict and not images and not inner and Path(folder) != root:
                raise UserError(f"class folder {folder} holds no images: add some or remove the folder")
            prefix = os.path.relpath(folder, root)
            names += images if prefix == "." else [f"{prefix}/{name}" for name in images]
    if not names:
        raise UserError(f"{root} holds no images: expected {root}/<class>/<image>.png or .jpg")
    return names


def list_classes(root, folders=None):
    """root/<class>/<image>: the names of the images, their labels (int64 [N]) and the sorted class names.
    folders: the classes that are wanted, where not all are. Raises UserError where images lie elsewhere."""
    names = list_images(root, folders)
    parts = [name.split("/") for name in names]
    for name, part in zip(names, parts):
        if len(part) != 2:
            raise UserError(f"{Path(root) / name} lies in no class folder: expected {root}/<class>/<image>")
    classes = sorted({part[0] for part in parts})
    number = {name: label for label, name in enumerate(classes)}
    return names, torch.tensor([number[part[0]] for part in parts]), classes
