"""Memory and communication of one training step of a later task: formulas, and what gloo processes on this
machine measure.

    python benchmarks/scaling.py --method moco --image_size 32 --batch_size 64 --moco_queue_size 4096
    python benchmarks/scaling.py --method barlow --image_size 224 --gpus 1 8 64 512

Further flags are those of main_cssl.py that shape a step. Bytes are per process; of a collective they are
those of its result. With --gpus nothing but the number of operators is measured: the formulas and the ASSUMED
figures give the time of a step, once with the batch as given and once with a batch (and a queue no shorter)
that grows with the GPUs. docs/SCALING.md explains both.
"""

import argparse
import copy
import itertools
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_cssl
from models import BACKBONES
from models.heads import Queue
from utils.distributed import Process

VIEWS, FLOAT = 2, 4
# of an H100-class GPU, in SI units: sustained bf16 on a ResNet and fp32 in the losses, memory, one kernel
# launch; then by number of GPUs (one node; more; more still) what each sends per second, and how long a small
# collective takes
ASSUMED = {"bf16": 100e12, "fp32": 33e12, "memory": 3e12, "launch": 5e-6}
LINKS = {8: (400e9, 20e-6), 64: (45e9, 40e-6), 512: (45e9, 60e-6)}


class Layer(NamedTuple):
    """A convolution or linear layer, the batch norm and the ReLU after it where there are any; its output is
    side x side."""

    weights: int
    channels: int
    side: int = 1
    bias: bool = False
    norm: bool = True
    relu: bool = True


