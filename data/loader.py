"""Batches of uint8 images on the device, in an order that is a function of (seed, task, epoch) and nothing
else."""

from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F

from data import DataError, augment

EVALUATION_BATCH = 512  # images at a time
LABELLED, PROBED = 2**32, 2**33  # in place of, or added to, a task's number: other streams of random numbers


def generator(*key):
    """A CPU torch.Generator that depends on all the integers of the key, well mixed."""
    # SeedSequence pads with zeros: the length keeps (seed, task, epoch) apart from (seed, task, epoch, 0)
    seed = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def evaluation_share(count, rank, world):
    """The slice of `count` images that this rank evaluates: whole batches, so that all ranks together compute
    what one does."""
    batches = -(-count // EVALUATION_BATCH)
    return slice(*(min(i * batches // world * EVALUATION_BATCH, count) for i in (rank, rank + 1)))


class Loader:
    """Serves one task: the images stay on the device, a batch is one gather, both views are made for it at
    once.

    images: uint8 [N, 3, H, W] of the whole data set, on the device (in StreamLoader, a Stream); indices:
    int64 [n], the task's samples; batch_size: of all ranks together, of which this one gets the share rank /
    world. The last incomplete batch of an epoch is dropped. steps: per epoch, if not as many as the samples
    give; the samples then come again, or do not all come. Raises DataError if the task is smaller than a
    batch.
    """

    def __init__(
        self, images, indices, batch_size, views, mean, std, seed, task, rank=0, world=1, steps=None
    ):
        if len(indices) < batch_size:
            whose = (
                f"task {task} has {len(indices)} training"
                if task < LABELLED
                else f"--online_probe has {len(indices)} labelled"
            )
            raise DataError(f"{whose} images, fewer than --batch_size {batch_size}: lower the batch size")
        self.images, self.indices, self.views, self.mean, self.std = images, indices, views, mean, std
        self.batch_size, self.seed, self.task = batch_size, seed, task
        share = batch_size // world
        self.share = slice(rank * share, (rank + 1) * share)
        self.steps = steps or len(indices) // batch_size  # per epoch

    skipped = ()  # indices of images that could not be read

    def batches(self, epoch, first_step=0):
        """The indices int64 [N/world] of this rank for each step of an epoch, from first_step on."""
        order = self.indices[
            torch.randperm(len(self.indices), generator=generator(self.seed, self.task, epoch))
        ]
        batches = order[: len(order) // self.batch_size * self.batch_size].view(-1, self.batch_size)
        for step in range(first_step, self.steps):
            yield batches[step % len(batches)][self.share]

    def epoch(self, epoch, first_step=0):
        """Yields (view 1, view 2), float [N/world, 3, S, S], for the steps of an epoch from first_step on."""
        return (views for views, _ in self.views_and_indices(epoch, first_step))

    def labelled(self, labels, epoch, first_step=0):
        """Yields (images [N/world, 3, S, S] in the first view, their labels int64 [N/world], -1 for an image
        that could not be read and whose place another has taken). labels: of all images, on the device."""
        for (view, *_), batch in self.views_and_indices(epoch, first_step):
            y = labels[batch.to(labels.device, non_blocking=True)]
            if self.skipped:
                y[torch.isin(batch, torch.tensor(list(self.skipped))).to(y.device)] = -1
            yield view, y

    def views_and_indices(self, epoch, first_step):
        """Yields the views of each step, and the int64 indices [N/world] of its images."""
        for step, batch in enumerate(self.batches(epoch, first_step), first_step):
            images = self.images[batch.to(self.images.device, non_blocking=True)]
            yield self.augment(repeat(images), epoch, step, images.shape[-2:]), batch

    def augment(self, images, epoch, step, size=(None, None)):
        """images: for each view, uint8 [N/world, 3, H, W], or crops, where size is (None, None).

        Parameters are drawn for the global batch and sliced: N ranks see what one process sees.
        """
        rng = generator(self.seed, self.task, epoch, step)
        params = [augment.draw(view, self.batch_size, *size, rng)[self.share] for view in self.views]
        return [
            augment.make_view(x, p, v, self.mean, self.std) for x, p, v in zip(images, params, self.views)
        ]


def probe_view(size):
    """What the papers' offline linear evaluation trains on: a random resized crop (0.08-1), perhaps
    mirrored."""
    return augment.ViewConfig(size, jitter_p=0.0, grey_p=0.0)


def evaluation_batches(images, first, size, mean, std, key=None, batch_size=EVALUATION_BATCH):
    """Yields normalised float [n, 3, size, size] of all images in order: plain, and resized where they are of
    another size; or, with a key (integers), in random views that depend on the key. first: the number of the
    first batch among all ranks' ones."""
    for number, part in enumerate(images.split(batch_size), first):
        if key is not None:
            view = probe_view(size)
            params = augment.draw(view, len(part), *part.shape[-2:], generator(*key, number))
            yield augment.make_view(part, params, view, mean, std)
            continue
        x = part.float().div_(255)
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
        yield augment.normalize(x, mean, std).contiguous(memory_format=torch.channels_last)
