"""Data sets: each is one function that returns an ImageSet for "train" or "test", and one name in
DATASETS."""

import copy
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F

from data.cache import open_cache
from data.files import Files, list_classes, list_images, load_all
from utils import UserError

# CIFAR-10's; the released code takes them for CIFAR-100, too
CIFAR_STATS = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
DIGITS_STATS = (0.3053,) * 3, (0.3762,) * 3
TEXTURED_STATS = (0.3908, 0.3638, 0.3619), (0.3049, 0.2597, 0.2741)
IMAGENET_STATS = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)  # the released code's standard deviations
SVHN_STATS = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)

DOMAINS = ("real", "quickdraw", "painting", "sketch", "infograph", "clipart")  # the papers' order
DOMAINNET_CLASSES, IMAGENET_CLASSES = 345, 1000
STREAM_SIZE = 224  # of views of images that differ in size
TEN = [str(digit) for digit in range(10)]


@dataclass
class ImageSet:
    """Images and what is known of them.

    images: uint8 [N, 3, H, W], or Files where they are of different sizes; labels: int64 [N], an index into
    classes, -1 for none; mean, std: per channel, of images in [0, 1]; domains: int64 [N], an index into
    domain_names, or None where all images come from one; probe: the labelled ImageSet that classifiers are
    trained on, where it is not this one; one_size: the files are small and of one size, to be held in memory;
    skipped: of files that could not be read, {index: why}; digest: the checksum, once known."""

    images: torch.Tensor | Files
    labels: torch.Tensor
    classes: list
    mean: tuple
    std: tuple
    domains: torch.Tensor | None = None
    domain_names: tuple = ()
    probe: "ImageSet | None" = None
    one_size: bool = False
    skipped: dict = field(default_factory=dict)
    digest: int = 0

    @property
    def streams(self):
        """Whether the images are files that are read while training."""
        return isinstance(self.images, Files)

    @property
    def side(self):
        """Of the views, in pixels, where nothing else is asked for."""
        return STREAM_SIZE if self.streams else self.images.shape[-1]

    def checksum(self, parts=()):
        """Of pixels, or the names of files, of labels, domains, and lists of indices."""
        digest = self.images.checksum() if self.streams else zlib.crc32(self.images.cpu().numpy())
        for values in (self.labels.cpu(), *parts):
            digest = zlib.crc32(values.numpy(), digest)
        return digest if self.domains is None else zlib.crc32(self.domains.numpy(), digest)

    def to(self, device):
        """Moves what is in memory to the device."""
        self.labels = self.labels.to(device)
        if not self.streams:
            self.images = self.images.to(device)

    def subset(self, indices):
        """Only these samples (int64, on the CPU)."""
        where = indices if self.streams else indices.to(self.images.device)
        domains = None if self.domains is None else self.domains[indices]
        labels = self.labels[indices.to(self.labels.device)]
        return replace(self, images=self.images[where], labels=labels, domains=domains)


def digits(split, args):
    """scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the package; every fifth one is
    for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    test = np.arange(len(bunch.target)) % 5 == 4
    chosen = test if split == "test" else ~test
    images = torch.from_numpy((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8))
    images = images.unsqueeze(1).repeat(1, 3, 1, 1)
    return ImageSet(images, torch.from_numpy(bunch.target[chosen]).long(), TEN, *DIGITS_STATS)


def textured_digits(split, args):
    """The digits at 16x16 before scikit-learn's two photographs, as in MNIST-M (Ganin et al., JMLR 2016): the
    difference of both, taken at a random place of one of them."""
    from sklearn.datasets import load_sample_images

    plain, rng = digits(split, args), torch.Generator().manual_seed(int(split == "test"))
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2).float()
    photos, side, count = F.avg_pool2d(photos, 3), 16, len(plain.labels)
    limits = 2, *(s - side for s in photos.shape[2:])
    which, *corner = (torch.randint(n, (count,), generator=rng) for n in limits)
    rows, columns = (start.view(-1, 1) + torch.arange(side) for start in corner)
    patches = photos[which.view(-1, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
    larger = F.interpolate(plain.images.float(), scale_factor=2, mode="bilinear")
    images = (patches - larger).abs().round().byte().contiguous()
    return replace(plain, images=images, mean=TEXTURED_STATS[0], std=TEXTURED_STATS[1])


def _cifar(name, split, args):
    """CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), from torchvision's files or from class folders."""
    root = Path(args.data_dir)
    if (root / "train").is_dir() or (root / "test").is_dir():
        names, labels, classes = list_classes(root / split)
        return ImageSet(Files(root / split, names), labels, classes, *CIFAR_STATS, one_size=True)
    form = "torchvision's files or with train/<class>/ and test/<class>/ (PNG or JPEG images)"
    files = _torchvision(name, args, form, train=split == "train")
    images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(files.targets), files.classes, *CIFAR_STATS)


