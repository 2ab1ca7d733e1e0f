"""Reads every image of a data set once and says whether training would run.

examples:
    python -m data.check --dataset imagenet100 --data_dir DIR
    python -m data.check --dataset folder --data_dir DIR --scenario domain --batch_size 64

It reports how many images each class, domain and split has, which files cannot be read, and which are of
another size where all have to be of one. The exit status is 0 only if main_cssl.py with the same flags would
train.
"""

import sys
from collections import Counter

import torch

from data import DataError
from data.datasets import add_data_arguments, find_dataset
from data.files import in_parallel
from data.loader import Loader
from data.scenarios import SCENARIOS, plan
from utils.arguments import Parser

SHOWN = 20  # files in a list


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = add_data_arguments(parser)
    add("--scenario", choices=SCENARIOS, default="class", help="that training shall have")
    add("--num_tasks", type="count", help="that training shall have (default: 5; one per domain)")
    add("--batch_size", type="count", default=256, help="that training shall have: no task may be smaller")
    add("--seed", type="index", default=5, help="of the order of classes")
    return parser.parse_args(argv)


def read(name, images):
    """Decodes all files of an ImageSet: {index: why} of those that cannot be read, and of those of another
    size where all have to be of one."""
    if not images.streams:
        return {}, {}

    def size(i):
        try:
            return tuple(images.images.decode(i).shape[1:])
        except DataError as error:
            return str(error)

    found = list(in_parallel(size, len(images.labels), f"reading {name}"))
    unreadable = {i: why for i, why in enumerate(found) if isinstance(why, str)}
    sizes = Counter(size for size in found if not isinstance(size, str))
    common = sizes.most_common(1)[0][0] if images.one_size and sizes else None
    odd = {i: size for i, size in enumerate(found) if common and i not in unreadable and size != common}
    words = "{}: {}x{} pixels where others are {}x{}"
    misfits = {i: words.format(images.images.path(i), *s[::-1], *common[::-1]) for i, s in odd.items()}
    return unreadable, misfits


def show(title, lines):
    """A list of what is wrong, unless nothing is."""
    lines = list(lines)
    if lines:
        print("\n".join([f"  {len(lines)} {title}:", *(f"    {line}" for line in lines[:SHOWN])]))
        if len(lines) > SHOWN:
            print(f"    ... and {len(lines) - SHOWN} more")


def report(name, images, unreadable, odd):
    labels = images.labels[images.labels >= 0]
    print(f"{name}: {len(images.labels)} images" + ("" if len(labels) else " without labels"))
    if len(labels):
        counts = torch.bincount(labels, minlength=len(images.classes)).tolist()
        print(f"  {len(counts)} classes with {min(counts)} to {max(counts)} images:")
        print(
            "    " + ", ".join(f"{c or n} {k}" for n, (c, k) in enumerate(zip(images.classes, counts)) if k)
        )
    for number, domain in enumerate(images.domain_names):
        inside = images.labels[images.domains == number]
        print(f"  domain {domain}: {len(inside)} images of {len(inside.unique())} classes")
    show("cannot be read", unreadable.values())
    show("are of another size", odd.values())


def main(args):
    """Prints the report; returns the exit status."""
    train, _, test = find_dataset(args)
    advice, unreadable_of = [], {}
    for name, images in {"train": train, "probe": train.probe, "test": test}.items():
        if images is not None:
            unreadable_of[name], odd = read(name, images)
            report(name, images, unreadable_of[name], odd)
            if unreadable_of[name] and not args.skip_corrupt:
                advice.append(f"{name}: replace or remove what cannot be read, or pass --skip_corrupt")
            if len(unreadable_of[name]) == len(images.labels):
                advice.append(f"{name}: no image can be read")
            if odd:
                advice.append(f"{name}: resize the images of another size")
    try:
        for task, part in enumerate(plan(train, test, args.scenario, args.num_tasks, args.seed).train):
            left = part[~torch.isin(part, torch.tensor(list(unreadable_of["train"]), dtype=torch.int64))]
            Loader(None, left, args.batch_size, (), train.mean, train.std, args.seed, task)
    except DataError as error:
        advice.append(str(error))
    if advice:
        print("training would not run:\n" + "\n".join(f"  - {line}" for line in advice))
        return 2
    if test is None or (train.probe or train).labels.max() < 0:
        print("no labels to evaluate with: pass --probe_data_dir, or --eval none")
    print("training would run")
    return 0


if __name__ == "__main__":
    arguments = parse_arguments()
    try:
        sys.exit(main(arguments))
    except KeyboardInterrupt:
        print("data.check: stopped", file=sys.stderr)
        sys.exit(130)
    except (DataError, OSError) as error:
        print(f"data.check: error: {error}", file=sys.stderr)
        sys.exit(2)
