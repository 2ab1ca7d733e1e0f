"""Data sets: each is one function that returns an ImageSet for "train" or "test", and one line in
DATASETS."""

import copy
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from data import DataError
from data.cache import add_cache, forget, open_in_memory
from data.files import Files, default_workers, list_classes, list_images

CIFAR_STATS = (
    (0.4914, 0.4822, 0.4465),
    (0.247, 0.243, 0.261),
)  # CIFAR-10's; the released code takes them for CIFAR-100, too
DIGITS_STATS = ((0.3053,) * 3, (0.3762,) * 3)
IMAGENET_STATS = (
    (0.485, 0.456, 0.406),
    (0.228, 0.224, 0.225),
)  # the standard deviations of the released code
SVHN_STATS = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))

DOMAINS = ("real", "quickdraw", "painting", "sketch", "infograph", "clipart")  # the papers' order
DOMAINNET_CLASSES, IMAGENET_CLASSES = 345, 1000


@dataclass
class ImageSet:
    """Images and what is known of them.

    images: uint8 [N, 3, H, W], or Files where they are of different sizes; labels: int64 [N], an index into
    classes, -1 for none; mean, std: per channel, of images in [0, 1]; domains: int64 [N], an index into
    domain_names, or None where all images come from one; probe: the labelled ImageSet that classifiers are
    trained on, where it is not this one; one_size: the files are small and of one size, to be held in memory;
    digest: the checksum, once known.
    """

    images: torch.Tensor | Files
    labels: torch.Tensor
    classes: list
    mean: tuple
    std: tuple
    domains: torch.Tensor | None = None
    domain_names: tuple = ()
    probe: "ImageSet | None" = None
    one_size: bool = False
    digest: int = 0

    @property
    def streams(self):
        """Whether the images are files that are read while training."""
        return isinstance(self.images, Files)

    def checksum(self):
        """Of labels, domains and pixels, or the names of files."""
        pixels = self.images.checksum() if self.streams else zlib.crc32(self.images.cpu().numpy())
        digest = zlib.crc32(self.labels.cpu().numpy(), pixels)
        return digest if self.domains is None else zlib.crc32(self.domains.numpy(), digest)

    def to(self, device):
        """Moves what is in memory to the device; caches of files in memory are forgotten, now that all
        processes have them."""
        self.labels = self.labels.to(device)
        if self.streams:
            forget(self.images)
        else:
            self.images = self.images.to(device)

    def subset(self, indices):
        """Only these samples (int64, on the CPU)."""
        where = indices if self.streams else indices.to(self.images.device)
        domains = None if self.domains is None else self.domains[indices]
        return replace(
            self,
            images=self.images[where],
            labels=self.labels[indices.to(self.labels.device)],
            domains=domains,
        )


def digits(split, args):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the package; every fifth one is
    for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 4
    chosen = test if split == "test" else ~test
    images = torch.from_numpy((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8))
    images = images.unsqueeze(1).repeat(1, 3, 1, 1)
    return ImageSet(
        images, torch.from_numpy(bunch.target[chosen]).long(), [str(i) for i in range(10)], *DIGITS_STATS
    )


def cifar10(split, args):
    """CIFAR-10 (Krizhevsky, 2009), from torchvision's files or from class folders."""
    return _cifar("CIFAR10", split, args)


def cifar100(split, args):
    """CIFAR-100 (Krizhevsky, 2009), from torchvision's files or from class folders."""
    return _cifar("CIFAR100", split, args)


def _cifar(name, split, args):
    root = Path(args.data_dir)
    if (root / "train").is_dir() or (root / "test").is_dir():
        names, labels, classes = list_classes(root / split)
        return ImageSet(Files(root / split, names), labels, classes, *CIFAR_STATS, one_size=True)
    form = "torchvision's files or with train/<class>/ and test/<class>/ (PNG or JPEG images)"
    files = _torchvision(name, args, form, train=split == "train")
    images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(files.targets), files.classes, *CIFAR_STATS)


def svhn(split, args):
    """SVHN (Netzer et al., 2011): house numbers, 32x32, from torchvision's files; its extra split is not
    used."""
    files = _torchvision("SVHN", args, "train_32x32.mat and test_32x32.mat", split=split)
    images = torch.from_numpy(np.ascontiguousarray(files.data))
    return ImageSet(images, torch.from_numpy(files.labels).long(), [str(i) for i in range(10)], *SVHN_STATS)