def backbone(args):
    block, counts = BACKBONES[args.backbone]
    cifar, channels = args.stem == "cifar", args.width
    side = args.image_size + 2 if cifar else -(-args.image_size // 2)
    layers = [Layer(3 * channels * (9 if cifar else 49), channels, side)]
    side = side if cifar else -(-side // 2)  # max-pooling
    for stage, count in enumerate(counts):
        planes = args.width * 2**stage
        out = planes * block.expansion
        for i in range(count):
            stride, before = 2 if stage > 0 and i == 0 else 1, side
            side = -(-side // stride)
            if block is BasicBlock:
                layers += [
                    Layer(9 * channels * planes, planes, side),
                    Layer(9 * planes * planes, planes, side),
                ]
            else:
                layers += [Layer(channels * planes, planes, before), Layer(9 * planes * planes, planes, side)]
                layers += [Layer(planes * out, out, side)]
            if stride > 1 or channels != out:
                layers.append(Layer(channels * out, out, side, relu=False))  # the shortcut
            channels = out
    return layers


def mlp(*dims, norm=True):
    hidden = [Layer(n * m, m, bias=True, norm=norm) for n, m in itertools.pairwise(dims[:-1])]
    return [*hidden, Layer(dims[-2] * dims[-1], dims[-1], bias=True, norm=False, relu=False)]


class Network(NamedTuple):
    student: list  # layers of the backbone and the projector
    q: list  # BYOL's own predictor
    g: list  # the regulariser's predictor
    features: int
    D: int
    K: int  # 0 without a queue
    c: int  # 0 without codes
    twin: bool
    teacher: bool


def network(args):
    body, teacher = backbone(args), args.regularizer != "finetune"
    features = body[-1].channels
    dim, hidden, inner, K, c = (
        getattr(args, f"{args.method}_{name}", 0)
        for name in ("dim", "hidden", "predictor_hidden", "queue_size", "codes")
    )
    if args.method == "falcon":
        projector = [Layer(features * dim, dim, bias=True, relu=False)]
    elif args.method in ("vicreg", "barlow"):
        projector = mlp(features, hidden, hidden, dim)
    else:
        projector = mlp(features, hidden, dim, norm=args.method == "byol")
    q, g = mlp(dim, inner, dim) if inner else [], mlp(dim, args.predictor_hidden, dim) if teacher else []
    return Network([*body, *projector], q, g, features, dim, K, c, args.method in ("moco", "byol"), teacher)


def parameters(layers):
    return sum(
        x.weights + x.channels * (x.bias + 2 * x.norm) for x in layers
    )  # a batch norm has a scale and a shift


def state(layers):
    """Bytes of parameters and of batch norms' buffers: mean, variance and an int64 counter."""
    return FLOAT * parameters(layers) + sum(x.norm * (2 * FLOAT * x.channels + 8) for x in layers)


def loss_floats(method, regularizer, B, D, K, c):
    """Floats that the loss keeps for its backward pass, and its multiplications and additions, forward and
    backward. The batch is that of all processes. PNR is the one with both kinds of pseudo-negatives."""
    BB, BD, BK, Bc, DD = B * B, B * D, B * K, B * c, D * D
    saved, products = {
        # [B, K] logits of each view and queue; CaSSLe: twice [2B, 2B] log-probabilities; the queue gets no
        # gradient
        "moco": (
            (2 * BK + 4 * BD, 2 * BK + 8 * BB + 6 * BD, 8 * BK + 6 * BD),
            (8 * BK * D, 8 * BK * D + 16 * BB * D, 32 * BK * D),
        ),
        # [2B, 2B] logits with a mask of bytes each; CaSSLe: one of them, and twice [2B, 2B] log-probabilities
        "simclr": (
            (5 * BB + 6 * BD, 13 * BB + 10 * BD, 20 * BB + 18 * BD),
            (24 * BB * D, 40 * BB * D, 80 * BB * D),
        ),
        # nothing larger than [B, D]
        "byol": ((4 * BD, 8 * BD, 10 * BD), (0, 0, 0)),
        # [D, D] covariance of each view
        "vicreg": ((2 * DD + 4 * BD, 2 * DD + 6 * BD, 2 * DD + 6 * BD), (12 * B * DD,) * 3),
        # [D, D] cross-correlation of the views; distillation: one more for each view, in which the teacher
        # gets no gradient
        "barlow": ((DD + 4 * BD, 3 * DD + 6 * BD, 3 * DD + 8 * BD), (6 * B * DD, 14 * B * DD, 14 * B * DD)),
        # [B, c] of each view: log-codes and codes of z; with a teacher also log-codes of p, codes of f; PNR:
        # codes of f again
        "falcon": (
            (4 * Bc + 2 * BD, 8 * Bc + 4 * BD, 10 * Bc + 4 * BD),
            (8 * Bc * D, 20 * Bc * D, 20 * Bc * D),
        ),
    }[method]
    i = ("finetune", "cassle", "pnr").index(regularizer)
    return saved[i], products[i]


def memory_formula(args, world=1, gpu=False):
    """Bytes of each part on one of `world` processes, while a step is in its backward pass."""
    student, q, g, features, D, K, c, twin, teacher = network(args)
    trained, element = [*student, *q, *g], FLOAT if args.precision == "fp32" else 2
    moments = 1 if args.optimizer == "lars" else 2
    steps = (
        0 if args.optimizer == "lars" else sum(1 + x.bias + 2 * x.norm for x in trained)
    )  # Adam: a number for each tensor
    # a batch norm keeps its input (CrossRankBatchNorm two maps, centred and normalised), a ReLU its output
    maps = 1 if gpu or world == 1 else 2
    image = sum(x.channels * x.side**2 * (maps * x.norm + x.relu) for x in trained)
    # the first layers keep their inputs; MoCo normalises z for g, and keeps its norm twice
    image += (
        3 * args.image_size**2 + features + D * bool(q or g) + (D + 2) * (teacher and args.method == "moco")
    )
    if args.stem == "imagenet":  # max-pooling: its output and int64 indices
        image += args.width * (-(-args.image_size // 4)) ** 2 * (1 + 8 // element)
    statistics = (
        FLOAT * (3 - maps) * sum(x.norm * x.channels for x in trained)
    )  # mean and 1 / deviation, or just the latter
    casts = (
        0 if element == FLOAT else element * sum(x.weights for x in trained)
    )  # autocast's copies of the weights
    return {
        "student": state([*student, *q]),
        "dictionary": FLOAT * D * c,  # FALCON's signs
        "twin": twin * state(student),
        "teacher": teacher * state(student),
        "predictor g": state(g),
        "gradients": FLOAT * parameters(trained),
        "optimiser": FLOAT * (moments * parameters(trained) + steps),
        "queues": (1 + (args.regularizer == "pnr")) * (VIEWS * FLOAT * K * D + 8)
        if K
        else 0,  # rows for each view, a pointer
        "activations": VIEWS * (element * image * args.batch_size // world + statistics) + casts,
        "loss": FLOAT
        * loss_floats(args.method, args.regularizer, args.batch_size, D, K, c)[
            0
        ],  # of the whole batch: no world
    }


def communication_formula(args, world, gpu=False):
    """Calls and bytes of one step's collectives. gpu: SyncBatchNorm in place of CrossRankBatchNorm."""
    student, q, g, _, D, _, _, twin, teacher = network(args)
    trained = [x.channels for x in (*student, *q, *g) if x.norm]
    frozen = [x.channels for x in student if x.norm] * (twin + (teacher and args.teacher_bn == "batch"))
    both = [*trained, *frozen]
    gathers = VIEWS * (
        1 + twin + bool(q) + 2 * teacher
    )  # z, the twin's k, q's output, the teacher's f and p, of each view
    calls = 1 if gpu else 2  # CrossRankBatchNorm: sums, then squares; SyncBatchNorm: both at once
    # SyncBatchNorm gathers every process's mean, 1 / deviation and count, CrossRankBatchNorm adds up
    forward = world * (2 * sum(both) + len(both)) if gpu else 2 * sum(both)
    return {
        "gradients, bytes": FLOAT * parameters([*student, *q, *g]),  # DDP's buckets
        "gathers, calls": gathers,
        "gathers, bytes": FLOAT * gathers * args.batch_size * D,
        "norms forward, calls": VIEWS * calls * len(both),
        "norms forward, bytes": VIEWS * FLOAT * forward,
        "norms backward, calls": VIEWS * calls * len(trained),
        "norms backward, bytes": VIEWS * FLOAT * 2 * sum(trained),  # the gradients of both statistics
        "votes, bytes": 8,  # Process.agree, every tenth step
    }


class Operators(TorchDispatchMode):
    """Counts what PyTorch runs, views aside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not getattr(function, "is_view", False)
        return function(*args, **(kwargs or {}))


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(args, rank=0, world=1):
    """What the formulas describe, of one step of the second task on random images, and the number of
    operators."""
    process = Process(torch.device("cpu"), rank, world)
    learner = main_cssl.build_learner(args, process)
    learner.begin_task(1, process.device)
    optimizer, model = main_cssl.build_optimizer(args, learner), main_cssl.wrap(learner, process, False)
    method, regularizer = learner.method, learner.regularizer
    all_reduce, all_gather, losses = dist.all_reduce, dist.all_gather, regularizer.losses
    found, part, direction = Counter(), "activations", "forward"
    seen = {t.untyped_storage().data_ptr() for t in (*learner.parameters(), *learner.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found[part] += storage.nbytes()
        return tensor.detach()

    def mark(*outputs):
        nonlocal part
        part = "loss"
        return losses(*outputs)

    def count_reduce(tensor, *rest, **options):
        name = f"norms {direction}" if tensor.is_floating_point() else "votes"
        found.update({f"{name}, calls": 1, f"{name}, bytes": size([tensor])})
        return all_reduce(tensor, *rest, **options)

    def count_gather(parts, tensor):
        found.update({"gathers, calls": 1, "gathers, bytes": size(parts)})
        return all_gather(parts, tensor)

    def count_bucket(_, bucket):
        found["gradients, bytes"] += size([bucket.buffer()])
        return (
            all_reduce(bucket.buffer().div_(world), async_op=True)
            .get_future()
            .then(lambda _: bucket.buffer())
        )

    regularizer.losses = mark
    if world > 1:
        model.register_comm_hook(None, count_bucket)
    shape = (args.batch_size // world, 3, args.image_size, args.image_size)
    views = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(VIEWS)]
    with (
        patch.object(dist, "all_reduce", count_reduce),
        patch.object(dist, "all_gather", count_gather),
        Operators() as operators,
    ):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _, out, old = model(*views)
        direction = "backward"
        loss.backward()
        optimizer.step()
        learner.after_step(out, old, 0.5)
        process.agree(False, True)
    twin = getattr(method, "momentum_encoder", torch.nn.Module())
    teacher, g = (getattr(regularizer, name, None) or torch.nn.Module() for name in ("teacher", "predictor"))
    queues = [module for module in learner.modules() if isinstance(module, Queue)]
    dictionary = [b for name, b in method.named_buffers() if name == "dictionary"]
    every = {
        name: size([*m.parameters(), *m.buffers()])
        for name, m in (("twin", twin), ("teacher", teacher), ("predictor g", g))
    }
    found.update(every)
    found["queues"] = size(b for queue in queues for b in queue.buffers())
    found["dictionary"] = size(dictionary)
    found["student"] = (
        size([*learner.parameters(), *learner.buffers()])
        - sum(every.values())
        - found["queues"]
        - size(dictionary)
    )
    found["gradients"] = size(p.grad for p in learner.parameters() if p.grad is not None)
    found["optimiser"] = size(t for entry in optimizer.state.values() for t in entry.values())
    found["operators"] = operators.count
    return found


def worker(rank, world, args, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides")  # of the gradients under Operators, which counts
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(dict(measure(args, rank, world)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def compare(args, world):
    formula = memory_formula(args, world) | (communication_formula(args, world) if world > 1 else {})
    with tempfile.TemporaryDirectory() as folder:
        if world == 1:
            found = measure(args)
        else:
            mp.spawn(worker, (world, args, folder), nprocs=world)
            found = torch.load(f"{folder}/0.pt")
    print(f"\n{'processes: ' + str(world):24s} {'formula':>15s} {'measured':>15s}   ratio")
    for name, value in formula.items():
        if value or found.get(name):
            print(
                f"{name:24s} {value:15,d} {found.get(name, 0):15,d} {found.get(name, 0) / max(value, 1):7.3f}"
            )
    print(f"{'operators':24s} {'':15s} {found['operators']:15,d}")


def operations(layers):
    """Floating-point operations per image of a forward pass."""
    return 2 * sum(x.weights * x.side**2 for x in layers)


def estimate(args, world, operators):
    """Seconds of a step on `world` GPUs by part; only launches overlap with anything."""
    student, q, g, _, D, K, c, twin, teacher = network(args)
    flops = 3 * operations([*student, *q, *g]) + (twin + teacher) * operations(student)
    floats, products = loss_floats(args.method, args.regularizer, args.batch_size, D, K, c)
    passes = (
        6  # over each saved matrix: written, reduced, normalised; the gradient written, scaled, multiplied
    )
    times = {
        "launches": operators * ASSUMED["launch"],
        "networks": VIEWS * args.batch_size / world * flops / ASSUMED["bf16"],
    }
    times["loss"] = products / ASSUMED["fp32"] + passes * FLOAT * floats / ASSUMED["memory"]
    rate, latency = next(LINKS[n] for n in LINKS if world <= n)
    ring = (world - 1) / world
    found = communication_formula(args, world, gpu=True)
    times["gradients"] = 2 * ring * found["gradients, bytes"] / rate
    for name, directions in (("gathers", ("gathers",)), ("norms", ("norms forward", "norms backward"))):
        calls = sum(found[f"{d}, calls"] for d in directions) * (world > 1)
        times[name] = (
            calls * latency
            + ring * sum(found[f"{d}, bytes"] * (1 + (d == "norms backward")) for d in directions) / rate
        )
    times["step"] = max(times["launches"], times["networks"] + times["loss"]) + sum(
        times[x] for x in ("gradients", "gathers", "norms")
    )
    return times


def project(args, gpus):
    small = copy.copy(args)
    small.width, small.image_size, small.batch_size = 4, 32, 4  # operators do not depend on sizes
    if args.method == "moco":
        small.moco_queue_size = 4
    operators = measure(small)["operators"]
    print(f"{operators} operators a step; milliseconds from formulas and assumptions, none measured")
    for grown in (False, True):
        base = None
        print(f"\n{'GPUs':>5s} {'batch':>7s} {'launches':>9s} {'networks':>9s} {'loss':>9s} "
              f"{'gradients':>9s} {'gathers':>9s} "
              f"{'norms':>9s} {'step':>9s} {'images/s':>9s} efficiency   GiB: activations, loss, "
              "all")  # fmt: skip
        for world in gpus:
            one = copy.copy(args)
            one.batch_size = args.batch_size * world if grown else args.batch_size
            if one.batch_size % world:
                print(f"{world:5d} {one.batch_size:7d}   refused: the batch does not divide")
                continue
            if args.method == "moco":
                one.moco_queue_size = max(args.moco_queue_size, one.batch_size)
            times = estimate(one, world, operators)
            memory = memory_formula(one, world, gpu=True)
            rate = one.batch_size / times["step"]
            base = base or rate / world
            columns = " ".join(f"{1e3 * t:9.2f}" for t in times.values())
            gib = ", ".join(
                f"{x / 2**30:.2f}" for x in (memory["activations"], memory["loss"], sum(memory.values()))
            )
            print(f"{world:5d} {one.batch_size:7d} {columns} {rate:9.0f} {rate / world / base:10.1%}   {gib}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure"
    )
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs to work out instead, up to 512")
    own, flags = parser.parse_known_args()
    args = main_cssl.parse_arguments([*flags, "--device", "cpu"])
    args.image_size = args.image_size or 32
    args.stem = ("cifar" if args.image_size <= 64 else "imagenet") if args.stem == "auto" else args.stem
    args.precision = args.precision or ("bf16" if own.gpus else "fp32")
    torch.set_num_threads(1)
    print(
        f"{args.method} + {args.regularizer}, {args.backbone} width {args.width}, {args.image_size} px, "
        f"batch {args.batch_size}"
    )
    if not own.gpus and any(args.batch_size % world for world in own.processes):
        parser.error(f"--batch_size {args.batch_size} does not divide by every number of processes")
    if own.gpus:
        project(args, own.gpus)
    for world in () if own.gpus else own.processes:
        compare(args, world)


if __name__ == "__main__":
    main()
