"""Offline evaluation of frozen networks: a linear probe, k-NN or clustering on their features.

examples:
    python main_linear.py --run runs/cifar100-class5-moco-pnr-seed5 --protocol knn --task_masked
    python main_linear.py --run runs/cifar100-class5-moco-pnr-seed5 --probe_lr sweep --label_fraction 0.01
    python main_linear.py --run runs/cifar100-class5-moco-pnr-seed5 --transfer cifar10 svhn=DIR DIR
    python main_linear.py --checkpoint released.ckpt --dataset cifar100 --data_dir DIR --out results.json
    torchrun --nproc_per_node 4 -- main_linear.py --run DIR     (without -- torchrun takes --run for its own)

--run evaluates the network after every task, with the run's own data set and settings unless flags say
otherwise, and adds the numbers to its results.json under a name that says how they were made. --checkpoint
does so for one network, whose architecture is read off the file.
"""

import argparse
import copy
import math
import shlex
import sys
from itertools import takewhile
from pathlib import Path

from data import DATASETS, OF_TASKS, add_data_arguments, same_value
from losses import find
from models import add_network_arguments, resolve_network
from utils.arguments import Parser
from utils.stop import Stop

OF_DATA = [*OF_TASKS, "data_dir", "cache", "cache_size", "probe_data_dir", "val_split"]
OF_THE_RUN = [*OF_TASKS, "dataset", "seed", "backbone", "width", "stem", "cache_size", "val_split"]
OF_PROBE = "probe_lr probe_views probe_momentum".split()
NOT_OF_THE_RUN = "eval device workers out_dir reference download skip_corrupt".split()


def number_or(*words):
    """A type for argparse: a number, or one of the words that stand for some."""

    def parse(text):
        return text if text in words else float(text)

    parse.__name__ = " or ".join(["number", *words])
    return parse


