"""All images of a list decoded once: a raw file of pixels that every process maps, and its index beside
it."""

import errno
import fcntl
import hashlib
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.files import decode_all, warn_or_raise
from utils import UserError


class Cache:
    """`image(i)` is uint8 [3, H, W] in channels_last order, not copied; None for a file that was not
    readable. table: int64 [N, 3], offset in the file at path, height and width of each image."""

    def __init__(self, path, table):
        self.path, self.table = path, table
        # mapped as a private copy, which can be written, as PyTorch wants it, without changing the file
        mapped = np.memmap(path, np.uint8, "c") if table.any() else np.empty(0, np.uint8)
        self.pixels = torch.from_numpy(mapped)

    def __reduce__(self):  # a worker process that is not a fork maps the file itself
        return Cache, (self.path, self.table)

    def __getitem__(self, rows):
        return Cache(self.path, self.table[rows])

    def image(self, i):
        offset, height, width = self.table[i].tolist()
        if height == 0:
            return None
        return self.pixels[offset : offset + 3 * height * width].view(height, width, 3).permute(2, 0, 1)


def open_cache(files, name, folder, side=None, skip_corrupt=False):
    """The Cache of these Files in the folder, made if it is not there or if the files have changed. side:
    what larger short sides are reduced to, or None to keep all sizes. Of several processes that ask at once,
    one makes it and the others wait. Raises UserError for an image that cannot be decoded (unless
    skip_corrupt) and where the folder cannot be written."""
    key = hashlib.sha256(f"{files.root.resolve()}|{files.checksum()}".encode()).hexdigest()[:12]
    path = Path(folder) / (f"{name}_{key}.raw" if side is None else f"{name}_{side}px_{key}.raw")
    fingerprint = files.fingerprint()
    try:
        table = read_index(path, fingerprint)
        if table is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                table = read_index(path, fingerprint, True)  # another process may have made it meanwhile
                if table is None:
                    table = write(path, files, side, fingerprint, skip_corrupt)
    except OSError as error:
        why = "no space left" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"--cache {folder}: cannot write {path}: {why}; choose another place") from error
    return Cache(path, table)


def read_index(path, fingerprint, warn=False):
    """The table of the cache at path; None where there is none, or one of other files or of another size."""
    index = path.with_suffix(".npz")
    try:
        with np.load(index, allow_pickle=False) as saved:
            if str(saved["fingerprint"]) != fingerprint:
                return None
            table = saved["table"]
        if os.path.getsize(path) == 3 * (table[:, 1] * table[:, 2]).sum():
            return table
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile):
        pass
    if warn:
        print(f"warning: cache {path} is damaged and is made again", file=sys.stderr)
    return None


def write(path, files, side, fingerprint, skip_corrupt):
    """Makes the cache, the index last; returns its table."""
    table, offset = np.zeros((len(files), 3), np.int64), 0
    partial, index = path.with_suffix(".raw.tmp"), path.with_suffix(".tmp.npz")
    try:
        with open(partial, "wb") as file:
            pixels = decode_all(files, "decoding", lambda x: shrink(x, side).permute(1, 2, 0).numpy())
            for i, image in enumerate(pixels):
                if isinstance(image, UserError):  # with skip_corrupt whoever uses the images will say it
                    if not skip_corrupt:
                        warn_or_raise(str(image), False)
                    continue
                table[i] = offset, *image.shape[:2]
                offset += file.write(np.ascontiguousarray(image).data)
            file.flush()
            os.fsync(file.fileno())
        np.savez(index, table=table, fingerprint=fingerprint)
        os.replace(partial, path)
        os.replace(index, path.with_suffix(".npz"))
    finally:
        partial.unlink(missing_ok=True), index.unlink(missing_ok=True)
    return table


def shrink(image, side):
    """With its short side resized to `side` pixels; smaller images are left as they are."""
    height, width = image.shape[1:]
    if side is None or min(height, width) <= side:
        return image
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    return F.interpolate(image.unsqueeze(0), size, mode="bicubic", antialias=True)[0]
