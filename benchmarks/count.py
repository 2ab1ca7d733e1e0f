"""Counts what a training step of a later task asks of a GPU, from one step on the CPU.

    python -m benchmarks.count [--method byol --batch_size 512 ...]    (default: the paper's CIFAR-100, bf16)

Arithmetic: of convolutions and products. Bytes: what each operation reads and writes, as if nothing were
fused or kept in a cache. Kernels: operations that are no views; those on lists count once, but once for each
tensor where the list is scaled by tensors of its own.
"""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import main_cssl
from data.datasets import ImageSet
from data.scenarios import Tasks
from losses import contrastive
from utils.distributed import Process
from utils.optim import build_optimizer

PAPER = "--dataset cifar100 --backbone resnet18 --image_size 32 --batch_size 256 --precision bf16"
FREE = "view expand as_strided detach slice select split chunk unbind permute transpose squeeze unsqueeze t"
FREE = {*FREE.split(), "alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
KINDS = {"convolution": "convolutions", "batch_norm": "batch norms", "mm": "products"}
KINDS |= dict.fromkeys(("_foreach", "_fused"), "optimiser, EMA")
KINDS |= dict.fromkeys(("relu", "threshold", "clamp_min"), "activations")
KINDS |= dict.fromkeys(("_to_copy", "copy_"), "casts and copies")


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


def main(flags):
    args = main_cssl.parse_arguments([*PAPER.split(), *flags])
    contrastive.BLOCK = 2**31  # as on a GPU
    process, labels = Process(torch.device("cpu")), torch.zeros(args.batch_size, dtype=torch.int64)
    images = ImageSet(torch.zeros(1, 3, 32, 32), labels, [], (0.5,) * 3, (0.25,) * 3)
    main_cssl.resolve(args, process, images, None, Tasks(["random"], [labels], None))
    learner = main_cssl.build_learner(args, process)
    learner.begin_task(1, process.device)
    optimizer = build_optimizer(args, learner)
    views = torch.randn(2, args.batch_size, 3, args.image_size, args.image_size)
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        loss, _, student, teacher = learner(*views)
        loss.backward()
        optimizer.step()
        learner.after_step(student, teacher, 0.5)
    print(
        f"{args.method} + {args.regularizer}, {args.backbone}, {args.image_size} px, batch {args.batch_size}"
    )
    found = flops.get_flop_counts()["Global"]
    for name, count in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{name!s:32s} {count / 1e12:8.3f} TFLOP")
    print(f"{'all':32s} {sum(found.values()) / 1e12:8.3f} TFLOP\n")
    for kind, count in traffic.kernels.most_common():
        print(f"{kind:32s} {count:8d} kernels {traffic.bytes[kind] / 1e9:8.2f} GB")
    print(f"{'all':32s} {traffic.kernels.total():8d} kernels {traffic.bytes.total() / 1e9:8.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
