"""Continual self-supervised learning: trains one network on a sequence of unlabelled tasks and evaluates it
after each.

examples:
    python main_cssl.py --backbone resnet10 --width 16 --image_size 16 --epochs 60 --batch_size 64
    --moco_queue_size 256 python main_cssl.py --dataset cifar100 --data_dir DIR --download --regularizer pnr
    torchrun --nproc_per_node 4 main_cssl.py ...      (batch size and learning rate stay those of one process)

The same command again resumes a run. run_cifar100.sh holds the paper's settings. --method X --regularizer Y
--help shows the flags of X and Y.
"""

import copy
import errno
import sys
import warnings
from itertools import repeat

import torch
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from data import DataError
from data.augment import ViewConfig
from data.datasets import add_data_arguments, load_dataset
from data.files import bar
from data.loader import (
    EVALUATION_BATCH,
    LABELLED,
    PROBED,
    Loader,
    evaluation_batches,
    evaluation_share,
    generator,
)
from data.scenarios import DEFAULT_TASKS, SCENARIOS, plan
from data.stream import TIMEOUT, Crops, Stream, StreamLoader, close_all, evaluation_stream
from losses import METHODS, REGULARIZERS
from losses.base import MethodError
from models import BACKBONES, STEMS, build_backbone
from models.learner import Learner
from models.online import OnlineProbe
from utils import RunError, checkpoint, distributed, evaluate
from utils.arguments import Parser
from utils.collapse import COLLAPSED_STD, collapsed, health, plot_spectrum
from utils.optim import LARS, warmup_cosine
from utils.run import Run, Stopped, StopRequest, ignore_signals

