"""One process, or one of many that torchrun started."""

import contextlib
import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import RunError


@dataclass(frozen=True)
class Process:
    """rank of world processes, and the device that is its own."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        return self.rank == 0

    def first(self, function):
        """The function's result, on rank 0 before the others, so that these find the files that it writes."""
        if self.world == 1:
            return function()
        if not self.main:
            try:
                dist.barrier()
            except RuntimeError as error:
                raise RunError("the first process stopped; its message says why") from error
        result = function()
        if self.main:
            dist.barrier()
        return result

    def union(self, items):
        """The set of all ranks' items."""
        if self.world == 1:
            return set(items)
        lists = [None] * self.world
        dist.all_gather_object(lists, list(items))
        return set().union(*lists)

    def agree(self, flag, now):
        """True on every rank if `now` (the same on all) and the flag is set on one of them; waits for the device if so."""
        if self.world == 1 or not now:
            return flag and self.world == 1
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)


def start(device):
    """Joins torchrun's processes, if it started this one. device: "auto", "cpu" or "cuda".

    Raises RunError if CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: this machine, or this PyTorch build, has no usable CUDA device; use --device cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        if local >= torch.cuda.device_count():
            raise RunError(f"{local + 1} processes or more on a machine with {torch.cuda.device_count()} CUDA devices: start fewer")
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
    else:
        keep_heap()
    if world > 1:
        # long, since rank 0 may decode a data set before the others; torchrun notices at once when a process ends
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    return Process(torch.device("cuda", local) if cuda else torch.device("cpu"), rank, world)


def keep_heap():
    """Asks glibc, where there is one, to keep freed memory: to give a step's tensors back to the system and to fetch them anew,
    page by page, takes a CPU longer than to fill them."""
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(mmap_max, 0)  # large tensors, too, come from the heap


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
