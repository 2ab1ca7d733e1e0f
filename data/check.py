"""Reads every image of a data set once and says whether training would run.

examples:
    python -m data.check --dataset imagenet100 --data_dir DIR
    python -m data.check --dataset folder --data_dir DIR --scenario domain --batch_size 64

It reports how many images each class, domain and split has, which files cannot be read, which are stored in
an unusual way (they are used all the same, as upright RGB), and which look alike in train and test. The exit
status is 0 only if main_cssl.py with the same flags would train.
"""

import io
import statistics
import sys
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from data import DataError
from data.datasets import add_data_arguments, find_dataset
from data.files import decode_bytes, describe, in_parallel
from data.loader import Loader
from data.scenarios import SCENARIOS, plan
from utils.arguments import Parser

MODES = {
    "L": "greyscale",
    "1": "greyscale",
    "LA": "greyscale",
    "I;16": "greyscale, 16 bits",
    "P": "palette",
    "CMYK": "CMYK",
}
ORIENTATION = 274  # the EXIF tag
SHOWN = 20  # files in a list
MIN_EDGES = 80  # of a signature's 512, below which an image is too flat to be told from others
ALIKE = (
    0.8  # share of the edges of two images that are those of both; of unrelated photographs about a third are
)


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = add_data_arguments(parser)
    add("--scenario", choices=SCENARIOS, default="class", help="that training shall have")
    add(
        "--num_tasks",
        type="count",
        help="that training shall have (default: 5; one per domain with --scenario domain)",
    )
    add(
        "--batch_size",
        type="count",
        default=256,
        help="that training shall have: every task needs as many images",
    )
    add("--seed", type="index", default=5, help="of the order of classes")
    return parser.parse_args(argv)


def inspect(data):
    """What is to be said about a file's contents, uint8 [bytes]: (problem or None, [oddities], signature or
    None, size)."""
    try:
        pixels = decode_bytes(data)
        with Image.open(io.BytesIO(data)) as image:
            odd = [MODES[image.mode]] if image.mode in MODES else []
            if image.getexif().get(ORIENTATION, 1) != 1:
                odd.append("turned by EXIF")
    except Exception as error:  # as in data/files.py
        kinds = {EOFError: "empty", UnidentifiedImageError: "not an image"}
        kind = "truncated" if "truncated" in str(error) else kinds.get(type(error), "corrupt")
        return f"{kind} ({describe(error)})" if kind == "corrupt" else kind, [], None, None
    return None, odd, signature(pixels), tuple(pixels.shape[1:])


def signature(pixels):
    """bool [512], much the same for resized and recompressed copies of uint8 [3, H, W]: where a small grey
    copy of 17 x 17 pixels grows brighter from left to right, and from top to bottom."""
    small = F.interpolate(pixels.unsqueeze(0), (17, 17), mode="bilinear", antialias=True)[0].int().sum(dim=0)
    across, down = small[:16, 1:] > small[:16, :-1] + 3, small[1:, :16] > small[:-1, :16] + 3
    return torch.stack([across, down]).flatten()


def look_alikes(a, b, chunk=1024):
    """Pairs (i, j) of signatures a[i], b[j] (bool [N, 512], [M, 512]) that share ALIKE of their edges; flat
    images are left out."""
    pairs, b = [], b.float()
    for start in range(0, len(a), chunk):
        part = a[start : start + chunk].float()
        common, edges_a, edges_b = part @ b.T, part.sum(dim=1, keepdim=True), b.sum(dim=1)
        alike = (
            (common >= ALIKE * (edges_a + edges_b - common)) & (edges_a >= MIN_EDGES) & (edges_b >= MIN_EDGES)
        )
        pairs += [(start + i, j) for i, j in alike.nonzero().tolist()]
    return pairs