def stl10(split, args):
    """STL-10 (Coates et al., 2011), 96x96: the unlabelled split trains, classifiers are trained on the
    labelled one."""

    def load(name):
        files = _torchvision("STL10", args, "stl10_binary/", split=name)
        # its images were taken from ImageNet
        images = torch.from_numpy(np.ascontiguousarray(files.data))
        return ImageSet(images, torch.from_numpy(files.labels).long(), list(files.classes), *IMAGENET_STATS)

    if split == "test":
        return load("test")
    return replace(load("unlabeled"), probe=load("train"))


def _torchvision(name, args, expected, **options):
    """A data set of torchvision, whose files are compared with their known checksums before they are read: no
    foreign pickle is opened."""
    import torchvision

    try:
        return getattr(torchvision.datasets, name)(args.data_dir, download=args.download, **options)
    except (RuntimeError, OSError) as error:
        if args.download:
            raise DataError(f"{name} could not be downloaded to {args.data_dir}: {error}") from error
        raise DataError(
            f"no {name} in {args.data_dir}: pass --download to fetch it, or --data_dir with {expected}"
        ) from error


def imagenet(split, args):
    """ImageNet-1k (ILSVRC 2012): train/<WordNet id>/ and val/<WordNet id>/."""
    return _imagenet(split, args, None)


def imagenet100(split, args):
    """The 100 classes of ImageNet that this line of papers uses (data/imagenet100_classes.txt, CMC's list),
    from a folder with these classes or from the whole of ImageNet."""
    return _imagenet(split, args, (Path(__file__).parent / "imagenet100_classes.txt").read_text().split())


def _imagenet(split, args, wanted):
    root = Path(args.data_dir) / ("val" if split == "test" else "train")
    if root.is_dir() and not any(entry.is_dir() for entry in os.scandir(root)) and split == "test":
        raise DataError(
            f"{root} has no class folders: ImageNet's validation images come unsorted; in Python, "
            f"torchvision.datasets.ImageNet({args.data_dir!r}, 'val') sorts them into val/<WordNet id>/ from "
            "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz"
        )
    if wanted is not None and root.is_dir():
        missing = [name for name in wanted if not (root / name).is_dir()]
        if missing:
            raise DataError(
                f"{root} lacks {len(missing)} of ImageNet-100's {len(wanted)} classes: {' '.join(missing)}"
            )
    names, labels, classes = list_classes(root, wanted)
    if wanted is None and len(classes) != IMAGENET_CLASSES:
        raise DataError(
            f"{root} has {len(classes)} class folders where ImageNet has {IMAGENET_CLASSES}: complete it, or "
            "use --dataset folder, "
            "which takes any classes"
        )
    return ImageSet(Files(root, names), labels, classes, *IMAGENET_STATS)


def domainnet(split, args):
    """DomainNet (Peng et al., 2019): DIR/<domain>/<class>/<image>, and the lists DIR/<domain>_train.txt and
    _test.txt."""
    root, order = Path(args.data_dir), args.domain_order or DOMAINS
    unknown = [name for name in order if name not in DOMAINS]
    if unknown:
        raise DataError(f"--domain_order {unknown[0]}: DomainNet's domains are {', '.join(sorted(DOMAINS))}")
    classes, names, labels, domains = {}, [], [], []
    for number, domain in enumerate(order):
        for part in ("train", "test"):  # both name the classes
            found = _read_list(root, f"{domain}_{part}.txt", classes)
            if part == split:
                names += [name for name, _ in found]
                labels += [label for _, label in found]
                domains += [number] * len(found)
    files = Files(root, names)
    _require(files)
    classes = [classes.get(label, "") for label in range(DOMAINNET_CLASSES)]
    return ImageSet(
        files, torch.tensor(labels), classes, *IMAGENET_STATS, torch.tensor(domains), tuple(order)
    )


