"""One process, or one of many that torchrun started."""

import contextlib
import ctypes
import functools
import gc
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import RunError

MEETING = timedelta(minutes=10)  # processes may be so far apart when they start
DECODING = timedelta(
    hours=12
)  # rank 0 may decode a data set before the others; torchrun notices at once when a process ends


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
        if not self.main:
            dist.barrier()
        result = function()
        if self.main and self.world > 1:
            dist.barrier()
        return result

    def counts(self, count):
        """The counts of all ranks, a list."""
        if self.world == 1:
            return [count]
        counts = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        counts[self.rank] = count
        dist.all_reduce(counts)
        return counts.tolist()

    def gather(self, x):
        """The rows of all ranks, in rank order, on every rank. x: [n, ...]; n may differ from rank to
        rank."""
        if self.world == 1:
            return x
        counts = self.counts(len(x))
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def sum(self, *tensors):
        """Replaces each tensor by its sum over ranks."""
        if self.world > 1:
            for x in tensors:
                dist.all_reduce(x)

    def require_same(self, values):
        """Raises RunError unless all ranks give equal values, by name."""
        if self.world > 1:
            ranks = [None] * self.world
            dist.all_gather_object(ranks, values)
            for rank, others in enumerate(ranks):
                for name, value in ranks[0].items():
                    if (other := others.get(name)) != value:
                        raise RunError(
                            f"process {rank} of {self.world} has another {name} than process 0: {other}, not "
                            f"{value}; all machines "
                            "need the same flags, the same images, and one run folder that they share"
                        )

    def union(self, items):
        """The set of all ranks' items."""
        if self.world == 1:
            return set(items)
        lists = [None] * self.world
        dist.all_gather_object(lists, list(items))
        return set().union(*lists)

    def agree(self, flag, now):
        """True on every rank if `now` (the same on all) and the flag is set on one of them; waits for the
        device if so."""
        if self.world == 1 or not now:
            return flag and self.world == 1
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)


def start(device):
    """Joins torchrun's processes, if it started this one. device: "auto", "cpu" or "cuda".

    Raises RunError if CUDA is asked for and there is none.
    """
    store = meeting_place()
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "--device cuda: this machine, or this PyTorch build, has no usable CUDA device; use --device cpu "
            "or auto"
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if cuda:
        if local >= torch.cuda.device_count():
            raise RunError(
                f"{local + 1} processes or more on a machine with {torch.cuda.device_count()} CUDA devices: "
                "start fewer"
            )
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
    else:
        keep_heap()
    if world > 1:
        group = dist.PrefixStore("group", store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=group, rank=rank, world_size=world, timeout=DECODING
        )
    return Process(torch.device("cuda", local) if cuda else torch.device("cpu"), rank, world)


def meeting_place():
    """The part of torchrun's key-value store that is these processes' own; None for a process alone. Waits
    for all of them, once.

    Raises RunError if they do not meet.
    """
    met = _meet()
    if isinstance(met, RunError):
        raise met
    return met


@functools.cache
def _meet():
    """meeting_place's store, or its error.

    After a restart torchrun's store is the same one and holds the addresses of processes that have gone, and
    the torchruns of two machines may count restarts differently. So rank 0 names a new part of the store, and
    tells each rank that comes to the door, which says that it has heard.
    """
    own = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world == 1:
            return None
        store, _, _ = next(dist.rendezvous("env://"))
        if rank > 0:
            store.set(f"at the door: {rank}", own)
            store.wait([f"room of {own}"], MEETING)
            room = store.get(f"room of {own}").decode()
            store.set(f"{room} has {rank}", "")
            return dist.PrefixStore(room, store)
        missing, deadline = set(range(1, world)), time.monotonic() + MEETING.total_seconds()
        while missing:
            if time.monotonic() > deadline:
                return RunError(f"{len(missing)} of {world} processes did not come: what they say tells why")
            for other in filter(lambda other: store.check([f"at the door: {other}"]), missing):
                store.set(f"room of {store.get(f'at the door: {other}').decode()}", own)
            missing = {other for other in missing if not store.check([f"{own} has {other}"])}
            time.sleep(0.02)
        return dist.PrefixStore(own, store)
    except (ValueError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        return RunError(
            f"the processes that WORLD_SIZE={os.environ['WORLD_SIZE']} promises do not meet ({reason}): use "
            "torchrun"
        )


def first_to_speak():
    """True on the first rank that asks. An error that many ranks meet, or that ends the others, is told
    once."""
    try:
        return meeting_place() is None or meeting_place().add("spoken", 1) == 1
    except (RuntimeError, RunError):  # there is no store, or it has gone with the process that kept it
        return True


def keep_heap():
    """Asks glibc, where there is one, to keep freed memory: to give a step's tensors back to the system and
    to fetch them anew, page by page, takes a CPU longer than to fill them."""
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(mmap_max, 0)  # large tensors, too, come from the heap


def stop():
    """Leaves the other processes, when the model is no longer used."""
    if dist.is_initialized():
        gc.collect()  # of DDP, which would end the group while it holds the interpreter: a deadlock
        dist.destroy_process_group()
