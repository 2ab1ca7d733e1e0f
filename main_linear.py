"""Offline evaluation of frozen networks: a linear probe or k-NN on their features, one classifier over all
classes.

examples:
    python main_linear.py --run runs/cifar100-class5-moco-pnr-seed5 --protocol knn
    python main_linear.py --run runs/cifar100-class5-moco-pnr-seed5 --label_fraction 0.01
    python main_linear.py --checkpoint released.ckpt --backbone resnet18 --dataset cifar100 --data_dir DIR
    torchrun --nproc_per_node 4 -- main_linear.py --run DIR     (without -- torchrun takes --run for its own)

--run evaluates the network after every task, with the run's own data set and settings unless flags say
otherwise, and adds the numbers to its results.json under the protocol's name. --checkpoint prints the numbers
of one network.
"""

import sys
from pathlib import Path

from data import add_data_arguments
from models import add_network_arguments, resolve_network
from utils.arguments import Parser
from utils.stop import Stop

OF_DATA = "data_dir cache cache_size probe_data_dir domain_order scenario num_tasks".split()
OF_THE_RUN = "dataset num_tasks seed backbone width stem image_size domain_order cache_size".split()
NOT_OF_THE_RUN = "eval device workers out_dir".split()


def parse_arguments(argv=None, config=None):
    """config: the arguments of the run that wrote the networks, which are the defaults, as far as they are
    known."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run", metavar="DIR", help="a run folder of main_cssl.py")
    text = "a taskN.pt, or a checkpoint of PNR, CaSSLe, solo-learn, MoCo or torchvision"
    add("--checkpoint", metavar="FILE", help=text)
    text = "knn is quick, linear is what papers report"
    add("--protocol", dest="eval", choices=("linear", "knn"), default="linear", help=text)
    text = "share of each class's labels that the classifier sees, such as 0.01"
    add("--label_fraction", type=float, default=1.0, help=text)
    add("--probe_lr", type=float, default=1.0, help="of the linear probe; lower it if that diverges")
    text = "what it learns from: plain images, or random crops and flips, anew in each epoch, as in papers"
    add("--probe_views", choices=("cached", "augmented"), default="cached", help=text)
    add("--probe_momentum", type=float, default=0.0, help="of the linear probe")
    add_data_arguments(parser), add_network_arguments(parser)
    parser.set_defaults(**{"dataset": None, "num_tasks": 1, **(config or {})})
    args = parser.parse_args(argv)
    if (args.run is None) == (args.checkpoint is None):
        parser.error("pass either --run DIR or --checkpoint FILE")
    for name in OF_THE_RUN if args.run and config else ():
        if getattr(args, name) not in (None, config.get(name)):
            words = f"{getattr(args, name)} is not that of {args.run}, {config.get(name)}"
            parser.error(f"--{name} {words}: leave it out")
    return args


if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    stop, args = Stop("main_linear.py"), parse_arguments()

from itertools import takewhile

import torch

from data.datasets import load_dataset
from data.scenarios import plan
from models.resnet import build_backbone
from utils import UserError, checkpoint, distributed, evaluate
from utils.run import read_config, write_results


def main(args, argv=None):
    """argv: the command line that args are of, to be read again with the defaults that the run gives."""
    process = distributed.start(args.device)
    networks = [Path(args.checkpoint or "")]
    if args.run:
        config = read_config(args.run)
        paths = [Path(args.run) / f"task{task}.pt" for task in range(config["num_tasks"])]
        networks = list(takewhile(Path.exists, paths))
    else:
        config = checkpoint.read_network(args.checkpoint)["config"] or {}
        if args.dataset not in (None, config.get("dataset")):  # what it was trained on says nothing of others
            config = {name: value for name, value in config.items() if name not in OF_DATA}
    if not networks:
        raise UserError(f"{args.run} holds no task0.pt yet: its first task has not ended")
    args = parse_arguments(argv, {k: v for k, v in config.items() if k not in NOT_OF_THE_RUN})
    if args.dataset is None:
        raise UserError(f"{networks[0]} does not say what it was trained on: pass --dataset and --backbone")

    train, probe, test = process.rank0_first(lambda: load_dataset(args))
    tasks = plan(train, test, args.scenario, args.num_tasks, args.seed)
    if test is None:
        advice = "pass --probe_data_dir DIR with both"
        raise UserError(f"{args.data_dir} has no labelled images in train/ and test/: {advice}")
    resolve_network(args, train.side, process.device)
    for images in (probe, test):
        images.to(process.device)
    probe = keep_labels(probe, args.label_fraction, args.seed)
    torch.manual_seed(args.seed)
    backbone = build_backbone(args.backbone, args.width, args.stem)
    backbone.to(process.device, memory_format=torch.channels_last)
    extract = evaluate.features_of(args, process, backbone)

    def rows():
        return evaluate.accuracy_rows(args, process, extract, probe, extract(test), tasks)

    random_rows = rows() if args.run else {}
    matrices, what = {}, f"--backbone {args.backbone} --width {args.width} --stem {args.stem}"
    for path in networks:
        checkpoint.load_strictly(backbone, checkpoint.read_network(path)["backbone"], path, what)
        for part, row in rows().items():
            matrices.setdefault(part, []).append(row)
            if process.main:
                print(evaluate.format_row(f"{path}{part and f' ({part})'}: accuracy (%)", row), flush=True)
    name = args.eval + ("_augmented" if args.eval == "linear" and args.probe_views == "augmented" else "")
    name += f"_{args.label_fraction:g}" if args.label_fraction < 1 else ""
    share = f"; {100 * args.label_fraction:g} % of the labels" if args.label_fraction < 1 else ""
    for part, matrix in matrices.items() if process.main else ():
        words = evaluate.protocol_name(args, part) + share
        block = evaluate.summary(matrix, args.num_tasks, words, random_rows.get(part))
        print(words)
        if args.run:
            print(f"{evaluate.format_matrix(matrix)}\n{evaluate.format_summary(block)}")
            write_results(args.run, {name + part.removeprefix("linear"): block})


def keep_labels(images, fraction, seed):
    """The ImageSet with a random share of each class, at least one image, the same for every network."""
    if fraction == 1:
        return images
    labels = images.labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    members = [order[labels[order] == label] for label in labels[labels >= 0].unique()]
    return images.subset(torch.cat([m[: max(1, round(fraction * len(m)))] for m in members]))


if __name__ == "__main__":
    sys.exit(distributed.report_errors(lambda: main(args), "main_linear.py"))
