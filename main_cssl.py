"""Continual self-supervised learning: trains one network on a sequence of unlabelled tasks and evaluates it
after each.

examples:
    python main_cssl.py --backbone resnet10 --width 16 --epochs 60 --batch_size 64 --moco_queue_size 256
    python main_cssl.py --dataset cifar100 --data_dir DIR --download --regularizer pnr
    torchrun --nproc_per_node 4 main_cssl.py ...      (batch size and learning rate stay those of one process)

The same command again resumes a run. run_cifar100.sh holds the paper's settings. --method X --regularizer Y
--help shows the flags of X and Y.
"""

import sys

from data import add_data_arguments
from losses import METHODS, REGULARIZERS, find
from models import add_network_arguments, resolve_network
from utils.arguments import Parser, interval
from utils.stop import Stop

PRECISIONS = {"fp32": "highest", "tf32": "high", "bf16": "medium"}  # of products, and torch's word for it
SHORT = 50  # epochs a task, below which the released schedule has no room for its warm-up


def parse_arguments(argv=None):
    """All flags; those of the method and the regulariser are the ones that the chosen classes declare. None
    is left to `resolve`."""
    parser = Parser(__doc__)
    add = add_data_arguments(parser)
    add("--min_scale", type=float, default=0.08, help="smallest share of the area that a crop keeps")
    pair = {"type": float, "nargs": 2, "metavar": ("P1", "P2")}
    add("--blur_p", **pair, default=(0.0, 0.0), help="probability of blur in view 1 and view 2")
    add("--solarize_p", **pair, default=(0.0, 0.2), help="probability of solarising in view 1 and view 2")

    add = add_network_arguments(parser)
    add("--method", choices=METHODS, default="moco", help="self-supervised loss")
    add("--regularizer", choices=REGULARIZERS, default="pnr", help="what keeps the old tasks")
    text = "a taskN.pt, or a run's folder, to go on from after its tasks; a released checkpoint, which takes "
    text += "the place of task 0; or weights without a projector, such as torchvision's, to train task 0 from"
    add("--init_from", metavar="CKPT", help=text)
    text = "the first task to be trained, of a run that is continued (default: the one after --init_from)"
    add("--start_task", type=int, metavar="T", help=text)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=500, help="per task")
    add("--batch_size", type=int, default=256, help="global, over all processes")
    add("--lr", type=float, help="per 256 images; used is lr x batch_size / 256 (default: the method's)")
    add("--optimizer", choices=("lars", "adam", "adamw"), help="(default: the method's)")
    add("--weight_decay", type=float, help="(default: the method's)")
    text = "when the rate is set: every epoch, as released, or every step (default: epoch; step for falcon "
    text += f"and under {SHORT} epochs a task, where a jump can make a run collapse)"
    add("--lr_schedule", choices=("epoch", "step"), help=text)
    add("--warmup_epochs", type=float, help=f"linear warm-up (default: 10; a third of runs under {SHORT})")
    text = "of the products in losses and in the views' resizing, under --precision fp32 of linear layers, "
    text += "too: tf32 on CUDA, bf16 also on CPUs that have it"
    add("--loss_precision", choices=PRECISIONS, default="fp32", help=text)
    add("--compile", action="store_true", help="torch.compile: slower to start, pays on long runs")

    add_evaluation_arguments(parser)
    for name in parser.peek(argv, "method", "regularizer"):
        find(name).add_arguments(parser.add_argument_group(name).add_argument)
    return parser.parse_args(argv)


def add_evaluation_arguments(parser):
    """The flags that say how the network is evaluated, and what is written."""
    add = parser.add_argument_group("evaluation and output").add_argument
    text = "train each task alone, from random weights, as plasticity is measured against; with finetune"
    add("--single_tasks", action="store_true", help=text)
    text = "a finished run with --single_tasks, of the same settings: adds plasticity to the results"
    add("--reference", metavar="DIR", help=text)
    text = "after every task; knn is quick, linear is the papers'"
    add("--eval", choices=("linear", "knn", "none"), default="linear", help=text)
    text = "what the linear probe learns from: features made once; or, as in the papers' offline evaluation, "
    text += "random crops and flips, which pass through the network anew in each of its 100 epochs"
    add("--probe_views", choices=("cached", "augmented"), default="cached", help=text)
    add("--probe_lr", type=float, help="of the linear probe (default: the method's); lower if it diverges")
    add("--probe_momentum", type=float, default=0.0, help="of it: 0 as in PNR's release, 0.9 as in CaSSLe's")
    text = "a linear classifier over all classes that learns beside the network, as in the papers' tables. "
    text += "clean: changes nothing of the training; released: as in the papers' code, its images pass "
    text += "the backbone (and the momentum encoder's) in training mode, so that running statistics see all "
    text += "classes, later ones too"
    add("--online_probe", choices=("off", "clean", "released"), default="off", help=text)
    add("--online_lr", type=float, help="of the online probe (default: the method's); not per 256")
    text = "up to 2000 test features after every task, with class and task, for TensorBoard's projector"
    add("--embedding", action="store_true", help=text)
    text = "the run's folder (default: runs/<dataset>-<scenario><tasks>-<method>-<regularizer>-seed<seed>)"
    add("--out_dir", help=text)
    text = "steps (500) or time (90s, 10m, 1h) between checkpoints; also at an epoch's end, if cheap"
    add("--save_every", type=interval, default="10m", help=text)
    add("--log_every", type=int, default=50, help="steps between lines in metrics.jsonl and TensorBoard")


