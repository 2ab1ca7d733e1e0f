"""Offline evaluation of frozen networks: a linear probe or k-NN on their features, one classifier over all
classes.

examples:
    python main_linear.py --run runs/cifar100-class5-moco-pnr-seed5 --protocol knn python main_linear.py --run
    runs/cifar100-class5-moco-pnr-seed5 --label_fraction 0.01 python main_linear.py --checkpoint released.ckpt
    --backbone resnet18 --dataset cifar100 --data_dir DIR torchrun --nproc_per_node 4 -- main_linear.py --run
    DIR      (without the -- torchrun takes --run for a flag of its own)

--run evaluates the network after every task, with the run's own data set and settings unless flags say
otherwise, and adds the numbers to its results.json under the protocol's name. --checkpoint prints the numbers
of one network.
"""

import sys
from pathlib import Path

import torch

from data.datasets import DATASETS, add_data_arguments
from main_cssl import PRECISIONS, accuracies, build_data, frozen_features, report_errors
from models import BACKBONES, STEMS, build_backbone
from utils import RunError, checkpoint, distributed, evaluate
from utils.arguments import Parser
from utils.run import read_config, write_results

# what a flag, and the run that wrote the network, leave open
DEFAULTS = {
    "dataset": None,
    "data_dir": "datasets",
    "download": False,
    "cache_dir": None,
    "probe_data_dir": None,
    "domain_order": None,
    "cache": "none",
    "cache_size": 256,
    "skip_corrupt": False,
    "scenario": "class",
    "num_tasks": 1,
    "image_size": None,
    "backbone": "resnet18",
    "width": 64,
    "stem": "auto",
    "seed": 5,
    "precision": None,
    "probe_lr": 1.0,
    "probe_momentum": 0.0,
    "probe_views": "cached",
}


OF_DATA = {
    "data_dir",
    "cache_dir",
    "probe_data_dir",
    "domain_order",
    "cache",
    "cache_size",
    "scenario",
    "num_tasks",
}


def parse_arguments(argv=None):
    """The flags, with None where the run or DEFAULTS decides."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run", metavar="DIR", help="a run folder of main_cssl.py")
    add(
        "--checkpoint",
        metavar="FILE",
        help="a taskN.pt, or a checkpoint of PNR, CaSSLe, solo-learn, MoCo or torchvision",
    )
    add(
        "--protocol",
        dest="eval",
        choices=("linear", "knn"),
        default="linear",
        help="knn is quick, linear is what papers report",
    )
    add(
        "--label_fraction",
        type="share",
        default=1.0,
        help="share of each class's labels that the classifier sees, such as 0.01",
    )
    add(
        "--probe_lr",
        type="positive",
        help="of the linear probe (default: the run's, or 1); lower it if the probe diverges",
    )
    add("--probe_views", choices=("cached", "augmented"), help="what the linear probe learns from: plain "
                                                               "images, or random crops "
        "and flips, anew in each epoch, as in the papers' offline evaluation (default: the run's, or "
        "cached)")  # fmt: skip
    add("--probe_momentum", type="fraction", help="of the linear probe (default: the run's, or 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_data_arguments(parser)
    add = parser.add_argument_group("what the run does not say, or is to be overridden").add_argument
    add("--backbone", choices=BACKBONES)
    add("--width", type="count", help="base channels")
    add("--stem", choices=("auto", *STEMS))
    add("--image_size", type="count", help="side in pixels (default: that of the images)")
    add("--num_tasks", type="count", help="tasks to tell apart in the numbers")
    add("--seed", type="index", help="of the classes' order and of the probe's sample order")
    add("--precision", choices=PRECISIONS)
    parser.set_defaults(
        **dict.fromkeys(
            ("dataset", "data_dir", "download", "domain_order", "cache", "cache_size", "skip_corrupt")
        )
    )
    args = parser.parse_args(argv)
    if (args.run is None) == (args.checkpoint is None):
        parser.error("pass either --run DIR or --checkpoint FILE")
    return args


def main(args):
    process = distributed.start(args.device)
    if args.run:
        config = read_config(args.run)
        fixed = (
            "dataset",
            "num_tasks",
            "seed",
            "backbone",
            "width",
            "stem",
            "image_size",
            "domain_order",
            "cache",
            "cache_size",
        )
        for name in fixed:
            if getattr(args, name) not in (None, config.get(name)):
                raise RunError(
                    f"--{name} {getattr(args, name)} is not that of {args.run}, {config.get(name)}: leave it "
                    "out"
                )
        networks = []
        while (path := Path(args.run) / f"task{len(networks)}.pt").exists():
            networks.append(path)
    else:
        networks = [Path(args.checkpoint)]
        config = checkpoint.read_network(args.checkpoint)["config"] or {}
        if args.dataset not in (
            None,
            config.get("dataset"),
        ):  # what the network was trained on says nothing of these
            config = {name: value for name, value in config.items() if name not in OF_DATA}
    if not networks:
        raise RunError(f"{args.run} holds no task0.pt yet: its first task has not ended")
    for name, default in DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, config.get(name, default))
    if args.dataset not in DATASETS or args.backbone not in BACKBONES:
        raise RunError(
            f"{networks[0]} does not say what it was trained on: pass --dataset, --data_dir and --backbone"
        )

    _, probe, test, tasks = build_data(args, process)
    if test is None:
        raise RunError(
            f"{args.data_dir} has no labelled images in train/ and test/: pass --probe_data_dir DIR with both"
        )
    probe = keep_labels(probe, args.label_fraction, args.seed)
    torch.manual_seed(args.seed)
    backbone = build_backbone(args.backbone, args.width, args.stem).to(
        process.device, memory_format=torch.channels_last
    )
    what = f"--backbone {args.backbone} --width {args.width} --stem {args.stem}"
    name = args.eval + ("_augmented" if args.eval == "linear" and args.probe_views == "augmented" else "")
    name += f"_{args.label_fraction:g}" if args.label_fraction < 1 else ""
    share = f"; {100 * args.label_fraction:g} % of the labels" if args.label_fraction < 1 else ""

    def rows():
        return accuracies(
            args, process, backbone, probe, frozen_features(args, process, backbone, test), tasks
        )

    random_rows = rows() if args.run else {}
    matrices = {}
    for path in networks:
        checkpoint.load_strictly(backbone, checkpoint.read_network(path)["backbone"], path, what)
        for part, row in rows().items():
            matrices.setdefault(part, []).append(row)
            if process.main:
                mean = sum(row) / len(row)
                print(
                    f"{path}{part and f' ({part})'}: {mean:.2f} % (per task: "
                    f"{', '.join(f'{a:.2f}' for a in row)})",
                    flush=True,
                )
    if not process.main:
        return
    for part, matrix in matrices.items():
        block = evaluate.summary(
            matrix, args.num_tasks, evaluate.protocol_name(args, part) + share, random_rows.get(part)
        )
        print(block["protocol"])
        if args.run:
            print(f"{evaluate.format_matrix(matrix)}\n{evaluate.format_summary(block)}")
            write_results(args.run, {name + part.removeprefix("linear"): block})


def keep_labels(images, fraction, seed):
    """The ImageSet with a random share of each class, at least one image, the same for every network."""
    labels = images.labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    members = [order[labels[order] == label] for label in labels[labels >= 0].unique()]
    return (
        images
        if fraction == 1
        else images.subset(torch.cat([m[: max(1, round(fraction * len(m)))] for m in members]))
    )


if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(parse_arguments()), "main_linear.py"))
