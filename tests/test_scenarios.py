"""Tasks: disjoint, complete, those of the released code, and a function of labels, domains and seed alone."""

import argparse

import pytest
import torch

from data.datasets import ImageSet
from data.scenarios import class_parts, plan, split
from utils import UserError

NAMES = [str(c) for c in range(20)]
RNG = torch.Generator().manual_seed(0)
LABELS, DOMAINS = torch.randint(0, 20, (703,), generator=RNG), torch.randint(0, 4, (703,), generator=RNG)
CASES = [("class", 1), ("class", 2), ("class", 5), ("data", 1), ("data", 5), ("domain", 1), ("domain", 4)]


def flags(scenario, num_tasks, order=None, sizes=None):
    given = dict(
        scenario=scenario, num_tasks=num_tasks, seed=5, class_order=order, task_sizes=sizes, sequence=None
    )
    return argparse.Namespace(**given)


@pytest.mark.parametrize("scenario, tasks", CASES)
def test_parts_are_disjoint_complete_and_repeatable(scenario, tasks):
    classes = class_parts(NAMES, tasks, seed=5)
    parts = split(LABELS, DOMAINS, scenario, classes, tasks)
    assert len(parts) == tasks and all(torch.equal(part, part.sort().values) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(703))
    torch.manual_seed(99)  # neither the global generator nor the number of threads matters
    torch.set_num_threads(2)
    again = split(LABELS.clone(), DOMAINS.clone(), scenario, class_parts(NAMES, tasks, seed=5), tasks)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


def test_parts_are_the_released_ones():
    """Classes: torch.randperm after seeding. Data: random_split, whose first part takes the remainder."""
    torch.manual_seed(5)
    expected, labels = torch.randperm(100).chunk(5), torch.arange(100).repeat(7)
    parts = class_parts(range(100), 5, 5)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))
    for part, own in zip(split(labels, None, "class", parts, 5), expected, strict=True):
        assert sorted(labels[part].tolist()) == sorted(7 * own.tolist())
    rng = torch.Generator().manual_seed(42)
    expected = torch.utils.data.random_split(range(23), [7, 4, 4, 4, 4], generator=rng)
    parts = split(labels[:23], None, "data", None, 5)
    assert [part.tolist() for part in parts] == [sorted(part.indices) for part in expected]


def test_what_a_task_is_tested_on():
    """Its classes, the whole test set, or its domain."""
    more = NAMES, (0,), (1,)
    train = ImageSet(torch.zeros(703, 3, 1, 1), LABELS, *more, DOMAINS, tuple("abcd"))
    test = train.subset(torch.arange(200))
    everything = list(range(200))
    tasks = plan(train, test, flags("class", None))
    assert len(tasks.names) == 5 and sorted(torch.cat(tasks.test).tolist()) == everything
    for part, names, tested in zip(tasks.train, tasks.names, tasks.test, strict=True):
        assert set(LABELS[part].tolist()) == set(LABELS[tested].tolist()) == set(map(int, names))
    tasks = plan(train, test, flags("domain", None))
    assert tasks.names == list("abcd") and sorted(torch.cat(tasks.test).tolist()) == everything
    for domain, parts in enumerate(zip(tasks.train, tasks.test)):
        assert all((DOMAINS[part] == domain).all() for part in parts)
    assert [part.tolist() for part in plan(train, test, flags("data", 3)).test] == [everything] * 3
    assert plan(train, None, flags("class", 5)).test is None
    train.probe = test  # labels from elsewhere: the task's classes are not among them
    assert [part.tolist() for part in plan(train, test, flags("class", 5)).test] == [everything] * 5


def test_order_and_sizes():
    """Classes come in the order given, as many as asked for; what does not fit them is told."""
    train = ImageSet(torch.zeros(703, 3, 1, 1), LABELS, NAMES, (0,), (1,))
    tasks = plan(train, train, flags("class", None, NAMES[::-1], [2, 17, 1]))
    assert tasks.names == [["19", "18"], [str(c) for c in range(17, 0, -1)], ["0"]]
    assert [set(LABELS[part].tolist()) for part in tasks.train] == [{18, 19}, {*range(1, 18)}, {0}]
    assert [len(names) for names in plan(train, None, flags("class", None, sizes=[5, 15])).names] == [5, 15]
    for wrong, words in {
        (*NAMES[1:],): "0 is in only one", (*NAMES, "20"): "20 is in only", (*NAMES, "7"): "7 is twice",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            plan(train, None, flags("class", None, [*wrong]))
    for call in (
        flags("class", 3, sizes=[5, 15]),
        flags("class", None, sizes=[5]),
        flags("data", 2, NAMES),
    ):
        with pytest.raises(UserError, match="--task_sizes"):
            plan(train, None, call)