def parse_arguments(argv=None, config=None):
    """config: the arguments of the run that wrote the networks, which are the defaults, as far as they are
    known."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run", metavar="DIR", help="a run folder of main_cssl.py")
    text = "a taskN.pt, or a checkpoint of PNR, CaSSLe, solo-learn, MoCo, Barlow Twins, VICReg, torchvision, "
    text += "timm or lightly"
    add("--checkpoint", metavar="FILE", help=text)
    add("--out", metavar="FILE", help="JSON for the results (default: results.json of --run)")
    text = "linear is what papers report, knn is quick, clustering needs no labels to learn from"
    add("--protocol", dest="eval", choices=("linear", "knn", "clustering"), default="linear", help=text)
    text = "other data sets to probe the networks on: names, NAME=DIR, or folders of train/<class>/ and test/"
    add("--transfer", nargs="+", metavar="DATA", help=text)
    text = "also: accuracy among the task's own classes, and how often the task is found (consolidation)"
    add("--task_masked", action="store_true", help=text)
    text = "share of each class's labels that the classifier sees, such as 0.01; the same for every network"
    add("--label_fraction", type=float, default=1.0, help=text)
    text = "of the linear probe; sweep: of 8 the best on a tenth of the training data that is held out"
    add("--probe_lr", type=number_or("sweep"), default=1.0, help=text)
    text = "what it learns from: plain images, or random crops and flips, anew in each epoch, as in papers"
    add("--probe_views", choices=("cached", "augmented"), default="cached", help=text)
    add("--probe_momentum", type=float, default=0.0, help="of the linear probe")
    text = "mean and deviation that images are normalised with: those that the network was trained with; the "
    text += "data set's own; or two or six numbers"
    words = number_or("run", "dataset")
    add("--normalize", type=words, nargs="+", default=["run"], metavar="run|dataset|M S", help=text)
    text = "a run of single tasks (main_cssl.py --single_tasks) that was evaluated likewise, for plasticity"
    add("--reference", metavar="DIR", help=text)
    add_data_arguments(parser), add_network_arguments(parser)
    known = {name: value for name, value in (config or {}).items() if name != "normalize"}
    parser.set_defaults(**{"dataset": None, "num_tasks": 1, **known})
    args = parser.parse_args(argv)
    check_arguments(parser, args, config)
    return args


def check_arguments(parser, args, config):
    """Ends the program where flags do not fit each other, or the run; and makes pairs of --normalize's
    numbers."""
    if (args.run is None) == (args.checkpoint is None):
        parser.error("pass either --run DIR or --checkpoint FILE")
    for name in (name for name in OF_THE_RUN if args.run and name in (config or {})):
        elsewhere = name == "val_split" and (args.transfer or config[name] is None)
        value = getattr(args, name)
        if value is not None and not same_value(name, value, config[name]) and not elsewhere:
            words = f"{getattr(args, name)} is not that of {args.run}, {config[name]}: leave it out"
            advice = ", or pass --transfer, --probe_data_dir or --checkpoint" * (name == "dataset")
            parser.error(f"--{name} {words}{advice}")
    parser.check_folder_of("out", args.out)
    others = [name for name in OF_PROBE if getattr(args, name) != parser.get_default(name)]
    if args.eval != "linear" and others:
        parser.error(f"--{others[0]}: belongs to --protocol linear")
    if args.eval == "clustering" and (args.label_fraction < 1 or args.task_masked):
        parser.error("--protocol clustering uses no labels: leave out --label_fraction and --task_masked")
    if args.reference and (not args.run or args.transfer or args.eval == "clustering"):
        parser.error("--reference: for the accuracy matrix of a --run, which has a plasticity")
    numbers = [x for x in args.normalize if isinstance(x, float) and math.isfinite(x)]
    if args.normalize not in (["run"], ["dataset"]):
        if not len(numbers) == len(args.normalize) in (2, 6) or min(numbers[len(numbers) // 2 :]) <= 0:
            parser.error("--normalize: choose run, dataset, or two or six numbers, deviations above 0")
        args.normalize = [numbers[:3], numbers[3:]] if len(numbers) == 6 else [[x] * 3 for x in numbers]


if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    stop, args = Stop("main_linear.py"), parse_arguments()

import torch

from data.datasets import load_dataset, share_of_each
from data.scenarios import plan
from models.resnet import build_backbone
from utils import UserError, checkpoint, distributed, evaluate, metrics
from utils.run import read_config, write_results


def main(args, argv=None):
    """argv: the command line that args are of, to be read again with the defaults that the networks give."""
    process = distributed.start(args.device)
    networks, config = find_networks(args, process)
    args = parse_arguments(argv, {k: v for k, v in config.items() if k not in NOT_OF_THE_RUN})
    targets = [(f"--transfer {name}", name) for name in args.transfer or ()]
    if args.run and args.probe_data_dir != config.get("probe_data_dir"):
        # on other images than the run's the columns of a matrix would not be its tasks
        targets.append((f"--probe_data_dir {args.probe_data_dir}", args.probe_data_dir))
    args.cache_size = None if args.cache is None else args.cache_size
    if args.dataset is None and not targets:
        raise UserError(f"{networks[0]} does not say what it was trained on: pass --dataset")
    if process.main and (path := results_path(args)):
        write_results(path, {})  # if it cannot be, that is told before anything is evaluated
    for other in [transfer_arguments(args, *target) for target in targets] or [args]:
        evaluate_networks(other, process, networks, config, other is not args)


def find_networks(args, process):
    """The paths of the networks that --run or --checkpoint names, and what is known of how they were made."""
    if args.run:
        config = read_config(args.run)
        paths = [Path(args.run) / f"task{task}.pt" for task in range(config["num_tasks"])]
        found = list(takewhile(Path.exists, paths))
        if not found:
            raise UserError(f"{args.run} holds no task0.pt: has its first task not ended yet?")
        for path in found:  # damage is told before anything is evaluated
            checkpoint.read_network(path)
        if process.main and len(found) < len(paths):
            missing = ", ".join(path.name for path in paths if path not in found)
            print(f"{args.run} is not complete, and evaluated without {missing}", flush=True)
        return found, config
    network = checkpoint.read_network(args.checkpoint)
    config = network["config"] or checkpoint.architecture(network["backbone"], args.checkpoint)
    unused = network["left_out"] | {key.split(".")[0] for key in network["heads"]}
    if process.main and unused and network["config"] is None:
        print(f"{args.checkpoint}: left out: {', '.join(sorted(unused))}", flush=True)
    if args.dataset not in (None, config.get("dataset")):  # what it was trained on says nothing of others
        config = {name: value for name, value in config.items() if name not in OF_DATA}
    return [Path(args.checkpoint)], config


def results_path(args):
    return Path(args.out) if args.out else Path(args.run) / "results.json" if args.run else None


def transfer_arguments(args, flag, name):
    """Those for another data set: NAME, NAME=DIR, or DIR."""
    other, (dataset, _, folder) = copy.copy(args), name.partition("=")
    if dataset in DATASETS:
        other.dataset, other.data_dir = dataset, folder or args.data_dir
    elif Path(name).is_dir():
        other.dataset, other.data_dir, other.download = "folder", name, False
    else:
        known = ", ".join(DATASETS)
        raise UserError(f"{flag}: neither a folder nor NAME or NAME=DIR with NAME one of {known}")
    if other.dataset != "folder" or any((Path(other.data_dir) / test).is_dir() for test in ("test", "val")):
        other.val_split = None
    vars(other).update(dict.fromkeys((*OF_TASKS, "probe_data_dir")), scenario="class", num_tasks=1)
    return other


def evaluate_networks(args, process, networks, config, transfer):
    """Evaluates the networks on one data set, prints the numbers and writes them. transfer: it is not the
    networks' own, so that a network has one accuracy, and none per task."""
    probe, test, tasks, source = load_images(args, process, config)
    settings = settings_of(args, config, source, transfer)
    matrix = args.run and not transfer and args.eval != "clustering"
    if matrix and args.reference:  # told before anything is evaluated
        metrics.reference_row(args.reference, *named(args, settings, ""), config)
    probe = keep_labels(probe, args, process, settings)
    torch.manual_seed(args.seed)
    backbone = build_backbone(args.backbone, args.width, args.stem)
    backbone.to(process.device, memory_format=torch.channels_last)
    extract = evaluate.features_of(args, process, backbone)

    def rows(network=None):
        """Of what stands in the backbone."""
        tested = extract(test)
        if args.eval != "clustering":
            ks = evaluate.KNN_K, 20
            return evaluate.accuracy_rows(args, process, extract, probe, tested, tasks, ks, args.task_masked)
        features, labels = map(process.gather, tested)
        codes = codes_of(network, features)
        scores = evaluate.clustering(features, labels, len(probe.classes), args.seed, codes)
        return {name: [score] for name, score in scores.items()}

    random_rows, found = rows() if matrix else {}, {}
    for path in networks:
        network = checkpoint.read_network(path)
        what = f"--backbone {args.backbone} --width {args.width} --stem {args.stem}"
        checkpoint.load_strictly(backbone, network["backbone"], path, what)
        for part, row in rows(network).items():
            found.setdefault(part, []).append(row)
            if process.main and part != "probe_lr":
                print(metrics.format_row(f"{path}{part and f' ({part})'}:", row), flush=True)
    if process.main:
        publish(args, config, settings, found, random_rows if matrix else None)


