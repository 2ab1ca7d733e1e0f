"""Data sets: each is one function that returns an ImageSet for "train" or "test", and one line in DATASETS."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import DataError
from data.decode import load_folder

CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
DIGITS_STATS = ((0.3053,) * 3, (0.3762,) * 3)


@dataclass
class ImageSet:
    """Images of one size, in memory.

    images: uint8 [N, 3, H, W]; labels: int64 [N], an index into classes, -1 for none; mean, std: per channel, of images in [0, 1];
    domains: int64 [N], or None where all images come from one; digest: a checksum of images and labels, once known.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    mean: tuple
    std: tuple
    domains: torch.Tensor | None = None
    digest: int = 0


def digits(split, args):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the package; every fifth one is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 4
    chosen = test if split == "test" else ~test
    images = torch.from_numpy((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8))
    images = images.unsqueeze(1).repeat(1, 3, 1, 1)
    return ImageSet(images, torch.from_numpy(bunch.target[chosen]).long(), [str(i) for i in range(10)], *DIGITS_STATS)


def cifar10(split, args):
    """CIFAR-10 (Krizhevsky, 2009), from torchvision's files or from class folders."""
    return _cifar("CIFAR10", split, args, CIFAR10_STATS)


def cifar100(split, args):
    """CIFAR-100 (Krizhevsky, 2009), from torchvision's files or from class folders."""
    return _cifar("CIFAR100", split, args, CIFAR100_STATS)


def _cifar(name, split, args, stats):
    import torchvision

    root = Path(args.data_dir)
    dataset = getattr(torchvision.datasets, name)
    if (root / "train").is_dir() or (root / "test").is_dir():
        images, labels, classes = load_folder(root / split, args.cache_dir)
        return ImageSet(images, labels, classes, *stats)
    try:
        # torchvision compares every file with its known checksum before it reads it, so no foreign pickle is opened
        files = dataset(root, train=split == "train", download=args.download)
    except (RuntimeError, OSError) as error:
        if args.download:
            raise DataError(f"{name} could not be downloaded to {root}: {error}") from error
        raise DataError(
            f"no {name} in {root}: pass --download to fetch it, or --data_dir with {dataset.base_folder}/ "
            "(torchvision's files) or with train/<class>/ and test/<class>/ (PNG or JPEG images)"
        ) from error
    images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(files.targets), files.classes, *stats)


DATASETS = {"digits": digits, "cifar10": cifar10, "cifar100": cifar100}


def load_dataset(args):
    """The (train, test) ImageSets that --dataset, --data_dir, --download and --cache_dir ask for.

    Raises DataError where they are missing, unreadable, or do not have the same classes.
    """
    train, test = DATASETS[args.dataset]("train", args), DATASETS[args.dataset]("test", args)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        shown = ", ".join(odd[:5]) + (", ..." if len(odd) > 5 else "")
        raise DataError(f"{args.data_dir}: train and test have different classes ({shown} in only one of them)")
    return train, test