OPTIMIZERS = {"lars": LARS, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
KNOWN_ERRORS = {
    "DataLoader timed out": f"no images came for {TIMEOUT} s: does the disk of --data_dir answer?",
    "DataLoader worker": "a worker process that decodes images was killed, as a system does that runs out of "
    "memory (or a "
    "container out of shared memory): lower --workers or --batch_size",
    **dict.fromkeys(
        ("closed by peer", "reset by peer", "remote process exited"),
        "another process of this run ended without a word, as one does that is killed or whose machine fails",
    ),
}
COLLAPSED = "the network has collapsed in {}: its outputs hardly differ between images; lower --lr"
SHORT = 50  # epochs a task, below which the released schedule has no room for its warm-up
STREAM_SIZE = 224  # of views of images that differ in size
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments(argv=None):
    """All flags; those of the method and the regulariser are the ones that the chosen classes declare."""
    parser = Parser(__doc__)
    add = add_data_arguments(parser)
    add("--scenario", choices=SCENARIOS, default="class", help="what changes from task to task")
    add("--num_tasks", type="count", help="1 is joint training, the upper bound (default: 5; one per "
        "domain with --scenario domain)")  # fmt: skip
    add("--image_size", type="count", help="side of the views in pixels (default: that of the images; 224 "
        "if they differ in size)")  # fmt: skip
    add("--min_scale", type="fraction", default=0.08, help="smallest share of the area that a crop keeps")
    pair = {"type": "fraction", "nargs": 2, "metavar": ("P1", "P2")}
    add("--blur_p", **pair, default=(0.0, 0.0), help="probability of blur in view 1 and view 2")
    add("--solarize_p", **pair, default=(0.0, 0.2), help="probability of solarising in view 1 and view 2")

    add = parser.add_argument_group("model").add_argument
    add("--method", choices=METHODS, default="moco", help="self-supervised loss")
    add("--regularizer", choices=REGULARIZERS, default="pnr", help="what keeps the old tasks")
    add("--backbone", choices=BACKBONES, default="resnet18")
    add("--width", type="count", default=64, help="base channels; 16 teaches and tests quickly")
    add("--stem", choices=("auto", *STEMS), default="auto", help="first layers; auto: cifar up to 64 pixels")
    add("--init_from", metavar="CKPT", help="a task0.pt, or a released checkpoint, to start from instead "
        "of training task 0")  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type="count", default=500, help="per task")
    add("--batch_size", type="count", default=256, help="global, over all processes")
    add("--lr", type="positive", help="per 256 images; used is lr x batch_size / 256 (default: the "
        "method's)")  # fmt: skip
    add("--optimizer", choices=OPTIMIZERS, help="(default: the method's; lars for all but falcon)")
    add("--weight_decay", type="weight", help="(default: the method's)")
    add("--lr_schedule", choices=("epoch", "step"), help="when the rate is set: every epoch, as released, "
        "or every step (default: epoch; step for falcon, and under 50 epochs a task, where a jump can make "
        "a run collapse)")  # fmt: skip
    add("--warmup_epochs", type="weight", help="linear warm-up (default: 10; a third of runs under 50)")
    add("--seed", type="index", default=5, help="of everything: class order, weights, sample order, views")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=PRECISIONS, help="autocast type (default: bf16 on CUDA, fp32 on CPU); "
        "losses are always fp32")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile: slower to start, pays on long runs")

    add = parser.add_argument_group("evaluation and output").add_argument
    add("--eval", choices=("linear", "knn", "none"), default="linear", help="after every task; knn is "
        "quick, linear is the papers'")  # fmt: skip
    add("--probe_views", choices=("cached", "augmented"), default="cached", help="what the linear probe "
        "learns from: features made once; or, as in the papers' offline evaluation, random crops and flips, "
        "which pass through the network anew in each of its 100 epochs")  # fmt: skip
    add("--probe_lr", type="positive", help="of the linear probe (default: the method's); lower it if that "
        "diverges")  # fmt: skip
    add("--probe_momentum", type="fraction", default=0.0, help="of the linear probe: 0 as in PNR's "
        "release, 0.9 as in CaSSLe's")  # fmt: skip
    add("--online_probe", choices=("off", "clean", "released"), default="off", help="a linear classifier "
        "over all classes that learns beside the network, as in the papers' CIFAR tables. clean: changes "
        "nothing of the training; released: as in the papers' code, its images pass through the backbone "
        "(and the momentum encoder's) in training mode, so that running statistics see all classes, later "
        "ones too")  # fmt: skip
    add("--online_lr", type="positive", help="of the online probe (default: the method's); not per 256")
    add("--out_dir", help="the run's folder (default: "
        "runs/<dataset>-<scenario><tasks>-<method>-<regularizer>-seed<seed>)")  # fmt: skip
    add("--save_every", type="interval", default="10m", help="steps (500) or time (90s, 10m, 1h) between "
        "checkpoints; also at each epoch's end, unless saving takes over a tenth of the time")  # fmt: skip
    add("--log_every", type="count", default=50, help="steps between lines in metrics.jsonl and TensorBoard")

    chosen = parser.peek(argv, "--method", "--regularizer")
    for name, registry in zip(chosen, (METHODS, REGULARIZERS)):
        if name in registry:
            registry[name].add_arguments(parser.add_argument_group(name).add_argument)
    args = parser.parse_args(argv)
    method = METHODS[args.method]
    REGULARIZERS[args.regularizer].resolve(args)
    for name in ("optimizer", "lr", "weight_decay", "probe_lr", "online_lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(method, name))
    short = args.epochs < SHORT
    args.lr_schedule = args.lr_schedule or ("step" if short else method.lr_schedule)
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, args.epochs / 3) if short else 10
    if args.num_tasks is None and args.scenario != "domain":
        args.num_tasks = DEFAULT_TASKS
    if args.out_dir is None:
        tasks = f"{args.dataset}-{args.scenario}{args.num_tasks or ''}"
        args.out_dir = f"runs/{tasks}-{args.method}-{args.regularizer}-seed{args.seed}"
    return args