def load_images(args, process, config):
    """The ImageSets to learn from and to test on, on the device and normalised, the Tasks, and what the
    normalisation is, in a word."""
    train, probe, test = process.rank0_first(lambda: load_dataset(args))
    tasks = plan(train, test, args)
    if test is None:
        advice = "pass --probe_data_dir DIR with both" + ", or --val_split 0.2" * bool(train.classes)
        raise UserError(f"{args.data_dir} has no labelled images in train/ and test/: {advice}")
    if args.task_masked and not isinstance(tasks.names[0], list):
        raise UserError("--task_masked: needs --scenario class and several tasks, with classes of their own")
    args.image_size = args.image_size or config.get("image_size")
    resolve_network(args, train.side, process.device)
    source = normalize(args, config, probe, test)
    for images in (probe, test):
        images.to(process.device)
    return probe, test, tasks, source


def publish(args, config, settings, found, random_rows):
    """Prints and writes what was found, rows by part: blocks with a matrix and what is read off it where
    there are random_rows to compare with, those of a random network; else with a row, or scores, of each
    network."""
    rates, blocks = [lr for (lr,) in found.pop("probe_lr", ())], {}
    also = {"network": Path(args.checkpoint or args.run).resolve()} if args.out else {}
    also |= {"reference": Path(args.reference).resolve()} if args.reference else {}
    for part, rows in found.items():
        shown = "" if args.eval == "clustering" else part
        name, words = named(args, settings, shown)
        block = {"protocol": words, "settings": {"protocol": args.eval, **settings, "part": shown}}
        block |= {"probe_lr": rates} if rates else {}
        if args.eval == "clustering":
            block = {**next(iter(blocks.values()), block), part: [score for (score,) in rows]}
        elif random_rows is None:
            block["rows"] = rows
        else:
            single = args.reference and metrics.reference_row(args.reference, name, words, config)
            alone = config.get("single_tasks", False)
            block |= metrics.summary(rows, args.num_tasks, words, random_rows.get(part), single, alone, part)
        blocks[named(args, settings | also, shown)[0]] = block
    for name, block in blocks.items():
        print(f"\n{name}\n{block['protocol']}" + (f"; chosen: {rates}" if rates else ""))
        if "matrix" in block:
            print(f"{metrics.format_matrix(block['matrix'])}\n{metrics.format_summary(block)}")
    if path := results_path(args):
        write_results(path, blocks)


