"""A batch that does not fit into memory: which one would."""

import traceback
from contextlib import contextmanager

import torch

from utils import UserError

# words of RuntimeErrors
OUT_OF_MEMORY = "can't allocate memory", "out of memory", "ALLOC_FAILED", "size calculation overflowed"


@contextmanager
def explained(learner, args, process):
    """Where a step meets the end of memory: UserError with the largest half, quarter, ... of --batch_size
    whose passes fit. Several processes would have to meet it together; theirs is told as it is."""
    try:
        yield
    except RuntimeError as error:
        if process.world > 1 or not of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the step's activations
        smaller = [args.batch_size >> k for k in range(1, args.batch_size.bit_length() - 1)]
        fitting = next((n for n in smaller if fits(learner, n, args.image_size, process.device)), None)
        if fitting is None:
            raise
        words = f"out of memory; forward and backward pass of {fitting} images fit (a smaller --width,"
        words += " --image_size, queue or head helps, too)"
        raise UserError(f"--batch_size {args.batch_size}: {words}") from error


def of_memory(error):
    return any(words in str(error) for words in OUT_OF_MEMORY)


def fits(learner, count, size, device):
    """Whether forward and backward pass of so many images find memory."""
    learner.zero_grad(set_to_none=True)
    view = torch.zeros(count, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labelled = learner.online and (view, torch.zeros(count, dtype=torch.int64, device=device))
    try:
        learner.forward(view, view, labelled)[0].backward()  # not compiled, which would take minutes
    except RuntimeError as error:
        if not of_memory(error):
            raise
        return False
    return True