def main(args):
    stop = StopRequest()
    process = distributed.start(args.device)
    train, probe, test, tasks = build_data(args, process)
    loaders = build_loaders(args, process, train, tasks)
    labelled_loaders = build_labelled_loaders(args, process, probe, loaders)
    learner = build_learner(args, process, probe)
    initial = load_initial(args, process, learner, tasks)
    run = Run(vars(args), {"tasks": tasks.names, "digest": train.digest}, tasks.train, process, stop)
    if process.main:
        print_settings(args, process, train, tasks, loaders, learner, run)
    if args.eval != "none" and not run.matrices and not run.random_rows:
        tested = frozen_features(args, process, learner.method.backbone, test)
        run.random_rows = accuracies(args, process, learner.method.backbone, probe, tested, tasks)
    if initial is not None:
        learner.load_state_dict(initial)

    for task in range(run.task, args.num_tasks):
        loader, epochs = loaders[task], 0 if task == 0 and args.init_from else args.epochs
        torch.manual_seed(generator(args.seed, task).initial_seed())
        learner.begin_task(task, process.device, loader)
        optimizer = build_optimizer(args, learner)
        scaler = GradScaler(process.device.type, enabled=args.precision == "fp16")
        run.begin_task(task, epochs, loader, learner=learner, optimizer=optimizer, scaler=scaler)
        model = wrap(learner, process, args.compile)
        with stop.deferred():
            for epoch in range(run.epoch, epochs):
                labelled = repeat(None)
                if learner.online is not None:
                    labelled = labelled_loaders[task].labelled(probe.labels, epoch, run.step)
                batches = zip(loader.epoch(epoch, run.step), labelled)
                train_one_epoch(args, run, model, learner, optimizer, scaler, epoch, batches)
        if run.finished == task:  # otherwise the run was interrupted after this evaluation
            learner.regularizer.end_task(task, learner.method, loader)
            save_network(run, learner)
            if args.eval != "none" or args.online_probe != "off":
                evaluate_task(args, process, run, learner, probe, test, tasks)
            elif epochs and run.last_std < COLLAPSED_STD:
                tell_collapse(run)
        run.end_task()
    skipped = process.union({*loaders[0].skipped, *(labelled_loaders[0].skipped if labelled_loaders else ())})
    if process.main:
        print_results(run, args, skipped)
    return int(bool(run.collapsed))


def train_one_epoch(args, run, model, learner, optimizer, scaler, epoch, batches):
    """batches: of what is left of the epoch, two views and what the online probe learns from (or None)."""
    for (view1, view2), labelled in run.clock.watch(batches, args.batch_size):
        set_lr(optimizer, args, epoch, run.step, run.loader.steps)
        loss, terms, student, teacher = model(view1, view2, labelled)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # LARS weighs the true gradient against the weight
        learner.regularizer.before_step(learner.method)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        learner.after_step(student, teacher, run.progress.share)
        run.end_step(terms, student, (view1, view2))
    run.end_epoch()


def load_initial(args, process, learner, tasks):
    """The state that a new run starts from, read from --init_from; None where it starts from random weights
    or is resumed."""
    if not args.init_from or checkpoint.exists(args.out_dir):
        return None
    initial = copy.deepcopy(learner)
    names = f"--method {args.method} --backbone {args.backbone} --width {args.width} --stem {args.stem}"
    note = checkpoint.load_method(initial.method, args.init_from, names, tasks.names, initial.online)
    if process.main:
        print(note, flush=True)
    return initial.state_dict()


def build_data(args, process):
    """ImageSets to train on, to train classifiers on and to test on, in memory on the device, and the Tasks;
    settles --image_size, --stem, --precision and --num_tasks where left open, and --eval where there is
    nothing to evaluate with."""
    train, probe, test = process.first(lambda: load_dataset(args))
    process.agree(False, True)  # all ranks have opened the caches
    args.image_size = args.image_size or (STREAM_SIZE if train.streams else train.images.shape[-1])
    if args.stem == "auto":
        args.stem = "cifar" if args.image_size <= 64 else "imagenet"
    args.precision = args.precision or ("bf16" if process.device.type == "cuda" else "fp32")
    tasks = plan(train, test, args.scenario, args.num_tasks, args.seed)
    args.num_tasks = len(tasks.names)
    if test is None:
        args.eval = "none"
    train.digest = train.checksum()
    for images in filter(None, (train, train.probe, test)):
        images.to(process.device)
    return train, probe, test, tasks


