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


def split(labels, domains, scenario, parts, num_tasks):
    """Which samples belong to which task: a list of num_tasks int64 index tensors, ascending, disjoint,
    covering everything. One task is joint training. labels: int64 [N], -1 for none; domains: int64 [N], or
    None where there is only one. class: parts, the classes of each task, int64. data: random equal parts, the
    remainder to the first, from a seed of its own (torch's random_split, as released). domain: one domain a
    task, in the order of their numbers. Raises UserError where num_tasks or the data do not fit the
    scenario."""
    if num_tasks == 1:
        return [torch.arange(len(labels))]
    if scenario == "class":
        if len(labels) and labels.max() < 0:
            advice = "use --scenario data, or --num_tasks 1"
            raise UserError(f"--scenario class: the training images have no labels: {advice}")
        return [torch.isin(labels, classes).nonzero()[:, 0] for classes in parts]
    if scenario == "data":
        if num_tasks > len(labels):
            raise UserError(f"--num_tasks {num_tasks}: only {len(labels)} training images: lower it")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(DATA_SEED))
        size = len(labels) // num_tasks
        sizes = [size + len(labels) % num_tasks, *[size] * (num_tasks - 1)]
        return [part.sort().values for part in order.split(sizes)]
    count = 1 if domains is None else int(domains.max()) + 1
    if num_tasks != count:
        has = f"the data set has {count} domain{'s' * (count > 1)}, and --scenario domain trains one a task"
        raise UserError(f"--num_tasks {num_tasks}: {has}: leave it out, or choose other domains")
    return [(domains == d).nonzero()[:, 0] for d in range(count)]


def class_parts(classes, num_tasks, seed, order=None, sizes=None):
    """The classes of each task: a list of int64 tensors. classes: their names; order: these names in the
    order in which they come; without it they are shuffled by `seed` (torch.randperm, as the released code
    does); sizes: how many each task has, by default all equally many. Raises UserError where order or sizes
    do not fit the classes."""
    count = len(classes)
    if order is None:
        numbers = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    else:
        if odd := [*sorted({*order} ^ {*classes}), *sorted({x for x in order if order.count(x) > 1})]:
            how = "twice in it" if odd[0] in order and odd[0] in classes else "in only one of both"
            words = f"its {len(order)} names are not the {count} classes: {odd[0]} is {how}"
            raise UserError(f"--class_order: {words}")
        numbers = torch.tensor([classes.index(name) for name in order])
    if sizes and sum(sizes) != count:
        words = f"{sum(sizes)} of {count} classes: use them all"
        raise UserError(f"--task_sizes {' '.join(map(str, sizes))}: {words}")
    if not sizes and count % num_tasks:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        advice = f"choose of {fitting}, or --task_sizes"
        raise UserError(f"--num_tasks {num_tasks} does not divide {count} classes: {advice}")
    return list(numbers.split(sizes or count // num_tasks))


def plan(train, test, args):
    """The Tasks of a training and a test ImageSet (None where there is none). args: the data flags; num_tasks
    None: one for each domain or size, or else 5. A task is tested on its own classes or its own domain.
    Data-incremental tasks, joint training, and training images that have another test set than their own
    (train.probe) are tested on the whole of it; but joint training of --sequence on each set."""
    scenario, sizes, count = args.scenario, args.task_sizes, args.num_tasks
    if scenario == "domain" and train.domains is None:
        raise UserError("--scenario domain: the data set has no domains: use --scenario class or data")
    if (sizes or args.class_order) and scenario != "class":
        raise UserError("--class_order, --task_sizes: for --scenario class")
    if sizes and count not in (None, len(sizes)):
        raise UserError(f"--num_tasks {count}: --task_sizes gives {len(sizes)}: leave one of them out")
    default = len(train.domain_names) if scenario == "domain" else len(sizes or ()) or DEFAULT_TASKS
    count, parts, names = count or default, None, None
    if scenario == "class" and train.classes and (count > 1 or sizes or args.class_order):
        parts = class_parts(train.classes, count, args.seed, args.class_order, sizes)
    if parts and count > 1:
        names = [[train.classes[c] for c in part.tolist()] for part in parts]
    elif scenario == "domain" and count == len(train.domain_names):
        names = list(train.domain_names)
    tested, trained = None, split(train.labels, train.domains, scenario, parts, count)
    if test is not None and (scenario == "data" or train.probe is not None):
        tested = [torch.arange(len(test.labels))] * count
    elif test is not None:
        columns = len(train.domain_names) if args.sequence else count
        tested = split(test.labels, test.domains, scenario, parts, columns)
    return Tasks(names or [f"part {t} of {count}" for t in range(count)], trained, tested)