class Survey:
    """What was found in the images of one split; problems: {index: why} of those that training cannot use."""

    def __init__(self, name, images):
        self.name, self.images = name, images
        self.problems, self.oddities, sizes = {}, Counter(), {}
        self.signatures = torch.zeros(len(images.labels), 512, dtype=torch.bool)
        for i, (problem, odd, mark, sizes[i]) in enumerate(
            in_parallel(self.look, len(images.labels), f"reading {name}")
        ):
            if problem:
                self.problems[i] = problem
            self.oddities.update(odd)
            if mark is not None:
                self.signatures[i] = mark
        self.misfits = {}
        if images.one_size and len(set(sizes.values()) - {None}) > 1:
            common = Counter(size for size in sizes.values() if size).most_common(1)[0][0]
            self.misfits = {
                i: f"{s[1]}x{s[0]} pixels, others {common[1]}x{common[0]}"
                for i, s in sizes.items()
                if s not in (None, common)
            }

    def look(self, i):
        if not self.images.streams:
            return None, [], signature(self.images.images[i]), None
        try:
            return inspect(np.fromfile(self.images.images.path(i), np.uint8))
        except OSError as error:
            return describe(error), [], None, None

    def path(self, i):
        return self.images.images.path(i) if self.images.streams else f"{self.name} image {i}"

    def counts(self):
        """Images of each class: a list."""
        return torch.bincount(
            self.images.labels[self.images.labels >= 0], minlength=len(self.images.classes)
        ).tolist()

    def report(self):
        images, count = self.images, len(self.images.labels)
        line = f"{self.name}: {count} images"
        if (images.labels < 0).all():
            line += " without labels"
        else:
            counts = self.counts()
            line += f" of {len(counts)} classes, {min(counts)} to {max(counts)} each"
            line += f" (median {statistics.median(counts):g})"
        print(line)
        for number, domain in enumerate(images.domain_names):
            inside = images.labels[images.domains == number]
            print(f"  domain {domain}: {len(inside)} images of {len(inside.unique())} classes")
        if self.oddities:
            print(
                f"  stored unusually and used all the same: "
                f"{', '.join(f'{n} {kind}' for kind, n in sorted(self.oddities.items()))}"
            )
        if self.problems:
            print(f"  {len(self.problems)} cannot be read:")
            show(f"    {self.path(i)}: {problem}" for i, problem in self.problems.items())
        if self.misfits:
            print(f"  {len(self.misfits)} are of another size, where all have to be of one:")
            show(f"    {self.path(i)}: {misfit}" for i, misfit in self.misfits.items())


def show(lines):
    lines = list(lines)
    print("\n".join(lines[:SHOWN]))
    if len(lines) > SHOWN:
        print(f"    ... and {len(lines) - SHOWN} more")


def print_classes(surveys):
    """A line per class with its images in each split."""
    surveys = [s for s in surveys if s.images.classes and s.images.classes == surveys[-1].images.classes]
    if not surveys:
        return
    print(f"{'class':24}" + "".join(f"{s.name:>8}" for s in surveys))
    for name, *counts in zip(surveys[0].images.classes, *(s.counts() for s in surveys)):
        if name or any(counts):
            print(f"{name:24}" + "".join(f"{n:8}" for n in counts))
    print()


def main(args):
    """Prints the report; returns the exit status."""
    train, _, test = find_dataset(args)
    sets = {"train": train, "probe": train.probe, "test": test}
    start = time.monotonic()
    surveys = [Survey(name, images) for name, images in sets.items() if images is not None]
    count, seconds = sum(len(s.images.labels) for s in surveys), time.monotonic() - start
    print(f"read {count} images in {seconds:.1f} s ({count / seconds:.0f} images/s)\n")
    print_classes(surveys)
    for survey in surveys:
        survey.report()

    advice = []
    problems = sum(len(s.problems) for s in surveys)
    if problems and not args.skip_corrupt:
        advice.append(f"replace or remove the {problems} files that cannot be read, or pass --skip_corrupt")
    empty = [c or str(n) for n, c in enumerate(train.classes) if not (train.labels == n).any()]
    if empty:
        print(f"{len(empty)} of {len(train.classes)} classes have no training image:")
        show(f"    {name}" for name in empty)
    for other in surveys[:-1] if test is not None else []:
        pairs = look_alikes(other.signatures, surveys[-1].signatures)
        if pairs:
            print(
                f"{len(pairs)} pairs of images look alike in {other.name} and test: leave them out of one if "
                "they are the same"
            )
            show(f"    {other.path(i)} = {surveys[-1].path(j)}" for i, j in pairs)
    if any(s.misfits for s in surveys):
        advice.append("resize the images of another size")
    if any(len(s.problems) == len(s.images.labels) for s in surveys):
        advice.append("a whole split cannot be read")
    try:
        for task, part in enumerate(plan(train, test, args.scenario, args.num_tasks, args.seed).train):
            readable = part[~torch.isin(part, torch.tensor(list(surveys[0].problems), dtype=torch.int64))]
            Loader(None, readable, args.batch_size, (), train.mean, train.std, args.seed, task)
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