def build_loaders(args, process, train, tasks):
    """One Loader per task; where images stream, they share one pool of workers."""
    if args.batch_size < 2:
        raise RunError("--batch_size 1: batch norms and losses compare the images of a batch; use at least 2")
    if args.batch_size % process.world:
        raise RunError(
            f"--batch_size {args.batch_size} is that of all processes and does not divide by "
            f"{process.world}: change it"
        )
    views = [ViewConfig(args.image_size, args.min_scale, *p) for p in zip(args.blur_p, args.solarize_p)]
    kind, images = Loader, train.images
    if train.streams:
        crops = Crops(images, args.image_size, [view.min_scale for view in views])
        kind, images = StreamLoader, Stream(crops, args.workers, process.device, args.skip_corrupt)
    shared = (args.batch_size, views, train.mean, train.std, args.seed)
    return [
        kind(images, part, *shared, task, process.rank, process.world)
        for task, part in enumerate(tasks.train)
    ]


def build_labelled_loaders(args, process, probe, loaders):
    """For the online probe: beside each task's Loader one that serves all labelled images, under view 2's
    augmentation."""
    if args.online_probe == "off":
        return []
    if probe is None:
        raise DataError(f"--online_probe {args.online_probe}: {args.data_dir} has no labels in train/ and "
                        "test/: pass "
                        "--probe_data_dir DIR with both, or --online_probe off")  # fmt: skip
    view = ViewConfig(args.image_size, args.min_scale, args.blur_p[1], args.solarize_p[1])
    kind, images = Loader, probe.images
    if probe.streams:
        crops = Crops(images, args.image_size, [view.min_scale])
        kind, images = StreamLoader, Stream(crops, args.workers, process.device, args.skip_corrupt)
    known = (probe.labels >= 0).nonzero()[:, 0].cpu()
    shared = (known, args.batch_size, [view], probe.mean, probe.std, args.seed)
    ranks = (process.rank, process.world)
    return [
        kind(images, *shared, LABELLED + task, *ranks, loader.steps) for task, loader in enumerate(loaders)
    ]


def build_learner(args, process, probe=None):
    """Backbone, method, regulariser and online probe as the flags say, with weights from the seed,
    channels_last on the device. probe: the ImageSet that classifiers are trained on."""
    torch.manual_seed(args.seed)
    method = METHODS[args.method](build_backbone(args.backbone, args.width, args.stem), args)
    regularizer, online = REGULARIZERS[args.regularizer](args), None
    if args.online_probe != "off":
        online = OnlineProbe(method.backbone.feature_dim, len(probe.classes), args.online_probe)
    learner = Learner(method, regularizer, online, PRECISIONS[args.precision])
    return learner.to(process.device, memory_format=torch.channels_last)


def build_optimizer(args, learner):
    probe = [] if learner.online is None else list(learner.online.parameters())
    groups = [
        {
            "params": [
                p for p in learner.parameters() if p.requires_grad and all(p is not own for own in probe)
            ]
        }
    ]
    if probe:
        groups.append({"params": probe, "lr": args.online_lr, "weight_decay": 0.0})
    options = {"lr": args.lr * args.batch_size / 256, "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "lars":
        options["exclude_bias_n_norm"] = learner.method.exclude_bias_n_norm
    optimizer = OPTIMIZERS[args.optimizer](groups, **options)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer, args, epoch, step, steps):
    """For a step of an epoch of `steps`, by --lr_schedule. Returns the network's rate."""
    t, unit = (epoch, 1) if args.lr_schedule == "epoch" else (epoch * steps + step, steps)
    for group in optimizer.param_groups:
        span = args.epochs * unit, round(args.warmup_epochs * unit)
        group["lr"] = warmup_cosine(t, group["base_lr"], *span, METHODS[args.method].warmup_start_lr)
    return optimizer.param_groups[0]["lr"]


