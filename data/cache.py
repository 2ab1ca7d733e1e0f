"""One file with all images of a list, decoded once, that every process maps into its memory.

The file holds a header with the fingerprint of the images, a table int64 [N, 3] of offset, height and width,
and the pixels.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import DataError
from data.files import decode, in_parallel

MAGIC = b"cssl images 1\n"
HEADER = len(MAGIC) + 64 + 8 + 8  # the fingerprint, the number of images, the checksum of the pixels
RAM = Path("/dev/shm")


class Cache:
    """An open cache: `image(i)` is uint8 [3, H, W] in channels_last order, not copied; None for a file that
    was not readable."""

    def __init__(self, path, pixels, table):
        self.path, self.pixels, self.table = path, pixels, table

    def __getitem__(self, rows):
        return Cache(self.path, self.pixels, self.table[rows])

    def __getstate__(self):  # a process that is not a fork maps the file itself
        return {"path": self.path, "table": self.table, "size": len(self.pixels)}

    def __setstate__(self, state):
        self.path, self.table, mapped = state["path"], state["table"], _map(state["path"])
        self.pixels = mapped[len(mapped) - state["size"] :]

    def readable(self):
        """int64 indices of the images that could be read."""
        return torch.from_numpy(self.table[:, 1].nonzero()[0])

    def require(self, files, skip_corrupt):
        """Raises DataError, or warns with skip_corrupt, for each file that could not be read."""
        for i in (self.table[:, 1] == 0).nonzero()[0]:
            try:
                files.decode(i)
            except DataError as error:
                if not skip_corrupt:
                    raise
                print(f"warning: skipped: {error}", file=sys.stderr)

    def image(self, i):
        offset, height, width = self.table[i].tolist()
        if height == 0:
            return None
        return self.pixels[offset : offset + 3 * height * width].view(height, width, 3).permute(2, 0, 1)


def location(files, name, side, data_dir, cache_dir=None):
    """Where the cache of these files is kept: in cache_dir, or else in data_dir. Other lists of files get
    other names."""
    place = "" if cache_dir is None else f"{os.getuid()}|{files.root.resolve()}"
    key = hashlib.sha256(f"{place}|{files.root.name}|{files.checksum()}|{len(files)}".encode()).hexdigest()[
        :12
    ]
    size = "" if side is None else f"_{side}px"
    return Path(cache_dir or data_dir) / f".{name}{size}_{key}.cache"


def add_cache(files, name, args):
    """Gives Files the cache that --cache asks for; "ram" is a file in the machine's memory, to be forgotten
    once all processes have opened it. Raises DataError where it cannot be written."""
    folder = RAM if args.cache == "ram" else args.cache_dir
    if args.cache == "ram" and not RAM.is_dir():
        raise DataError(f"--cache ram: this machine has no {RAM}: use --cache disk")
    path = location(files, name, args.cache_size, args.data_dir, folder)
    try:
        files.cache = open_cache(files, path, args.cache_size, args.skip_corrupt)
    except OSError as error:
        raise DataError(
            f"--cache {args.cache}: cannot write {path}: {error.strerror}; --cache_dir names another place"
        ) from error
    files.cache.require(files, args.skip_corrupt)


def forget(files):
    """Removes a cache in memory, which lives on as long as a process has it open."""
    if files.cache is not None and files.cache.path.parent == RAM:
        files.cache.path.unlink(missing_ok=True)
        lock_of(files.cache.path).unlink(missing_ok=True)


def lock_of(path):
    return path.with_name(path.name + ".lock")


def open_cache(files, path, side=None, skip_corrupt=False, verify=False):
    """The Cache of these files at path, made if it is not there or is not theirs.

    side: what larger short sides are reduced to, or None to keep all sizes; verify: compare the checksum of
    all pixels. Of several processes that ask at once, one makes it and the others wait. Raises DataError for
    an image that cannot be decoded (unless skip_corrupt) and OSError where path cannot be written.
    """
    fingerprint = files.fingerprint().encode()
    cache = _read(path, fingerprint, verify)
    if cache is not None:
        return cache
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(lock_of(path)):
        cache = _read(path, fingerprint, verify, quiet=True)  # another process may have made it meanwhile
        if cache is None:
            temporary = path.with_name(path.name + ".tmp")
            try:
                with open(temporary, "wb") as file:
                    _write(file, files, side, fingerprint, skip_corrupt)
                os.replace(temporary, path)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    gigabytes = temporary.stat().st_size / 1e9
                    error.strerror = f"no space left after {gigabytes:.1f} GB"
                raise
            finally:
                temporary.unlink(missing_ok=True)
            cache = _read(path, fingerprint, verify)
    return cache


def open_in_memory(files, name, args):
    """uint8 [N, 3, H, W] of files that are all of one size, kept in a cache where one can be written, and the
    int64 indices [N] of those that could be read: all, unless --skip_corrupt is given."""
    path = location(files, name, None, args.data_dir, args.cache_dir)
    try:
        cache = open_cache(files, path, skip_corrupt=args.skip_corrupt, verify=True)
    except OSError as error:
        print(f"warning: cannot write {path} ({error.strerror}): decoding again next time; --cache_dir names "
              "another place",
              file=sys.stderr)  # fmt: skip
        cache = passing_cache(files, args.skip_corrupt)
    cache.require(files, args.skip_corrupt)
    readable = cache.readable()
    if not len(readable):
        raise DataError(f"no image of {files.root} can be read")
    sizes = cache.table[readable.numpy(), 1:]
    height, width = Counter(map(tuple, sizes.tolist())).most_common(1)[0][0]
    odd = (sizes != (height, width)).any(axis=1).nonzero()[0]
    if len(odd):
        h, w = sizes[odd[0]]
        raise DataError(
            f"{files.path(readable[odd[0]])} is {w}x{h} pixels where others are {width}x{height}: resize it"
        )
    return cache.pixels.view(len(readable), height, width, 3).permute(0, 3, 1, 2).contiguous(), readable


def passing_cache(files, skip_corrupt):
    """A Cache that is gone when this process ends, for files whose cache cannot be kept."""
    with tempfile.TemporaryDirectory() as folder:
        return open_cache(
            files, Path(folder) / "cache", skip_corrupt=skip_corrupt
        )  # an open file stays readable when its folder goes


@contextlib.contextmanager
def _lock(path):
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"waiting for another process that decodes the same images (it holds {path})", file=sys.stderr
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(file, files, side, fingerprint, skip_corrupt):
    def load(i):
        try:
            return _shrink(decode(files.path(i)), side).permute(1, 2, 0).contiguous().numpy()
        except DataError:
            if skip_corrupt:
                return np.zeros((0, 0, 3), np.uint8)
            raise

    table = np.zeros((len(files), 3), np.int64)
    file.write(b"\0" * (HEADER + table.nbytes))
    offset, checksum = 0, 0
    for i, pixels in enumerate(in_parallel(load, len(files), f"decoding {files.root}")):
        table[i] = offset, *pixels.shape[:2]
        file.write(pixels)
        offset, checksum = offset + pixels.nbytes, zlib.crc32(pixels, checksum)
    file.seek(0)
    file.write(MAGIC + fingerprint + np.array([len(files), checksum], np.int64).tobytes() + table.tobytes())
    file.flush()
    os.fsync(file.fileno())


def _shrink(image, side):
    """With its short side resized to `side` pixels; smaller images are left as they are."""
    height, width = image.shape[1:]
    if side is None or min(height, width) <= side:
        return image
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    return F.interpolate(image.unsqueeze(0), size, mode="bicubic", antialias=True)[0]


def _read(path, fingerprint, verify, quiet=False):
    """The Cache at path, or None where there is none, or one of other files, or one that is damaged."""
    try:
        mapped = _map(path)
        header = mapped[:HEADER].numpy().tobytes()
        if header.startswith(MAGIC) and not header.startswith(MAGIC + fingerprint):
            return None  # the files have changed
        if not header.startswith(MAGIC):
            raise ValueError("no header")
        count, checksum = np.frombuffer(header[-16:], np.int64).tolist()
        table = np.frombuffer(mapped[HEADER : HEADER + 24 * count].numpy().tobytes(), np.int64).reshape(-1, 3)
        pixels = mapped[HEADER + 24 * count :]
        if len(table) != count or len(pixels) != 3 * (table[:, 1] * table[:, 2]).sum():
            raise ValueError("cut short")
        if verify and zlib.crc32(pixels.numpy()) != checksum:
            raise ValueError("checksum")
    except OSError:
        return None
    except ValueError:
        if not quiet:
            print(f"warning: cache {path} is damaged and is made again", file=sys.stderr)
        return None
    return Cache(path, pixels, table)


def _map(path):
    """The file as uint8 [bytes]. A private mapping: one that can be written, as PyTorch wants it, without
    changing the file."""
    size = os.stat(path).st_size
    if size < HEADER or not path.is_file():
        raise ValueError("no cache")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
