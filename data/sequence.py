"""Different data sets as successive tasks."""

import copy
from dataclasses import replace

import torch
from torchvision.transforms.functional import center_crop, resize

from data import DATASETS, OF_TASKS, set_names
from data.datasets import ImageSet, load_dataset
from data.files import load_all
from utils import UserError

SEQUENCE_SIZE = 32  # pixels, where --image_size says nothing else


def sequence(args):
    """The training and the test ImageSet of --sequence: different data sets as domains, each with classes of
    its own, their images cut to squares of --image_size pixels; normalised as the first of them. Raises
    UserError where a set has no labels to evaluate with."""
    side = getattr(args, "image_size", None) or SEQUENCE_SIZE
    names, parts = set_names(args.sequence), ([], [])
    flags = ("domain_order", "cache", "probe_data_dir", "val_split")
    if given := [name for name in flags if getattr(args, name)]:
        raise UserError(f"--{given[0]}: not with --sequence")
    if len(set(names)) < len(names):
        raise UserError(f"--sequence {' '.join(args.sequence)}: a set comes twice, or two have one name")
    if (args.dataset, args.scenario) != ("sequence", "domain"):
        raise UserError("--dataset, --scenario: not with --sequence, where each data set is a task")
    for entry in args.sequence:
        dataset, _, place = entry.partition(":")
        if dataset not in DATASETS:
            known = ", ".join(DATASETS)
            raise UserError(f"--sequence {entry}: neither SET nor SET:DIR with SET one of {known}")
        if entry == "folder":
            raise UserError("--sequence folder: say which, as folder:DIR")
        other = copy.copy(args)
        vars(other).update(dict.fromkeys(OF_TASKS), scenario="class", dataset=dataset)
        other.data_dir = place or args.data_dir
        train, _, test = load_dataset(other)
        if test is None or (train.labels < 0).any():
            raise UserError(f"--sequence {entry}: needs labelled images to train on and to test on")
        for images, found in zip((train, test), parts):
            if images.streams:
                cut = lambda image: squares(image[None], side)[0]  # noqa: E731
                pixels, readable = load_all(images.images, args.skip_corrupt, cut)
                images = replace(images.subset(readable), images=pixels)
            found.append(replace(images, images=squares(images.images, side)))
    return tuple(joined(names, found) for found in parts)


def joined(names, sets):
    """One ImageSet of several, the number of a set being its domain."""
    classes = [f"{name}/{c}" for name, images in zip(names, sets) for c in images.classes]
    first = [sum(len(images.classes) for images in sets[:number]) for number in range(len(sets))]
    labels = torch.cat([images.labels + start for images, start in zip(sets, first)])
    domains = torch.cat([torch.full_like(images.labels, number) for number, images in enumerate(sets)])
    pixels = torch.cat([images.images for images in sets])
    return ImageSet(pixels, labels, classes, sets[0].mean, sets[0].std, domains, tuple(names))


def squares(images, side):
    """Images uint8 [N, 3, H, W], their short side resized to `side` pixels, and the middle of them."""
    height, width = images.shape[2:]
    if height == width == side:
        return images
    size = [round(side * length / min(height, width)) for length in (height, width)]
    parts = images.split(1024)
    resized = torch.cat([resize(part, size, antialias=True) for part in parts])
    return center_crop(resized, [side, side]).contiguous()