def wrap(learner, process, compiled):
    """What the loop calls: the learner, compiled where asked for, inside DDP where there are several
    processes."""
    if compiled:
        learner.compile()
    if process.world == 1:
        return learner
    ids = [process.device.index] if process.device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch rename broadcast_buffers
        # buffers (queues, running statistics) are the same on every rank by construction
        return DistributedDataParallel(
            learner, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def frozen_features(args, process, backbone, images, epoch=None):
    """Of the images of an ImageSet that are this rank's share: features float32 [n, F], and labels. epoch: of
    a linear probe that learns from augmented views; None: plain images."""
    share = evaluation_share(len(images.labels), process.rank, process.world)
    count, first = share.stop - share.start, share.start // EVALUATION_BATCH
    setting = (
        args.image_size,
        images.mean,
        images.std,
        None if epoch is None else (args.seed, PROBED, epoch),
    )
    if not count:
        batches = ()
    elif images.streams:
        batches = evaluation_stream(images, share, *setting, process.device, args.workers, args.skip_corrupt)
    else:
        batches = evaluation_batches(images.images[share], first, *setting)
    title, total = "evaluating" if epoch is None else f"probe epoch {epoch}", -(-count // EVALUATION_BATCH)
    shown = bar(batches, desc=title, total=total, unit="batch", leave=False, disable=not process.main)
    features = evaluate.extract(backbone, shown, PRECISIONS[args.precision])
    return features, images.labels[share]  # of which extraction has struck out those of skipped images


def accuracies(args, process, backbone, probe, tested, tasks):
    """Rows of a[k][t], the accuracy on each task, by the protocol args.eval: "" that of one classifier; where
    domains are probed linearly, "linear_per_domain" that of one for each domain, which learns from its own
    images. tested: the test images' features and labels, as frozen_features gives them."""
    augmented = args.eval == "linear" and args.probe_views == "augmented"
    cached, labels = frozen_features(args, process, backbone, probe, 0 if augmented else None)
    known, test_y = labels >= 0, process.gather(tested[1])
    if not sum(process.counts(int(known.sum()))) or not (test_y >= 0).any():
        raise DataError("no image to evaluate with can be read: is the disk there?")

    def features(epoch):
        return frozen_features(args, process, backbone, probe, epoch)[0] if augmented and epoch else cached

    parts = [known]
    if (
        args.eval == "linear"
        and args.scenario == "domain"
        and probe.domains is not None
        and len(tasks.names) > 1
    ):
        share = evaluation_share(len(probe.labels), process.rank, process.world)
        own = probe.domains[share].to(labels.device)
        parts += [known & (own == domain) for domain in range(len(tasks.names))]
    predictions = evaluate.classify(args, process, features, labels, parts, tested[0], len(probe.classes))
    joint, *others = map(process.gather, predictions)
    rows = {"": evaluate.accuracy_row(joint, test_y, tasks.test)}
    if others:
        pairs = zip(others, tasks.test)
        rows["linear_per_domain"] = [evaluate.accuracy_row(found, test_y, [part])[0] for found, part in pairs]
    return rows


def tell_collapse(run):
    run.collapsed.append(run.task)
    run.progress.warn(COLLAPSED.format(f"task {run.task}"))


def evaluate_task(args, process, run, learner, probe, test, tasks):
    """Adds the rows of the task to the matrices of the run, and publishes these and the collapse monitors of
    the test features."""
    backbone = learner.method.backbone
    tested = frozen_features(args, process, backbone, test)
    rows = accuracies(args, process, backbone, probe, tested, tasks) if args.eval != "none" else {}
    if learner.online is not None:
        predictions, labels = process.gather(learner.online.predict(tested[0])), process.gather(tested[1])
        rows[f"online_linear_{args.online_probe}"] = evaluate.accuracy_row(predictions, labels, tasks.test)
    features = process.gather(tested[0])
    monitors, spectrum = health(features, learner.method.codes(features))
    run.log.figure("collapse/spectrum", plot_spectrum(spectrum), run.global_step)
    if collapsed(monitors):
        tell_collapse(run)
    for name, row in rows.items():
        run.matrices.setdefault(name, []).append(row)
    for name, block in blocks(args, run).items():
        run.publish(name, block, monitors, f"{args.method} + {args.regularizer}")
        monitors = {}  # logged once
        if process.main:
            print(evaluate.format_row(run.task, block), flush=True)


def blocks(args, run):
    """What results.json says of the protocols that are evaluated while training, by name; "" is that of
    --eval."""
    return {
        name: evaluate.summary(
            matrix, args.num_tasks, evaluate.protocol_name(args, name), run.random_rows.get(name)
        )
        for name, matrix in run.matrices.items()
    }


def save_network(run, learner):
    """taskN.pt: the backbone under torchvision's names, the rest of the method as heads, and the online
    probe's classifier."""
    state = learner.method.state_dict()
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    heads = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    if run.main:
        network = {
            "backbone": backbone,
            "heads": heads,
            "config": run.arguments,
            "task": run.task,
            "tasks": run.data["tasks"],
        }
        if learner.online is not None:
            network["online"] = learner.online.state_dict()
        checkpoint.save(run.folder / f"task{run.task}.pt", network)


def print_settings(args, process, train, tasks, loaders, learner, run):
    millions = sum(p.numel() for p in learner.method.backbone.parameters()) / 1e6
    sizes = ", ".join(str(len(loader.indices)) for loader in loaders)
    rate = args.lr * args.batch_size / 256
    resumed = f" (resumed at task {run.task}, epoch {run.epoch}, step {run.step})" if run.resumed else ""
    print(
        f"{args.method} + {args.regularizer}, {args.backbone} with {args.stem} stem, {millions:.1f} M "
        "parameters\n"
        f"{process.world} x {process.device}, {args.precision}, torch {torch.__version__}\n"
        f"{args.dataset}, {args.scenario}-incremental: {len(loaders)} tasks of {sizes} images, "
        f"{args.image_size} px, "
        f"{args.epochs} epochs a task\n"
        f"global batch {args.batch_size}, lr {rate:g} (= {args.lr:g} x {args.batch_size} / 256), weight "
        "decay "
        f"{args.weight_decay:g}, {args.warmup_epochs:.3g} epochs of warm-up, seed {args.seed}\n"
        f"run folder: {run.folder}{resumed}",
        flush=True,
    )
    if tasks.test is None:
        print(f"no evaluation: {args.data_dir} has no labels in train/ and test/; --probe_data_dir names "
              "labelled images, now or "
              "later with main_linear.py")  # fmt: skip
    if args.online_probe != "off":
        where = {"clean": "the backbone in eval mode", "released": "the backbone in training mode"}[
            args.online_probe
        ]
        if args.online_probe == "released":
            where += (
                ", and the momentum encoder's"
                if learner.method.ema
                else f" ({args.method} has no momentum encoder)"
            )
        print(
            f"online probe, lr {args.online_lr:g}: labelled images of all tasks pass through {where}",
            flush=True,
        )
    if train.domain_names:
        print(f"domains: {', '.join(train.domain_names)}", flush=True)


def print_results(run, args, skipped):
    for block in blocks(args, run).values():
        print(
            f"\naccuracy (%), "
            f"{block['protocol']}\n{evaluate.format_matrix(block['matrix'])}\n{evaluate.format_summary(block)}"
        )
    if skipped:
        print(
            f"{len(skipped)} training images could not be read and were skipped: python -m data.check lists "
            "such files"
        )
    if run.collapsed:
        print(f"warning: {COLLAPSED.format('task ' + ', '.join(map(str, run.collapsed)))}", file=sys.stderr)
    state = "has ended in a collapse" if run.collapsed else "is complete"
    print(f"{run.folder} {state}; TensorBoard: tensorboard --logdir {run.folder}")


def report_errors(function, name):
    """The exit status of function(), or 0: a user's error is one line and status 2, an interruption one line
    and 128 + the signal.

    Of many ranks the first one that fails speaks: what ends the others is that it has gone.
    """
    try:
        status = function()
        distributed.stop()
        return status or 0
    except SystemExit:
        raise
    except BaseException as error:
        ignore_signals()
        status, message = explain(error)
        if distributed.first_to_speak():
            if message is None:
                raise
            print(f"{name}: {message}", file=sys.stderr)
        return status
    finally:
        close_all()


def explain(error):
    """Exit status and one line for an error; no line where only a traceback can say what it is."""
    if isinstance(error, Stopped):
        number = error.args[0]
        return (
            128 + number,
            f"stopped by {number.name}; what was saved is safe: run the same command again to go on",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return 2, f"error: {error}; free some space and run the same command again"
    if isinstance(error, (DataError, MethodError, RunError, OSError)):
        return 2, f"error: {error}"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            2,
            "error: out of memory: lower --batch_size, --image_size, --width or the size of queue or heads",
        )
    for words, advice in KNOWN_ERRORS.items():
        if isinstance(error, RuntimeError) and words in str(error):
            return 2, f"error: {advice}; what was saved is safe: the same command again goes on"
    return 1, None


if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(parse_arguments()), "main_cssl.py"))
