"""Counts what a training step of a later task asks of a GPU, from one step on the CPU.

    python -m benchmarks.count [--method byol --batch_size 512 ...]    (default: the paper's CIFAR-100, bf16)

Arithmetic: of convolutions and products. Bytes: what each operation reads and writes, as if nothing were
fused or kept in a cache. Kernels: operations that are no views; those on lists count once, but once for each
tensor where the list is scaled by tensors of its own. Floors: the time that the arithmetic or the bytes of
each kind take, whichever takes longer, on a device as fast as its largest product and its largest copy: this
one, measured here at --precision, and an H100, in bf16. Memory: what is held when the backward pass begins,
and the gradients; the peak is higher by what the largest operations need for a moment.
"""

import sys
import timeit
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import main_cssl
from data.datasets import ImageSet
from data.scenarios import Tasks
from losses import contrastive
from models.learner import DTYPES
from utils.distributed import Process
from utils.optim import build_optimizer

PAPER = "--dataset cifar100 --backbone resnet18 --image_size 32 --batch_size 256 --precision bf16"
FREE = "view expand as_strided detach slice select split chunk unbind permute transpose squeeze unsqueeze t"
FREE = {*FREE.split(), "alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
KINDS = {"convolution": "convolutions", "batch_norm": "batch norms", "mm": "products"}
KINDS |= dict.fromkeys(("_foreach", "_fused"), "optimiser, EMA")
KINDS |= dict.fromkeys(("relu", "threshold", "clamp_min"), "activations")
KINDS |= dict.fromkeys(("_to_copy", "copy_"), "casts and copies")

H100 = 800e12, 3.0e12  # FLOP/s of dense bf16 products, bytes/s of a copy


class Traffic(TorchDispatchMode):
    """Kernels and bytes by kind."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name.rstrip("_") in FREE or name in FREE:
            return out
        kind = next((kind for part, kind in KINDS.items() if part in name), "others")
        tensors = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
        scaled = name.startswith("_foreach") and any(x.dim() == 0 for x in tensors)
        self.kernels[kind] += sum(x.dim() == 0 for x in tensors) if scaled else 1
        self.bytes[kind] += sum(x.numel() * x.element_size() for x in tensors)
        return out


def speed(dtype):
    """(FLOP/s of a product of 4096 x 4096, bytes/s of a copy of 512 MB) on the CPU: the quickest of seven."""
    a, x = torch.randn(4096, 4096, dtype=dtype), torch.zeros(2**27)
    y = torch.empty_like(x)
    works = lambda: a @ a, lambda: y.copy_(x)
    product, copy = (min(timeit.repeat(work, number=1, repeat=7)) for work in works)
    return 2 * 4096**3 / product, 2 * x.nbytes / copy


def build(args):
    """A learner in its second task, its optimizer, and two views of random images."""
    process, labels = Process(torch.device("cpu")), torch.zeros(args.batch_size, dtype=torch.int64)
    images = ImageSet(torch.zeros(1, 3, 32, 32), labels, [], (0.5,) * 3, (0.25,) * 3)
    main_cssl.resolve(args, process, images, None, Tasks(["random"], [labels], None))
    learner = main_cssl.build_learner(args, process)
    learner.begin_task(1, process.device)
    views = torch.randn(2, args.batch_size, 3, args.image_size, args.image_size)
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    return learner, build_optimizer(args, learner), views


def step(learner, optimizer, views):
    """One step: ({kind: FLOP}, its Traffic, {what is in memory: bytes})."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss, _, student, teacher = learner(*views)
        loss.backward()
        optimizer.step()
        learner.after_step(student, teacher, 0.5)
    work = Counter()
    for function, count in flops.get_flop_counts()["Global"].items():
        work["convolutions" if "conv" in str(function) else "products"] += count
    tensors = [*learner.parameters(), *learner.buffers()]
    for x in tensors:
        kept.pop(x.untyped_storage().data_ptr(), None)
    memory = {
        "networks and queues": sum(x.nbytes for x in tensors),
        "gradients": sum(p.nbytes for p in learner.parameters() if p.grad is not None),
        "optimiser": sum(x.nbytes for x in tree_leaves(list(optimizer.state.values())) if torch.is_tensor(x)),
        "kept for the backward pass": sum(kept.values()),
    }
    return work, traffic, memory


def main(flags):
    args = main_cssl.parse_arguments([*PAPER.split(), *flags])
    contrastive.BLOCK = 2**31  # as on a GPU
    work, traffic, memory = step(*build(args))
    print(f"{args.method} + {args.regularizer}, {args.backbone}, {args.image_size} px, ", end="")
    print(f"batch {args.batch_size}, {args.precision}: {sum(work.values()) / 1e12:.3f} TFLOP")
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
    print(f"memory, GB: {parts}; together {sum(memory.values()) / 1e9:.2f}")
    here = speed(DTYPES[args.precision] or torch.float32)
    print(f"this CPU: {here[0] / 1e12:.2f} TFLOP/s, {here[1] / 1e9:.0f} GB/s\n")
    print(f"{'':24s} {'TFLOP':>8s} {'kernels':>8s} {'GB':>8s} {'floor, ms':>10s} {'on an H100':>10s}")
    rows = {}
    for kind, count in traffic.kernels.most_common():
        size = traffic.bytes[kind]
        floors = (1e3 * max(work[kind] / flops, size / rate) for flops, rate in (here, H100))
        rows[kind] = work[kind] / 1e12, count, size / 1e9, *floors
    rows["all"] = [sum(column) for column in zip(*rows.values())]
    for kind, (flop, count, size, *floors) in rows.items():
        print(f"{kind:24s} {flop:8.3f} {count:8d} {size:8.2f} {floors[0]:10.1f} {floors[1]:10.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
