"""Reads every image of a data set once and says whether training would run.

examples:
    python -m data.check --dataset imagenet100 --data_dir DIR
    python -m data.check --dataset folder --data_dir DIR --scenario domain --batch_size 64

It reports how many images each class, domain and split has, which files cannot be read, and which are of
another size where all have to be of one. The exit status is 0 only if main_cssl.py would train with these
flags.
"""

import signal
import sys
from collections import Counter

from data import add_data_arguments
from utils.arguments import Parser
from utils.stop import Stop

SHOWN = 20  # files in a list


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = add_data_arguments(parser)
    add("--batch_size", type=int, default=256, help="that training shall have: no task may be smaller")
    return parser.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    stop, args = Stop("data.check"), parse_arguments()

import torch

from data.datasets import find_dataset
from data.files import decode_all
from data.scenarios import plan
from utils import UserError
from utils.distributed import report_errors


def read(name, images):
    """Decodes all files of an ImageSet: {index: why} of those that cannot be read, and of those of another
    size where all have to be of one."""
    if not images.streams:
        return {}, {}
    found = dict(enumerate(decode_all(images.images, f"reading {name}", lambda image: image.shape[1:])))
    unreadable = {i: str(why) for i, why in found.items() if isinstance(why, UserError)}
    sizes = {i: f"{found[i][1]}x{found[i][0]}" for i in found.keys() - unreadable.keys()}
    common = Counter(sizes.values()).most_common(1)[0][0] if images.one_size and sizes else None
    odd = {i: size for i, size in sizes.items() if common not in (None, size)}
    odd = {i: f"{images.images.path(i)}: {size}, not {common}" for i, size in odd.items()}
    return unreadable, odd


def report(name, images, problems):
    labels = images.labels[images.labels >= 0]
    print(f"{name}: {len(images.labels)} images" + ("" if len(labels) else " without labels"))
    if len(labels):
        counts = torch.bincount(labels, minlength=len(images.classes)).tolist()
        print(f"  {len(counts)} classes with {min(counts)} to {max(counts)} images:")
        names = (f"{c or n} {k}" for n, (c, k) in enumerate(zip(images.classes, counts)) if k)
        print(f"    {', '.join(names)}")
    for number, domain in enumerate(images.domain_names):
        inside = images.labels[images.domains == number]
        print(f"  domain {domain}: {len(inside)} images of {len(inside.unique())} classes")
    for title, found in zip(("cannot be read", "are of another size"), problems):
        lines = [found[i] for i in sorted(found)]
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        if lines:
            print(f"  {len(lines)} {title}:", *lines[:SHOWN], *more, sep="\n    ")


def main(args):
    """Prints the report; returns the exit status."""
    train, _, test = find_dataset(args)
    advice, unreadable = [], {}
    for name, images in {"train": train, "probe": train.probe, "test": test}.items():
        if images is not None:
            unreadable[name], odd = problems = read(name, images)
            report(name, images, problems)
            if unreadable[name] and not args.skip_corrupt:
                advice.append(f"{name}: replace or remove what cannot be read, or pass --skip_corrupt")
            if len(unreadable[name]) == len(images.labels):
                advice.append(f"{name}: no image can be read")
            if odd:
                advice.append(f"{name}: resize the images of another size")
    broken = torch.tensor(list(unreadable["train"]), dtype=torch.int64)
    try:
        for task, part in enumerate(plan(train, test, args).train):
            if (left := int((~torch.isin(part, broken)).sum())) < args.batch_size:
                advice.append(f"task {task} has {left} images, fewer than --batch_size {args.batch_size}")
    except UserError as error:
        advice.append(str(error))
    if advice:
        print("training would not run:", *advice, sep="\n  - ")
        return 2
    if test is None or (train.probe or train).labels.max() < 0:
        print("no labels to evaluate with: there will be no evaluation unless --probe_data_dir names some")
    print("training would run")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of "| head"
    sys.exit(report_errors(lambda: main(args), "data.check"))