if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    stop, args = Stop("main_cssl.py"), parse_arguments()

import copy
import warnings
from itertools import repeat

import torch
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from data.augment import ViewConfig
from data.datasets import load_dataset
from data.loader import LABELLED, Loader, generator
from data.scenarios import plan
from models.learner import DTYPES, Learner
from models.online import OnlineProbe
from models.resnet import build_backbone
from utils import UserError, checkpoint, distributed, evaluate, metrics
from utils.collapse import COLLAPSED_STD, collapse_metrics, collapsed
from utils.optim import build_optimizer, set_lr
from utils.run import Run, write_results

COLLAPSED = "the network has collapsed in {}: its outputs hardly differ between images; lower --lr"


def main(args, stop):
    process = distributed.start(args.device)
    train, probe, test, tasks = build_data(args, process)
    resolve(args, process, train, test, tasks)
    learner = build_learner(args, process, probe)
    initial = load_initial(args, process, learner, tasks)
    run = Run(args, tasks, train.digest, process, stop)
    print_settings(args, process, train, tasks, learner, run)
    evaluate_untrained(args, process, run, learner, probe, test, tasks)
    if initial is not None:
        state, run.given_tasks = initial
        learner.load_state_dict(state)
    untrained = copy.deepcopy(learner.state_dict()) if args.single_tasks else None

    for task in range(run.task, args.num_tasks):
        loader, labelled = build_loaders(args, process, train, probe, tasks, task)
        if args.single_tasks:
            learner.load_state_dict(untrained)
        torch.manual_seed(generator(args.seed, task).initial_seed())
        learner.begin_task(task, process.device, loader)
        optimizer = build_optimizer(args, learner)
        scaler = GradScaler(process.device.type, enabled=args.precision == "fp16")
        epochs = 0 if task < run.given_tasks else args.epochs
        run.begin_task(task, epochs, loader, learner=learner, optimizer=optimizer, scaler=scaler)
        model = wrap(learner, process, args.compile)
        torch.set_float32_matmul_precision(PRECISIONS[args.loss_precision])
        for epoch in range(run.epoch, epochs):
            batches = zip(loader.epoch(epoch, run.step), labelled(epoch, run.step))
            train_one_epoch(args, run, model, learner, optimizer, scaler, epoch, batches)
        torch.set_float32_matmul_precision("highest")  # of what is evaluated
        if run.finished == task:  # otherwise the run was interrupted after this evaluation
            finish_task(args, run, learner, loader, tasks)
            evaluate_task(args, process, run, learner, probe, test, tasks)
        run.end_task()
    print_results(args, process, run, [train, probe, test])
    return int(bool(run.collapsed))


def train_one_epoch(args, run, model, learner, optimizer, scaler, epoch, batches):
    """batches: of what is left of the epoch, the two views with their labels, which training does not look
    at, and the images and labels that the online probe learns from (or None)."""
    with run.stop.deferred():
        for (views, _), labelled in run.progress.watch(batches):
            set_lr(optimizer, args, learner.method.warmup_start_lr, epoch, run.step, run.loader.steps)
            loss, terms, student, teacher = model(*views, labelled)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # LARS weighs the true gradient against the weight
            learner.regularizer.before_step(learner.method)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            learner.after_step(student, teacher, run.progress.share)
            run.end_step(terms, student, views)
        run.end_epoch()


def build_data(args, process):
    """ImageSets to train on, to train classifiers on and to test on, in memory on the device, and the
    Tasks."""
    train, probe, test = process.rank0_first(lambda: load_dataset(args))
    tasks = plan(train, test, args)
    train.digest = train.checksum(tasks.train)
    for images in filter(None, (train, train.probe, test)):
        images.to(process.device)
    return train, probe, test, tasks