def _read_list(root, file, classes):
    """(name, label) for each line of a list; the class names, the folders of the images, are added to
    `classes`."""
    try:
        lines = (root / file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {root / file} ({type(error).__name__}): DomainNet needs <domain>_train.txt and "
            "<domain>_test.txt beside "
            "its domains' folders; check --data_dir, or choose other domains with --domain_order"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{root / file}, line {number}"
        name, _, label = line.strip().rpartition(" ")
        if not name:
            if not line.strip():
                continue
            raise DataError(f"{where}: {line.strip()!r} is not '<domain>/<class>/<image> <label>'")
        parts = PurePosixPath(name).parts
        if len(parts) < 2 or parts[0] == "/" or ".." in parts:
            raise DataError(f"{where}: {name} is not a path below {root}")
        if not label.isascii() or not label.isdecimal() or int(label) >= DOMAINNET_CLASSES:
            raise DataError(f"{where}: label {label} is not a number from 0 to {DOMAINNET_CLASSES - 1}")
        if classes.setdefault(int(label), parts[-2]) != parts[-2]:
            other = classes[int(label)]
            raise DataError(
                f"{where}: label {label} is {parts[-2]} here and {other} in another line: lists of different "
                "versions?"
            )
        found.append((name, int(label)))
    if not found:
        raise DataError(f"{root / file} names no images")
    return found


def _require(files):
    """Raises DataError, with their number and the first of them, if files are missing; one look into each
    folder."""
    folders = {}
    missing = []
    for i in range(len(files)):
        path = files.path(i)
        if path.parent not in folders:
            folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in folders[path.parent]:
            missing.append(path)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} images that the lists in {files.root} name are missing, such as "
            f"{missing[0]}: "
            "unpack the archives of all domains there, or choose other domains with --domain_order"
        )


def folder(split, args):
    """Anyone's own images: train/<class>/, or train/<task>/<class>/ for a sequence of domains, and test/ (or
    val/) of the same form; or images without labels, in train/ or, without it, in any folders below
    --data_dir. With --scenario domain and no test/, train/<task>/ may hold unlabelled images itself."""
    root = Path(args.data_dir)
    if not root.is_dir():
        raise DataError(f"no folder {root}: check --data_dir")
    has_train, test = (
        (root / "train").is_dir(),
        next((root / x for x in ("test", "val") if (root / x).is_dir()), None),
    )
    if test is not None and not has_train:
        raise DataError(
            f"{root} has {test.name}/ but no train/: rename the folder of the training images, or --data_dir "
            f"{test}"
        )
    if split == "test" and test is None:
        return None
    root = test if split == "test" else root / "train" if has_train else root
    names = list_images(root, strict=has_train)
    parts = [tuple(name.split("/")[:-1]) for name in names]  # the folders that each image lies in
    depths = {len(p): name for p, name in zip(parts, names)}
    if not has_train or set(depths) == {0}:
        return ImageSet(Files(root, names), torch.full((len(names),), -1), [], *IMAGENET_STATS)
    if len(depths) > 1 or max(depths) > 2:
        example = " and ".join(depths[d] for d in sorted(depths))
        raise DataError(
            f"{root}: use <class>/<image> throughout, or <task>/<class>/<image>, or images without folders; "
            f"not {example}"
        )
    tasks = None
    if max(depths) == 2 or args.scenario == "domain":
        if max(depths) == 1 and test is not None:
            raise DataError(
                f"{root} holds <class>/<image> where --scenario domain needs <task>/<class>/<image>, in "
                "test/ too"
            )
        tasks, names, parts = _choose_tasks(root, names, parts, args.domain_order)
    classes = sorted({p[-1] for p in parts}) if max(depths) == 2 or tasks is None else []
    number = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([number[p[-1]] if classes else -1 for p in parts])
    images = ImageSet(Files(root, names), labels, classes, *IMAGENET_STATS)
    if tasks is not None:
        images.domains, images.domain_names = torch.tensor([tasks.index(p[0]) for p in parts]), tasks
        for domain, name in enumerate(tasks):
            own = set(labels[images.domains == domain].tolist())
            lacking = [c for label, c in enumerate(classes) if label not in own]
            if lacking:
                raise DataError(
                    f"task folder {root / name} lacks classes of other tasks ({_some(lacking)}): all need "
                    "the same ones"
                )
    return images


def _choose_tasks(root, names, parts, order):
    """The task folders in their order (all by name, where `order` is None), and the images that lie in
    them."""
    known = sorted({p[0] for p in parts})
    tasks = tuple(order or known)
    for name in tasks:
        if name not in known:
            raise DataError(f"--domain_order {name}: {root} has the task folders {', '.join(known)}")
    kept = [i for i, p in enumerate(parts) if p[0] in tasks]
    return tasks, [names[i] for i in kept], [parts[i] for i in kept]


def _some(names):
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