def settings_of(args, config, source, transfer):
    """What decides a number besides the networks, by name; what is as in the networks' own run is left
    out."""
    elsewhere = args.dataset == "folder" or args.data_dir != config.get("data_dir")
    elsewhere = elsewhere and "digits" not in args.dataset  # which come with a package
    dataset = args.dataset + f":{Path(args.data_dir).resolve()}" * elsewhere
    settings = {"dataset": dataset, "size": args.image_size, "normalize": source}
    settings |= {"transfer": True} if transfer else {}
    own = () if transfer else (*OF_TASKS, "probe_data_dir")
    for name in (*own, "seed", "precision", "val_split", "cache_size"):
        if not same_value(name, getattr(args, name), config.get(name)):
            settings[name] = getattr(args, name)
    if args.eval != "clustering":
        settings["labels"] = args.label_fraction
    if args.eval == "linear":
        settings |= {"lr": args.probe_lr, "momentum": args.probe_momentum, "views": args.probe_views}
    return settings


def named(args, settings, part):
    """The name of a block of results, and the words that stand beside its numbers."""
    values = (f"{name}={shlex.quote(str(value))}" for name, value in settings.items())
    words = evaluate.protocol_name(args, part)
    words += f"; {100 * args.label_fraction:g} % of the labels" if args.label_fraction < 1 else ""
    return " ".join([args.eval, *values, part]).rstrip(), words


def normalize(args, config, *image_sets):
    """Sets the mean and deviation of the ImageSets, and args.normalize, to what --normalize asks for; returns
    what that is, in a word."""
    if args.normalize == ["run"] and config.get("normalize"):
        source, args.normalize = "run", config["normalize"]
    elif args.normalize in (["run"], ["dataset"]):
        source, args.normalize = "dataset", [list(x) for x in (image_sets[0].mean, image_sets[0].std)]
    else:
        source = ",".join(str(x) for values in args.normalize for x in values)
    for images in image_sets:
        images.mean, images.std = args.normalize
    return source


def keep_labels(images, args, process, settings):
    """The ImageSet with the share of each class that --label_fraction asks for, the same for every network,
    and saved beside the results. Raises UserError where that is no image of a class."""
    if args.label_fraction == 1:
        return images
    kept, empty = share_of_each(images.labels.cpu(), args.label_fraction, args.seed)
    if empty:
        words = f"--label_fraction {args.label_fraction:g} leaves no image of {images.classes[empty[0]]}"
        raise UserError(f"{words}: choose a larger one")
    if process.main and (path := results_path(args)):
        drawn = {"dataset": settings["dataset"], "labels": args.label_fraction, "seed": args.seed}
        name = " ".join(f"{name}={value}" for name, value in {**drawn, "val_split": args.val_split}.items())
        write_results(path.with_name("labels.json"), {name: kept.tolist()})
    return images.subset(kept)


def codes_of(network, features):
    """FALCON's codes of features [N, F], int64 [N]; None for methods, and networks of others, without
    codes."""
    if network is None or "method" not in (network["config"] or ()):
        return None
    config = argparse.Namespace(**network["config"])
    method = find(config.method)(build_backbone(config.backbone, config.width, config.stem), config)
    state = {f"backbone.{name}": value for name, value in network["backbone"].items()} | network["heads"]
    method.to(features.device).load_state_dict(state)
    codes = method.codes(features)
    return codes and codes[0]


if __name__ == "__main__":
    sys.exit(distributed.report_errors(lambda: main(args), "main_linear.py"))
