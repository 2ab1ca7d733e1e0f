"""Images of different sizes: worker processes decode them and cut their crops, everything else happens on the
device."""

import ctypes
import signal
import sys
from collections import deque
from multiprocessing.util import Finalize

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from data import DataError, augment
from data.loader import EVALUATION_BATCH, Loader, generator, probe_view

CHUNK = 16  # images held decoded at a time
TIMEOUT = 600  # seconds that a batch may take
OPEN = (
    set()
)  # the Streams that are not closed: held here, since Python would wait for ever for a worker that it forgot
EVALUATION_SCALE = (
    256 / 224
)  # evaluation sees the centre of an image whose short side is this many times the crop's


class Crops(Dataset):
    """What a worker makes of a request (indices, key): uint8 [n, V, 3, S, S] of n files, and what could not
    be read.

    With a key (integers: seed, task, epoch) these are V random resized crops for the two views, which depend
    on the key and on the sample and on nothing else; without one V is 1, the centre. A file that cannot be
    read has the crops of the next one that can, and stands in the dict {index: why}.
    """

    def __init__(self, files, size, min_scales=(1.0,)):
        self.files, self.size, self.min_scales = files, size, min_scales

    def __getitem__(self, request):
        indices, key = request
        views = 1 if key is None else len(self.min_scales)
        crops = torch.zeros(len(indices), views, 3, self.size, self.size, dtype=torch.uint8)
        if torch.utils.data.get_worker_info() is not None:
            crops.share_memory_()  # so that it reaches the main process without a copy
        unreadable = {}
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK].tolist()
            images = [self.decode(i, unreadable) for i in chunk]
            height, width = torch.tensor(
                [(0, 0) if x is None else x.shape[1:] for x in images], dtype=torch.float32
            ).T
            for v in range(views):
                boxes = (
                    centre_boxes(height, width)
                    if key is None
                    else self.random_boxes(key, v, chunk, height, width)
                )
                for n, (image, box) in enumerate(zip(images, torch.stack(boxes, dim=1).int().tolist())):
                    if image is not None:
                        crops[start + n, v] = crop(image, box, self.size)
        if unreadable:
            good = [n for n, i in enumerate(indices.tolist()) if i not in unreadable]
            for n, i in enumerate(indices.tolist()):
                if i in unreadable and good:
                    crops[n] = crops[next((g for g in good if g > n), good[0])]
        return crops, unreadable

    def decode(self, i, unreadable):
        try:
            return self.files.decode(i)
        except DataError as error:
            unreadable[i] = str(error)

    def random_boxes(self, key, view, indices, height, width):
        u = torch.stack(
            [torch.rand(4, augment.CROP_TRIES, generator=generator(*key, view, i)) for i in indices], dim=1
        )
        return augment.boxes(u, height, width, self.min_scales[view])


def crop(image, box, size):
    """The box (top, left, height, width) of a uint8 [3, H, W], resized: uint8 [3, size, size]. Antialiased
    bicubic."""
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width].unsqueeze(0)
    return F.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]


def centre_boxes(height, width):
    """The largest centred squares, without the border that EVALUATION_SCALE leaves out."""
    side = (torch.minimum(height, width) / EVALUATION_SCALE).round()
    return ((height - side) / 2).floor(), ((width - side) / 2).floor(), side, side


class Requests:
    """The DataLoader's sampler: gives out the requests of the next round."""

    next = ()

    def __iter__(self):
        return iter(self.next)


class Stream:
    """A pool of workers that turns requests into crops on the device, in order, prefetching.

    skipped: {index: why} of files that could not be read, if they may be skipped; else the first one raises
    DataError.
    """

    def __init__(self, crops, workers, device, skip_corrupt=False, persistent=True):
        self.files, self.device, self.skip_corrupt = crops.files, device, skip_corrupt
        self.requests, self.skipped, self.iterator = Requests(), {}, None
        OPEN.add(self)
        self.loader = DataLoader(
            crops,
            batch_size=None,
            sampler=self.requests,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=device.type == "cuda",
            timeout=TIMEOUT if workers else 0,
            worker_init_fn=prepare_worker,
            multiprocessing_context="fork"
            if workers and sys.platform == "linux"
            else None,  # the files are not copied
            generator=torch.Generator(),  # so that PyTorch's own one stays untouched
        )

    def batches(self, requests, some=False):
        """Yields uint8 [n, V, 3, S, S] on the device for every request; some: raises DataError where none can
        be read."""
        self.requests.next = requests
        self.iterator = iter(self.loader)
        for crops, unreadable in self.iterator:
            for i, reason in unreadable.items():
                self.skip(i, reason)
            if some and len(unreadable) == len(crops):
                raise DataError(f"{reason}; nor can any other image of its batch be read: is the disk there?")
            yield crops.to(self.device, non_blocking=True)

    def close(self):
        """Ends the worker processes."""
        OPEN.discard(self)
        if self.loader.num_workers and self.iterator is not None:
            self.iterator._shutdown_workers()  # PyTorch has no public way
            for worker in self.iterator._workers:
                worker.kill()

    def skip(self, i, reason):
        if not self.skip_corrupt:
            raise DataError(reason)
        if i not in self.skipped:
            print(f"warning: skipped: {reason}", file=sys.stderr)
        self.skipped[i] = reason


class StreamLoader(Loader):
    """A Loader whose images are the crops that a Stream yields."""

    @property
    def skipped(self):
        return self.images.skipped

    def views_and_indices(self, epoch, first_step):
        key, requested = (self.seed, self.task, epoch), deque()  # requests run ahead of the crops that come

        def requests():
            for batch in self.batches(epoch, first_step):
                requested.append(batch)
                yield batch, key

        for step, crops in enumerate(self.images.batches(requests(), some=True), first_step):
            yield self.augment(crops.transpose(0, 1), epoch, step), requested.popleft()


def evaluation_stream(
    images, share, size, mean, std, key, device, workers, skip_corrupt=False, batch_size=EVALUATION_BATCH
):
    """evaluation_batches for a slice of an ImageSet of files: the centre of each, or a random view. One that
    is skipped loses its label."""
    view = probe_view(size)
    stream = Stream(
        Crops(images.images, size, [view.min_scale]), workers, device, skip_corrupt, persistent=False
    )
    requests = ((part, key) for part in torch.arange(share.start, share.stop).split(batch_size))
    try:
        for number, crops in enumerate(stream.batches(requests), share.start // batch_size):
            if key is None:
                x = augment.normalize(crops[:, 0].float().div_(255), mean, std)
                yield x.contiguous(memory_format=torch.channels_last)
            else:
                params = augment.draw(view, len(crops), None, None, generator(*key, number))
                yield augment.make_view(crops[:, 0], params, view, mean, std)
    finally:
        stream.close()
    images.labels[list(stream.skipped)] = -1


def close_all():
    """Ends the worker processes of all Streams."""
    for stream in list(OPEN):
        stream.close()


Finalize(None, close_all, exitpriority=100)  # before multiprocessing waits for workers, which take no SIGTERM


def prepare_worker(worker):
    """A worker leaves signals to the main process, which could not save without it where a batch system sends
    them to all; and it ends with the main process, however that ends, lest it hold the lock of the run
    folder."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
