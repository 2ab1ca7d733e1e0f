"""Batches on the device, in an order that is a function of (seed, task, epoch, start) and nothing else.
Images in memory are one gather; those of different sizes are decoded and cropped by worker processes;
everything else happens on the device."""

import signal
import sys
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data import augment
from data.files import warn_or_raise
from utils import UserError
from utils.log import bar
from utils.stop import SIGNALS

EVALUATION_BATCH = 512  # images at a time
EVALUATION_SCALE = 256 / 224  # files are evaluated on the centre of this many times the crop's size
LABELLED, PROBED = 2**32, 2**33  # in place of, or added to, a task's number: other streams of random numbers
CHUNK = 16  # images that a worker holds decoded at a time
TIMEOUT = 600  # seconds that a batch of files may take


def generator(*key):
    """A CPU torch.Generator that depends on all the integers of the key, well mixed."""
    # SeedSequence pads with zeros: the length keeps (seed, task, epoch) apart from (seed, task, epoch, 0)
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class Loader:
    """Serves one task of an ImageSet.

    indices: int64 [n], the task's samples; batch_size: of all ranks together, of which this one gets the
    share rank / world; views: their ViewConfigs. The last incomplete batch of an epoch is dropped. steps: per
    epoch, if not as many as the samples give; the samples then come again, or do not all come. Raises
    UserError if the task is smaller than a batch."""

    def __init__(self, images, indices, batch_size, views, seed, task, rank=0, world=1, workers=0,
                 skip_corrupt=False, steps=None):  # fmt: skip
        if len(indices) < batch_size:
            raise UserError(f"--batch_size {batch_size}: there are only {len(indices)} images: lower it")
        self.images, self.indices, self.batch_size, self.views = images, indices, batch_size, views
        self.seed, self.task, share = seed, task, batch_size // world
        self.share = slice(rank * share, (rank + 1) * share)
        self.steps = steps or len(indices) // batch_size
        self.fetch = fetcher(images, views, workers, skip_corrupt, True)

    def epoch(self, epoch, start=0):
        """Yields ([a float [N/world, 3, S, S] for each view], labels int64 [N/world]) for the steps of an
        epoch from `start` on. A label is -1 where there is none, or for an image that could not be read and
        whose place another has taken. Parameters are drawn for the global batch and sliced: N ranks see what
        one process sees."""
        key, images = (self.seed, self.task, epoch), self.images
        requests = ((batch, key) for batch in self.batches(epoch, start))
        for step, (pixels, labels) in enumerate(self.fetch(requests), start):
            rng, size = generator(*key, step), self.fetch.size
            params = [augment.draw(view, self.batch_size, *size, rng)[self.share] for view in self.views]
            parts = zip(pixels, params, self.views)
            yield [augment.make_view(*part, images.mean, images.std) for part in parts], labels

    def batches(self, epoch, start=0):
        """The indices int64 [N/world] of this rank for each step of an epoch, from `start` on."""
        order = torch.randperm(len(self.indices), generator=generator(self.seed, self.task, epoch))
        whole = len(order) // self.batch_size * self.batch_size
        batches = self.indices[order[:whole]].view(-1, self.batch_size)
        return (batches[step % len(batches)][self.share] for step in range(start, self.steps))


def fetcher(images, *how):
    return Stream(images, *how) if images.streams else Memory(images)


class Memory:
    """Fetches from an ImageSet in memory on the device."""

    def __init__(self, images):
        self.images, self.size = images, images.images.shape[-2:]

    def __call__(self, requests):
        """Yields (for each view the same uint8 [n, 3, H, W], labels [n]) for each request (indices, key)."""
        for indices, _ in requests:
            indices = indices.to(self.images.labels.device, non_blocking=True)
            yield repeat(self.images.images[indices]), self.images.labels[indices]


