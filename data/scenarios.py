"""How a data set becomes a sequence of tasks: a pure function of labels and domains."""

from dataclasses import dataclass

import torch

from utils import UserError

DEFAULT_TASKS = 5
DATA_SEED = 42  # of data-incremental parts, whatever the run's seed: that of the released code


@dataclass
class Tasks:
    """One entry per task. names: what it is (its classes, its part, its domain); train, test: int64 indices
    into the training and the test set, ascending; test is None where there is no labelled test set."""

    names: list
    train: list
    test: list | None


def split(labels, domains, num_classes, scenario, num_tasks, seed):
    """Which samples belong to which task: a list of num_tasks int64 index tensors, ascending, disjoint,
    covering everything. One task is joint training. labels: int64 [N], -1 for none; domains: int64 [N], or
    None where there is only one. class: the classes are shuffled by `seed` (torch.randperm, as the released
    code does) and cut into equal parts. data: random equal parts, the remainder to the first, from a seed of
    its own (torch's random_split, as released). domain: one domain a task, in the order of their numbers.
    Raises UserError where num_tasks or the data do not fit the scenario."""
    if num_tasks == 1:
        return [torch.arange(len(labels))]
    if scenario == "class":
        if len(labels) and labels.max() < 0:
            advice = "use --scenario data, or --num_tasks 1"
            raise UserError(f"--scenario class: the training images have no labels: {advice}")
        return [torch.isin(labels, c).nonzero()[:, 0] for c in class_order(num_classes, num_tasks, seed)]
    if scenario == "data":
        if num_tasks > len(labels):
            raise UserError(
                f"--num_tasks {num_tasks}: there are only {len(labels)} training images: lower it"
            )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(DATA_SEED))
        size = len(labels) // num_tasks
        sizes = [size + len(labels) % num_tasks, *[size] * (num_tasks - 1)]
        return [part.sort().values for part in order.split(sizes)]
    count = 1 if domains is None else int(domains.max()) + 1
    if num_tasks != count:
        has = f"the data set has {count} domain{'s' * (count > 1)}, and --scenario domain trains one a task"
        raise UserError(f"--num_tasks {num_tasks}: {has}: leave it out, or choose with --domain_order")
    return [(domains == d).nonzero()[:, 0] for d in range(count)]


def class_order(num_classes, num_tasks, seed):
    """The classes of each task: a list of int64 tensors. Raises UserError if num_tasks does not divide
    them."""
    if num_classes % num_tasks:
        fitting = [n for n in range(1, num_classes + 1) if num_classes % n == 0]
        raise UserError(f"--num_tasks {num_tasks} does not divide {num_classes} classes: choose of {fitting}")
    return list(torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed)).chunk(num_tasks))


def plan(train, test, scenario, num_tasks, seed):
    """The Tasks of a training and a test ImageSet (None where there is none); num_tasks None: one per domain,
    or else 5. A task is tested on its own classes or its own domain. Data-incremental tasks, joint training,
    and training images that have another test set than their own (train.probe) are tested on the whole of
    it."""
    if scenario == "domain" and train.domains is None:
        raise UserError("--scenario domain: the data set has no domains: use --scenario class or data")
    if num_tasks is None:
        num_tasks = len(train.domain_names) if scenario == "domain" else DEFAULT_TASKS
    indices = split(train.labels, train.domains, len(train.classes), scenario, num_tasks, seed)
    if scenario == "class" and num_tasks > 1:
        names = [c.tolist() for c in class_order(len(train.classes), num_tasks, seed)]
    elif scenario == "domain" and num_tasks > 1:
        names = list(train.domain_names)
    else:
        names = [f"part {t} of {num_tasks}" for t in range(num_tasks)]
    if test is None:
        tested = None
    elif scenario == "data" or train.probe is not None:
        tested = [torch.arange(len(test.labels))] * num_tasks
    else:
        tested = split(test.labels, test.domains, len(test.classes), scenario, num_tasks, seed)
    return Tasks(names, indices, tested)
