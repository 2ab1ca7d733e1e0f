"""One process, or one of many that torchrun started; and how each of them ends."""

import errno
import gc
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import UserError
from utils.stop import end_workers

TIMEOUT = timedelta(hours=12)  # rank 0 may decode a data set before the others
AGAIN = "what was saved is safe: the same command again goes on"
MEMORY = "out of memory: lower --batch_size, --image_size, --width or the size of queue or heads"
KILLED = "a worker process that decodes images was killed, as a system out of memory does, or a container"
ENDED = "another process of this run ended without a word"
NO_MEMORY = "can't allocate memory, out of memory, ALLOC_FAILED, size calculation overflowed"
LOST = "closed by peer, closed by remote peer, likely closed, reset by peer, Broken pipe, process exited"
KNOWN_ERRORS = {  # words of RuntimeErrors, and what they mean
    "DataLoader timed out": f"no images came for minutes: does the disk of --data_dir answer? {AGAIN}",
    "DataLoader worker": f"{KILLED} out of shared memory: lower --workers or --batch_size; {AGAIN}",
    **dict.fromkeys(NO_MEMORY.split(", "), MEMORY),
    "InvalidCxxCompiler": "--compile needs a C++ compiler on a CPU: install g++, or leave --compile out",
    **dict.fromkeys(LOST.split(", "), f"{ENDED}: was it killed, or did its machine fail? {AGAIN}"),
}
store = None  # where the processes met


@dataclass(frozen=True)
class Process:
    """rank of world processes, and the device that is its own."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        return self.rank == 0

    def rank0_first(self, function):
        """The function's result, on rank 0 before the others, so that these find the files that it writes."""
        if not self.main:
            self.collect(None)  # NCCL's barrier would guess this rank's device
        result = function()
        if self.main:
            self.collect(None)
        return result

    def collect(self, x):
        """x of all ranks, in rank order: any small objects."""
        found = [x] * self.world
        if self.world > 1:
            dist.all_gather_object(found, x)
        return found

    def gather(self, x):
        """The rows of all ranks, in rank order, on all of them. x: [n, ...]; n may differ between ranks."""
        if self.world == 1:
            return x
        counts = self.collect(len(x))
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def sum(self, *tensors):
        """Replaces each tensor by its sum over ranks."""
        for x in tensors if self.world > 1 else ():
            dist.all_reduce(x)

    def any_rank(self, flag):
        """Whether the flag is set on one of the ranks. Waits for the device where there are several."""
        if self.world == 1:
            return bool(flag)
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes)
        return bool(votes)

    def require_same(self, values):
        """Raises UserError unless all ranks give equal values, by name."""
        first, *others = self.collect(values)
        for rank, other in enumerate(others, 1):
            for name in (name for name in first if other[name] != first[name]):
                words = f"process {rank} of {self.world} has another {name} than process 0"
                need = "all machines need the same flags, the same images, and one run folder that they share"
                raise UserError(f"{words}: {other[name]}, not {first[name]}; {need}")


def start(device):
    """Joins torchrun's processes, if it started this one. device: "auto", "cpu" or "cuda". Raises UserError
    if CUDA is asked for and there is none."""
    global store
    cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: no usable CUDA device in this machine: use --device cpu or auto")
    rank, world, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means that
    if world > 1:
        try:
            store, rank, world = next(dist.rendezvous("env://"))
            store.set_timeout(TIMEOUT)  # NCCL's processes meet there at their first collective
        except (ValueError, dist.DistError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"the processes of WORLD_SIZE do not meet ({why}): use torchrun") from error
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the store, with all addresses in it
        if kept and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            why = "processes that torchrun starts again would wait for those that have gone"
            raise UserError(f"--max-restarts: {why}; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 first")
        backend, group = "nccl" if cuda else "gloo", dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=TIMEOUT)
    return Process(torch.device("cuda", local) if cuda else torch.device("cpu"), rank, max(world, 1))


def report_errors(function, program):
    """The exit status of function(), or 0. What a user can mend is one line and status 2; an error that many
    ranks meet, or that ends the others, is told once, by the first of them."""
    try:
        try:
            status = function() or 0
        finally:  # while the error still holds their iterators, which would tell of a worker's late end, too
            end_workers()
        if dist.is_initialized():
            gc.collect()  # of DDP, which would end the group while it holds the interpreter: a deadlock
            dist.destroy_process_group()
        return status
    except Exception as error:
        message = explain(error)
        try:
            speaks = store is None or store.add("spoken", 1) == 1
        except RuntimeError:  # it has gone with the process that kept it
            speaks = True
        if speaks and message is None:
            raise
        if speaks:
            print(f"{program}: error: {message}", file=sys.stderr)
        return 1 if message is None else 2


def explain(error):
    """One line for an error; None where only a traceback can say what it is."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error}; free some space and run the same command again"
    if isinstance(error, (ConnectionError, EOFError)):  # while a batch was handed over
        return KNOWN_ERRORS["DataLoader worker"]
    if isinstance(error, (UserError, OSError)):
        return str(error)
    told = (advice for words, advice in KNOWN_ERRORS.items() if words in str(error))
    return next(told, None) if isinstance(error, RuntimeError) else None