def resolve(args, process, train, test, tasks):
    """Settles all that the flags leave open, as config.json then holds it."""
    method, short = find(args.method), args.epochs < SHORT
    find(args.regularizer).resolve(args)
    names = ("optimizer", "lr", "weight_decay", "probe_lr", "online_lr")
    open_flags = {name: getattr(method, name) for name in names} | {
        "lr_schedule": "step" if short else method.lr_schedule,
        "warmup_epochs": min(10, args.epochs / 3) if short else 10,
        "num_tasks": len(tasks.names),
    }
    for name, value in open_flags.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    resolve_network(args, train.side, process.device)
    args.normalize = [list(train.mean), list(train.std)]
    if args.single_tasks and (args.regularizer != "finetune" or args.init_from):
        raise UserError("--single_tasks: each task starts anew: with --regularizer finetune, no --init_from")
    what = f"{args.dataset}-{args.scenario}{args.num_tasks}-{args.method}-"
    what += f"{'single' if args.single_tasks else args.regularizer}-seed{args.seed}"
    args.out_dir = args.out_dir or f"runs/{what}"
    args.cache_size = None if args.cache is None else args.cache_size
    args.eval = "none" if test is None else args.eval
    if args.online_probe != "off" and test is None:
        advice = "pass --probe_data_dir DIR with both, --val_split, or --online_probe off"
        raise UserError(f"--online_probe: {args.data_dir} has no labels in train/ and test/: {advice}")
    if args.reference:  # told before hours of training
        evaluated = {"": args.eval, f"online_linear_{args.online_probe}": args.online_probe}
        for name in (name for name, how in evaluated.items() if how not in ("none", "off")):
            metrics.reference_row(args.reference, name, evaluate.protocol_name(args, name), vars(args))
    if args.batch_size % process.world:
        raise UserError(f"--batch_size {args.batch_size}: the {process.world} processes have to divide it")
    smallest = min(map(len, tasks.train))
    if smallest < args.batch_size:
        raise UserError(f"--batch_size {args.batch_size}: the smallest task has {smallest} images: lower it")


def build_loaders(args, process, train, probe, tasks, task):
    """The task's Loader; and a function like its `epoch`, of the labelled images that the online probe learns
    from, in view 2's augmentation, or of None where there is no online probe."""
    views = [ViewConfig(args.image_size, args.min_scale, *p) for p in zip(args.blur_p, args.solarize_p)]
    shared = process.rank, process.world, args.workers, args.skip_corrupt
    loader = Loader(train, tasks.train[task], args.batch_size, views, args.seed, task, *shared)
    if args.online_probe == "off":
        return loader, lambda epoch, start: repeat(None)
    known = (probe.labels >= 0).nonzero()[:, 0].cpu()
    own = probe, known, args.batch_size, views[1:], args.seed, LABELLED + task
    labelled = Loader(*own, *shared, loader.steps)
    return loader, lambda *where: ((view, y) for (view,), y in labelled.epoch(*where))


def build_learner(args, process, probe=None):
    """Backbone, method, regulariser and online probe as the flags say, with weights from the seed,
    channels_last on the device. probe: the ImageSet that classifiers are trained on."""
    torch.manual_seed(args.seed)
    method = find(args.method)(build_backbone(args.backbone, args.width, args.stem), args)
    regularizer, online = find(args.regularizer)(args), None
    if args.online_probe != "off":
        online = OnlineProbe(method.backbone.feature_dim, len(probe.classes), args.online_probe)
    learner = Learner(method, regularizer, online, DTYPES[args.precision], args.compile)
    return learner.to(process.device, memory_format=torch.channels_last)


def load_initial(args, process, learner, tasks):
    """The state that a new run starts from, read from --init_from, and how many of its tasks are done; None
    where it starts from random weights or is resumed."""
    if args.start_task is not None and not args.init_from:
        raise UserError(f"--start_task {args.start_task}: needs --init_from")
    if not args.init_from or checkpoint.states(args.out_dir):
        return None
    paths = checkpoint.given(args.init_from, args.start_task)
    if len(paths) >= max(args.num_tasks, 2):
        raise UserError(f"--init_from {args.init_from}: all of {args.num_tasks} tasks are done: ask for more")
    for task, path in enumerate(paths):  # misfits are told before the folder is made
        initial = copy.deepcopy(learner)
        note, done = checkpoint.load_method(initial, path, args, tasks.names, task)
        if process.main:
            print(note, flush=True)
    return (learner.state_dict(), len(paths)) if done else (initial.state_dict(), 0)


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
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(learner, device_ids=ids, **options)