cifar10, cifar100 = partial(_cifar, "CIFAR10"), partial(_cifar, "CIFAR100")


def svhn(split, args):
    """SVHN (Netzer et al., 2011): house numbers, 32x32, from torchvision's files; its extra split is not
    used."""
    files = _torchvision("SVHN", args, "train_32x32.mat and test_32x32.mat", split=split)
    images = torch.from_numpy(np.ascontiguousarray(files.data))
    return ImageSet(images, torch.from_numpy(files.labels).long(), TEN, *SVHN_STATS)


def stl10(split, args):
    """STL-10 (Coates et al., 2011), 96x96, taken from ImageNet: the unlabelled split trains, classifiers are
    trained on the labelled one."""

    def load(name):
        files = _torchvision("STL10", args, "stl10_binary/", split=name)
        images, labels = torch.from_numpy(np.ascontiguousarray(files.data)), torch.from_numpy(files.labels)
        return ImageSet(images, labels.long(), list(files.classes), *IMAGENET_STATS)

    return load("test") if split == "test" else replace(load("unlabeled"), probe=load("train"))


def _torchvision(name, args, expected, **options):
    """A data set of torchvision, whose files are compared with their known checksums before they are read: no
    foreign pickle is opened."""
    import torchvision

    try:
        return getattr(torchvision.datasets, name)(args.data_dir, download=args.download, **options)
    except (RuntimeError, OSError) as error:
        if args.download:
            raise UserError(f"{name} could not be downloaded to {args.data_dir}: {error}") from error
        advice = f"pass --download to fetch it, or --data_dir with {expected}"
        raise UserError(f"no {name} in {args.data_dir}: {advice}") from error


def imagenet(split, args):
    """ImageNet-1k (ILSVRC 2012): train/<WordNet id>/ and val/<WordNet id>/."""
    return _imagenet(split, args, None)


def imagenet100(split, args):
    """The 100 classes of ImageNet of CMC's list, as CaSSLe uses (data/imagenet100_classes.txt), from a folder
    with these classes or from the whole of ImageNet."""
    return _imagenet(split, args, (Path(__file__).parent / "imagenet100_classes.txt").read_text().split())


def _imagenet(split, args, wanted):
    root = Path(args.data_dir) / ("val" if split == "test" else "train")
    if root.is_dir() and not any(entry.is_dir() for entry in root.iterdir()):
        sorting = f"torchvision.datasets.ImageNet({args.data_dir!r}, 'val') sorts them into val/<WordNet id>/"
        raise UserError(f"{root} has no class folders; validation images come unsorted: in Python, {sorting}")
    missing = [name for name in wanted or () if root.is_dir() and not (root / name).is_dir()]
    if missing:
        advice = "complete it; --dataset folder takes any classes (Kaggle's ImageNet-100 has others)"
        raise UserError(f"{root} lacks {len(missing)} of CMC's ImageNet-100: {' '.join(missing)}; {advice}")
    names, labels, classes = list_classes(root, wanted)
    if wanted is None and len(classes) != IMAGENET_CLASSES:
        advice = f"has {IMAGENET_CLASSES}: complete it, or use --dataset folder, which takes any classes"
        raise UserError(f"{root} has {len(classes)} class folders where ImageNet {advice}")
    return ImageSet(Files(root, names), labels, classes, *IMAGENET_STATS)


