"""How a data set becomes a sequence of tasks: one pure function of its labels."""

import torch

from data import DataError

SCENARIOS = ("class",)


def split(labels, num_classes, scenario, num_tasks, seed):
    """Which samples belong to which task.

    labels: int64 [N]. Class-incremental: the classes are shuffled by `seed` (torch.randperm, as the released code does) and
    cut into num_tasks equal parts; one task is joint training. Returns (indices, classes): two lists with one int64 tensor
    per task, sample indices in ascending order and the classes of the task.
    Raises DataError if num_tasks does not divide the classes.
    """
    if scenario not in SCENARIOS:
        raise DataError(f"unknown scenario {scenario!r}: choose from {', '.join(SCENARIOS)}")
    if num_tasks < 1 or num_classes % num_tasks:
        fitting = [n for n in range(1, num_classes + 1) if num_classes % n == 0]
        raise DataError(f"--num_tasks {num_tasks} does not divide the {num_classes} classes: choose one of {fitting}")
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    classes = list(order.chunk(num_tasks))
    return [torch.isin(labels, c).nonzero()[:, 0] for c in classes], classes