class Stream:
    """Fetches from an ImageSet of files, by worker processes, in order, prefetching."""

    size = (None, None)  # what comes are crops already

    def __init__(self, images, views, workers, skip_corrupt, training):
        self.images, self.skip_corrupt, self.training = images, skip_corrupt, training
        self.requests = []  # of a pass: what each batch shall hold
        options = {}
        if workers:
            options = {"timeout": TIMEOUT, "persistent_workers": training}
            if sys.platform == "linux":
                options["multiprocessing_context"] = "fork"  # the list of files is not copied
        options |= {"pin_memory": images.labels.device.type == "cuda", "generator": torch.Generator()}
        options |= {"batch_size": None, "sampler": self.requests, "num_workers": workers}
        self.loader = DataLoader(Crops(images.images, views), **options)

    def __call__(self, requests):
        """Yields (uint8 crops [V, n, 3, S, S] on the device, labels [n]) for each request (indices, key)."""
        labels, skipped = self.images.labels, self.images.skipped
        # tensors would be handed over by a thread of this process, which complains where a worker has gone
        self.requests[:] = ((indices.numpy(), key) for indices, key in requests)
        # workers inherit the mask: they leave signals to the main process, which could not save without them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        batches = iter(self.loader)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for crops, indices, unreadable in batches:
            y = labels[indices.to(labels.device, non_blocking=True)]
            for i in sorted(unreadable.keys() - skipped.keys()):
                warn_or_raise(unreadable[i], self.skip_corrupt)
            if unreadable:
                if self.training and len(unreadable) == len(indices):
                    path = self.images.images.path(int(indices[0]))
                    raise UserError(f"no image of a batch can be read, such as {path}: is the disk there?")
                skipped.update(unreadable)
                y[torch.isin(indices, torch.tensor(list(unreadable))).to(y.device)] = -1
            yield crops.to(labels.device, non_blocking=True).transpose(0, 1), y


class Crops(Dataset):
    """What a worker makes of a request (indices [n], key): uint8 [n, V, 3, S, S], the indices, and why files
    could not be read, {index: why}.

    With a key (integers: seed, task, epoch) these are random resized crops for the V views, which depend on
    the key and on the sample and on nothing else; without one the centre, for each view. A file that cannot
    be read has the crops of the next one that can."""

    def __init__(self, files, views):
        self.files, self.views, self.side = files, views, views[0].size

    def __getitem__(self, request):
        indices, key = torch.as_tensor(request[0]), request[1]
        crops = torch.zeros(len(indices), len(self.views), 3, self.side, self.side, dtype=torch.uint8)
        if get_worker_info() is not None:
            crops.share_memory_()  # so that it reaches the main process without a copy
        unreadable = {}
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK].tolist()
            images = [self.decode(i, unreadable) for i in chunk]
            sizes = [(1, 1) if image is None else image.shape[1:] for image in images]
            height, width = torch.tensor(sizes, dtype=torch.float32).T
            for v, view in enumerate(self.views):
                if key is None:
                    boxes = centre_boxes(height, width)
                else:
                    u = [torch.rand(4, augment.CROP_TRIES, generator=generator(*key, v, i)) for i in chunk]
                    boxes = augment.boxes(torch.stack(u, dim=1), height, width, view.min_scale)
                found = zip(images, torch.stack(boxes, dim=1).int().tolist())
                for n, (image, box) in enumerate(found, start):
                    if image is not None:
                        crops[n, v] = crop(image, box, self.side)
        good = [n for n, i in enumerate(indices.tolist()) if i not in unreadable]
        for n, i in enumerate(indices.tolist()):
            if i in unreadable and good:
                crops[n] = crops[next((g for g in good if g > n), good[0])]
        return crops, indices, unreadable

    def decode(self, i, unreadable):
        try:
            return self.files.decode(i)
        except UserError as error:
            unreadable[i] = str(error)


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


def evaluation_batches(args, process, images, epoch=None):
    """Yields (float [n, 3, S, S], labels [n]; -1 for none) of this rank's share of an ImageSet, in order.
    Images are plain, resized where they are of another size; or, in an epoch of a linear probe, random
    resized crops (0.08-1), perhaps mirrored, as in the papers' offline linear evaluation."""
    view = augment.ViewConfig(args.image_size, jitter_p=0.0, grey_p=0.0)
    key = None if epoch is None else (args.seed, PROBED, epoch)
    batches = torch.arange(len(images.labels)).split(EVALUATION_BATCH)
    # each rank has whole batches, so that all ranks together compute what one does
    first, last = (i * len(batches) // process.world for i in (process.rank, process.rank + 1))
    if not (batches := batches[first:last]):
        return
    fetch = fetcher(images, [view], args.workers, args.skip_corrupt, False)
    title = "evaluating" if epoch is None else f"probe epoch {epoch}"
    shown = fetch((batch, key) for batch in batches)
    shown = bar(shown, desc=title, total=len(batches), unit="batch", leave=False, disable=not process.main)
    for number, (pixels, y) in enumerate(shown, first):
        x = next(iter(pixels))
        if key is not None:
            params = augment.draw(view, len(x), *fetch.size, generator(*key, number))
            yield augment.make_view(x, params, view, images.mean, images.std), y
            continue
        x = x.float().div_(255)
        if x.shape[-2:] != (args.image_size,) * 2:
            x = F.interpolate(x, (args.image_size,) * 2, mode="bicubic", antialias=True).clamp_(0, 1)
        x = augment.normalize(x, images.mean, images.std)
        yield x.contiguous(memory_format=torch.channels_last), y