def domainnet(split, args):
    """DomainNet (Peng et al., 2019): DIR/<domain>/<class>/<image>, and the lists DIR/<domain>_train.txt and
    _test.txt."""
    root, order = Path(args.data_dir), args.domain_order or DOMAINS
    classes, found = {}, []
    for number, domain in enumerate(order):
        if domain not in DOMAINS:
            raise UserError(f"--domain_order {domain}: DomainNet's domains are {', '.join(sorted(DOMAINS))}")
        if not (root / domain).is_dir():
            raise UserError(f"no folder {root / domain}: unpack it, or choose domains with --domain_order")
        for part in ("train", "test"):  # both name the classes
            entries = _read_list(root, f"{domain}_{part}.txt", classes)
            found += [(*entry, number) for entry in entries if part == split]
    names, labels, domains = zip(*found)
    classes = [classes.get(label, "") for label in range(DOMAINNET_CLASSES)]
    labels, domains = torch.tensor(labels), torch.tensor(domains)
    return ImageSet(Files(root, names), labels, classes, *IMAGENET_STATS, domains, tuple(order))


def _read_list(root, file, classes):
    """(name, label) for each line of a list; the class names, the folders of the images, are added to
    `classes`."""
    try:
        lines = (root / file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        expected = "DomainNet needs <domain>_train.txt and <domain>_test.txt beside its domains' folders"
        advice = "check --data_dir, or choose other domains with --domain_order"
        raise UserError(f"cannot read {root / file}: {expected}; {advice}") from error
    found = []
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        parts = PurePosixPath(name).parts
        number_of = int(label) if label.isascii() and label.isdecimal() else -1
        inside = len(parts) > 1 and parts[0] != "/" and ".." not in parts
        if not inside or not 0 <= number_of < DOMAINNET_CLASSES:
            form = f"'<domain>/<class>/<image> <label>' with a label below {DOMAINNET_CLASSES}"
            raise UserError(f"{root / file}, line {number}: {line.strip()!r} is not {form}")
        if classes.setdefault(number_of, parts[-2]) != parts[-2]:
            both = f"{parts[-2]} here and {classes[number_of]} in another line"
            raise UserError(f"{root / file}, line {number}: label {label} is {both}")
        found.append((name, number_of))
    return found


def folder(split, args):
    """Anyone's own images: train/<class>/, or train/<task>/<class>/ for a sequence of domains, and test/ (or
    val/) of the same form; or images without labels, in train/ or, without it, in any folders below
    --data_dir. With --scenario domain and no test/, train/<task>/ may hold unlabelled images itself."""
    root = Path(args.data_dir)
    train, test = root / "train", next((root / x for x in ("test", "val") if (root / x).is_dir()), None)
    if test is not None and not train.is_dir():
        raise UserError(f"{root} has {test.name}/ but no train/: rename the folder, or --data_dir {test}")
    if split == "test" and test is None:
        return None
    sorted_in_folders = train.is_dir()
    root = test if split == "test" else train if sorted_in_folders else root
    names = list_images(root, strict=sorted_in_folders)
    parts = [tuple(name.split("/")[:-1]) for name in names]  # the folders that each image lies in
    depths = {len(p): name for p, name in zip(parts, names)}
    if not sorted_in_folders or set(depths) == {0}:
        return ImageSet(Files(root, names), torch.full((len(names),), -1), [], *IMAGENET_STATS)
    has_tasks = max(depths) == 2 or (args.scenario == "domain" and test is None)
    if len(depths) > 1 or max(depths) > 2 or (args.scenario == "domain" and not has_tasks):
        forms = "<class>/<image> throughout, or <task>/<class>/<image>, or images without folders"
        needs = "; --scenario domain needs <task>/" if args.scenario == "domain" else ""
        raise UserError(f"{root}: use {forms}; not {' and '.join(depths[d] for d in sorted(depths))}{needs}")
    tasks = ()
    if has_tasks:
        known = sorted({p[0] for p in parts})
        tasks = tuple(args.domain_order or known)
        if unknown := set(tasks) - set(known):
            raise UserError(f"--domain_order {_some(unknown)}: {root} has the tasks {', '.join(known)}")
        names, parts = zip(*((n, p) for n, p in zip(names, parts) if p[0] in tasks))
    classes = sorted({p[-1] for p in parts}) if max(depths) == 2 or not has_tasks else []
    number = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([number[p[-1]] if classes else -1 for p in parts])
    domains = torch.tensor([tasks.index(p[0]) for p in parts]) if has_tasks else None
    for domain, name in enumerate(tasks):
        if lacking := set(range(len(classes))) - set(labels[domains == domain].tolist()):
            lacking = _some(classes[label] for label in lacking)
            raise UserError(f"task folder {root / name} lacks classes of other tasks ({lacking})")
    return ImageSet(Files(root, names), labels, classes, *IMAGENET_STATS, domains, tasks)


def _some(names):
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def find_dataset(args):
    """The (train, probe, test) ImageSets that the data flags ask for: what is trained on, what a classifier
    is trained on (train itself in most cases) and what it is tested on; probe and test are None where there
    are no labels to evaluate with. Raises UserError where they are missing, unreadable, or do not fit each
    other."""
    order, where = args.domain_order or (), args.probe_data_dir or args.data_dir
    if len(set(order)) < len(order):
        raise UserError(f"--domain_order {' '.join(order)} names a domain twice")
    if args.sequence:
        from data.sequence import sequence

        train, test = sequence(args)
    else:
        train, test = (globals()[args.dataset](split, args) for split in ("train", "test"))
    if args.val_split:
        if args.probe_data_dir:
            raise UserError("--val_split, --probe_data_dir: both say what to test on: leave one of them out")
        if test is not None or (train.labels < 0).any():
            need = "for a folder with labels and without test/ or val/"
            raise UserError(f"--val_split {args.val_split:g}: {need}; leave it out")
        train, test = split_off(train, args.val_split, args.seed)
    if order and train.domains is None:
        raise UserError(f"--domain_order: {args.dataset} in {args.data_dir} has no domains")
    if args.download and train.streams and not train.one_size:
        raise UserError(f"--download: put {args.dataset} by hand into --data_dir {args.data_dir}")
    if args.probe_data_dir:
        other = copy.copy(args)
        other.data_dir, other.domain_order, other.scenario = args.probe_data_dir, None, "class"
        train.probe, test = folder("train", other), folder("test", other)
        if not train.probe.classes or test is None:
            form = "labelled images in train/<class>/ and test/<class>/"
            raise UserError(f"--probe_data_dir {args.probe_data_dir} needs {form}")
    probe = train.probe or train
    if test is None or (probe.labels < 0).all():
        probe = test = train.probe = None
    elif odd := _some(set(probe.classes) ^ set(test.classes)):
        raise UserError(f"{where}: train and test have different classes ({odd} in only one of them)")
    elif odd := _some(set(probe.domain_names) ^ set(test.domain_names)):
        raise UserError(f"{where}: train and test have different task folders ({odd} in only one of them)")
    for images in filter(None, (train.probe, test)):
        images.mean, images.std = train.mean, train.std  # what the network is trained with
    return train, probe, test


def split_off(images, share, seed):
    """Two ImageSets, the second with a random share of each class (of each domain). Raises UserError where it
    would take no image of a class, or all of them."""
    groups = images.labels if images.domains is None else images.labels + len(images.classes) * images.domains
    taken, none = share_of_each(groups, share, seed)
    left = torch.ones(len(groups), dtype=torch.bool).index_fill_(0, taken, False).nonzero()[:, 0]
    if none := none + [group for group in groups.unique().tolist() if group not in groups[left]]:
        name = images.classes[none[0] % len(images.classes)]
        raise UserError(f"--val_split {share:g} takes none or all of the images of {name}")
    return images.subset(left), images.subset(taken)


def share_of_each(groups, share, seed):
    """Ascending int64 indices of a random share of each group, and the groups that it holds none of. groups:
    int64 [N], -1 for none."""
    order, taken, none = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)), [], []
    for group in groups[groups >= 0].unique().tolist():
        members = order[groups[order] == group]
        taken.append(members[: round(share * len(members))])
        none += [] if len(taken[-1]) else [group]
    return torch.cat(taken).sort().values, none


def load_dataset(args):
    """`find_dataset`, with the cache that --cache asks for, and small images in memory."""
    train, _, test = find_dataset(args)
    if train.probe is not None:
        train.probe = _open(train.probe, "probe", args)
    train, test = _open(train, "train", args), None if test is None else _open(test, "test", args)
    return train, None if test is None else train.probe or train, test


def _open(images, name, args):
    """The ImageSet as it is to be used."""
    if images.streams and args.cache is not None:
        side = None if images.one_size else args.cache_size
        files, name = images.images, f"{args.dataset}_{name}"
        files.cache = open_cache(files, name, args.cache, side, args.skip_corrupt)
    if images.one_size:
        pixels, readable = load_all(images.images, args.skip_corrupt)
        return replace(images.subset(readable), images=pixels)
    return images