DATASETS = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "stl10": stl10,
    "imagenet100": imagenet100,
    "imagenet": imagenet,
    "domainnet": domainnet,
    "folder": folder,
}


def add_data_arguments(parser):
    """The flags that say where images come from; returns the group's add_argument."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="digits", help="digits needs no download")
    add("--data_dir", default="datasets", help="where the data set lies, or is to be put by --download")
    add("--download", action="store_true", help="fetch the data set if it is missing")
    add(
        "--probe_data_dir",
        metavar="DIR",
        help="train/<class>/ and test/<class>/ to evaluate with, for images without labels",
    )
    add("--domain_order", nargs="+", metavar="NAME", help="domains in the order of the tasks (default: the "
                                                          "papers', or by name); "
        "fewer than there are leaves the others out")  # fmt: skip
    add("--workers", type="index", default=default_workers(), help="processes that decode images of "
                                                                   "different sizes; raise it if "
        "the bar says that training waits for data")  # fmt: skip
    add("--cache", choices=("none", "ram", "disk"), default="none", help="keep images of different sizes "
                                                                         "decoded, with their short "
        "side at --cache_size: takes about 0.25 MB an image at 256, and makes every epoch "
        "faster")  # fmt: skip
    add("--cache_size", type="count", default=256, help="short side of cached images; larger than the views")
    add(
        "--cache_dir",
        help="where decoded images are kept if not beside the data, for instance if that is read-only",
    )
    add(
        "--skip_corrupt",
        action="store_true",
        help="go on without images that cannot be read; python -m data.check lists them",
    )
    return add


def find_dataset(args):
    """The (train, probe, test) ImageSets that the data flags ask for: what is trained on, what a classifier
    is trained on (train itself in most cases) and what it is tested on; probe and test are None where there
    are no labels to evaluate with.

    Raises DataError where they are missing, unreadable, or do not fit each other.
    """
    if args.domain_order and len(set(args.domain_order)) < len(args.domain_order):
        raise DataError(f"--domain_order {' '.join(args.domain_order)} names a domain twice")
    train, test = DATASETS[args.dataset]("train", args), DATASETS[args.dataset]("test", args)
    if args.domain_order and train.domains is None:
        raise DataError(f"--domain_order: {args.dataset} in {args.data_dir} has no domains")
    if args.download and train.streams and not train.one_size:
        raise DataError(
            f"--download: {args.dataset} has to be fetched by hand; put it into --data_dir {args.data_dir}"
        )
    if args.probe_data_dir:
        other = copy.copy(args)
        other.dataset, other.data_dir, other.domain_order, other.scenario = (
            "folder",
            args.probe_data_dir,
            None,
            "class",
        )
        train.probe, test = folder("train", other), folder("test", other)
        if not train.probe.classes or test is None:
            raise DataError(
                f"--probe_data_dir {args.probe_data_dir} needs labelled images in train/<class>/ and "
                "test/<class>/"
            )
    probe = train.probe or train
    if test is None or (probe.labels < 0).all():
        probe = test = train.probe = None
    elif probe.classes != test.classes:
        raise DataError(
            f"{args.probe_data_dir or args.data_dir}: train and test have different classes "
            f"({_some(set(probe.classes) ^ set(test.classes))} in only one of them)"
        )
    elif probe.domain_names != test.domain_names:
        odd = _some(set(probe.domain_names) ^ set(test.domain_names))
        raise DataError(
            f"{args.data_dir}: train and test have different task folders ({odd} in only one of them)"
        )
    for images in filter(None, (train.probe, test)):
        images.mean, images.std = train.mean, train.std  # what the network is trained with
    return train, probe, test


def load_dataset(args):
    """`find_dataset`, with images of one size in memory and with the cache that --cache asks for."""
    train, _, test = find_dataset(args)
    if train.probe is not None:
        train.probe = _open(train.probe, "probe", args)
    train = _open(train, "train", args)
    test = None if test is None else _open(test, "test", args)
    return train, None if test is None else train.probe or train, test


def _open(images, name, args):
    """The ImageSet in memory, or with its cache, as it is to be."""
    if images.one_size:
        pixels, readable = open_in_memory(images.images, f"{args.dataset}_{name}", args)
        return replace(images.subset(readable), images=pixels)
    if images.streams and args.cache != "none":
        add_cache(images.images, f"{args.dataset}_{name}", args)
    return images