def finish_task(args, run, learner, loader, tasks):
    """Saves the task's network: what was trained, or what --init_from gives in its place."""
    if run.task < run.given_tasks:
        run.save()  # so that it can be resumed once task0.pt is there
        path = checkpoint.given(args.init_from, args.start_task)[run.task]
        checkpoint.load_method(learner, path, args, tasks.names, run.task)
        run.global_step += args.epochs * loader.steps  # so that curves of runs lie over each other
    else:
        learner.regularizer.end_task(run.task, learner.method, loader)
    run.save_network(learner)


def evaluate_untrained(args, process, run, learner, probe, test, tasks):
    """Sets run.random_rows, what the random network reaches, unless they are known: call it before
    --init_from's network is loaded."""
    if args.eval != "none" and not run.matrices and not run.random_rows:
        extract = evaluate.features_of(args, process, learner.method.backbone)
        run.random_rows = evaluate.accuracy_rows(args, process, extract, probe, extract(test), tasks)


def evaluate_task(args, process, run, learner, probe, test, tasks):
    """Adds the rows of the task to the matrices of the run, and publishes these and the collapse monitors of
    the test features."""
    if args.eval == "none" and args.online_probe == "off":
        if run.epochs and run.last_std < COLLAPSED_STD:
            tell_collapse(run)
        return
    extract = evaluate.features_of(args, process, learner.method.backbone)
    tested = extract(test)
    rows = evaluate.accuracy_rows(args, process, extract, probe, tested, tasks) if args.eval != "none" else {}
    features, labels = map(process.gather, tested)
    if learner.online is not None:
        predicted = learner.online.predict(features)
        rows[f"online_linear_{args.online_probe}"] = evaluate.accuracy_row(predicted, labels, tasks.test)
    monitors, spectrum = collapse_metrics(features, learner.method.codes(features))
    if collapsed(monitors):
        tell_collapse(run)
    if args.embedding:
        run.log.embedding(run.global_step, features, labels, test.classes, tasks.test)
    for name, row in rows.items():
        run.matrices.setdefault(name, []).append(row)
    for name, block in evaluate.blocks(args, run).items():
        run.publish(name, block, monitors, spectrum)
        monitors = {}  # logged once


def tell_collapse(run):
    run.collapsed.append(run.task)
    run.warn(COLLAPSED.format(f"task {run.task}"))


def print_settings(args, process, train, tasks, learner, run):
    if not process.main:
        return
    millions = sum(p.numel() for p in learner.method.backbone.parameters()) / 1e6
    sizes = ", ".join(str(len(part)) for part in tasks.train)
    rate = f"lr {args.lr * args.batch_size / 256:g} (= {args.lr:g} x {args.batch_size} / 256)"
    names = f" ({', '.join(train.domain_names)})" if train.domain_names else ""
    resumed = f" (resumed at task {run.task}, epoch {run.epoch}, step {run.step})" if run.resumed else ""
    network = f"{args.backbone} with {args.stem} stem, {millions:.1f} M parameters"
    print(f"{args.method} + {args.regularizer}, {network}")
    print(f"{process.world} x {process.device}, {args.precision}, torch {torch.__version__}")
    print(f"{args.dataset}, {args.scenario}-incremental: {len(tasks.train)} tasks of {sizes} images{names}")
    print(f"{args.image_size} px, {args.epochs} epochs a task, {args.warmup_epochs:.3g} of them warm-up")
    print(f"global batch {args.batch_size}, {rate}, weight decay {args.weight_decay:g}, seed {args.seed}")
    if tasks.test is None:
        advice = "see --probe_data_dir, --val_split"
        print(f"no evaluation: {args.data_dir} lacks labels in train/, test/: {advice}")
    if args.online_probe != "off":
        print(evaluate.protocol_name(args, "online"))
    print(f"run folder: {run.folder}{resumed}", flush=True)


def print_results(args, process, run, image_sets):
    found = {id(images): process.collect(set(images.skipped)) for images in image_sets if images is not None}
    skipped = sum(len(set().union(*ranks)) for ranks in found.values())
    if not process.main:
        return
    for name, block in evaluate.blocks(args, run).items():
        print(f"\naccuracy (%), {block['protocol']}\n{metrics.format_matrix(block['matrix'])}")
        print(metrics.format_summary(block))
        write_results(run.folder / "results.json", {name: block} if name else block)  # --reference may be new
    if skipped:
        print(f"{skipped} images could not be read and were skipped: see python -m data.check")
    if run.collapsed:
        print(f"warning: {COLLAPSED.format('task ' + ', '.join(map(str, run.collapsed)))}", file=sys.stderr)
    state = "has ended in a collapse" if run.collapsed else "is complete"
    print(f"{run.folder} {state}; TensorBoard: tensorboard --logdir {run.folder}")


if __name__ == "__main__":
    sys.exit(distributed.report_errors(lambda: main(args, stop), "main_cssl.py"))
