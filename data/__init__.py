"""From disk to two augmented views: datasets -> scenarios -> loader -> augment."""

import argparse
import os
from pathlib import Path

# functions in datasets.py
DATASETS = "digits textured_digits cifar10 cifar100 svhn stl10 imagenet100 imagenet domainnet folder".split()
SCENARIOS = ("class", "data", "domain")
# the flags that say what the tasks are
OF_TASKS = ("scenario", "num_tasks", "domain_order", "class_order", "task_sizes", "sequence")


def default_workers():
    """Processes that decode, so that all ranks of this machine together use its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def lines(path):
    """The lines of a file, but for empty ones: a type for argparse."""
    try:
        return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}") from error


def set_names(sequence):
    """What the sets of --sequence are called, wherever they lie; a folder has its own name."""
    pairs = (entry.partition(":")[::2] for entry in sequence or ())
    return [Path(place).resolve().name if dataset == "folder" else dataset for dataset, place in pairs]


def same_value(name, a, b):
    """Whether two values of a flag mean the same: the sets of --sequence may lie elsewhere."""
    return set_names(a) == set_names(b) if name == "sequence" else a == b


class Sequence(argparse.Action):
    """--sequence is a data set, of which each domain is a task."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.sequence, namespace.dataset, namespace.scenario = values, "sequence", "domain"


def add_data_arguments(parser):
    """The flags that say where images come from and what a task is; returns the group's add_argument."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="digits", help="(textured_)digits needs no download")
    add("--data_dir", default="datasets", help="where the data set lies, or is to be put by --download")
    add("--download", action="store_true", help="fetch the data set if it is missing")
    text = "train/<class>/ and test/<class>/ to evaluate with, for images without labels"
    add("--probe_data_dir", metavar="DIR", help=text)
    text = "share of a folder's training images, of each class, to test on where it has no test/, such as 0.2"
    add("--val_split", type=float, metavar="SHARE", help=text)
    text = "domains in the order of the tasks (default: the papers', or by name); fewer leave the others out"
    add("--domain_order", nargs="+", metavar="NAME", help=text)
    text = "processes that decode images of different sizes; raise it if training waits for data"
    add("--workers", type=int, default=default_workers(), help=text)
    text = "keep decoded images in a file there, once for all runs: makes epochs faster, and takes about "
    text += "0.25 MB for an image of 256 pixels; /dev/shm is memory"
    add("--cache", metavar="DIR", help=text)
    add("--cache_size", type=int, default=256, help="short side of cached images; larger than the views")
    text = "go on without images that cannot be read; python -m data.check lists them"
    add("--skip_corrupt", action="store_true", help=text)
    add("--scenario", choices=SCENARIOS, default="class", help="what changes from task to task")
    add("--num_tasks", type=int, help="1 is joint training, the upper bound (default: 5; one per domain)")
    text = "names of all classes, one a line, in the order in which they come (default: shuffled by --seed)"
    add("--class_order", type=lines, metavar="FILE", help=text)
    text = "classes of each task, where they are not equal"
    add("--task_sizes", type=int, nargs="+", metavar="N", help=text)
    text = "different data sets as tasks, such as cifar100:DIR svhn:DIR digits folder:DIR; each is held in "
    text += "memory at --image_size, and evaluated on its own classes"
    add("--sequence", action=Sequence, nargs="+", metavar="SET", help=text)
    add("--seed", type=int, default=5, help="of everything: class order, weights, sample order, views")
    return add
