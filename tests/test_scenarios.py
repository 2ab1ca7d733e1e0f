"""Tasks: disjoint, complete, those of the released code, and a function of labels, domains and seed alone."""

import pytest
import torch

from data.datasets import ImageSet
from data.scenarios import class_order, plan, split

RNG = torch.Generator().manual_seed(0)
LABELS, DOMAINS = torch.randint(0, 20, (703,), generator=RNG), torch.randint(0, 4, (703,), generator=RNG)
CASES = [("class", 1), ("class", 2), ("class", 5), ("data", 1), ("data", 5), ("domain", 1), ("domain", 4)]


@pytest.mark.parametrize("scenario, tasks", CASES)
def test_parts_are_disjoint_complete_and_repeatable(scenario, tasks):
    parts = split(LABELS, DOMAINS, 20, scenario, tasks, seed=5)
    assert len(parts) == tasks and all(torch.equal(part, part.sort().values) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(703))
    torch.manual_seed(99)  # neither the global generator nor the number of threads matters
    torch.set_num_threads(2)
    again = split(LABELS.clone(), DOMAINS.clone(), 20, scenario, tasks, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


def test_parts_are_the_released_ones():
    """Classes: torch.randperm after seeding. Data: random_split, whose first part takes the remainder."""
    torch.manual_seed(5)
    expected, labels = torch.randperm(100).chunk(5), torch.arange(100).repeat(7)
    assert all(torch.equal(a, b) for a, b in zip(class_order(100, 5, 5), expected, strict=True))
    for part, own in zip(split(labels, None, 100, "class", 5, seed=5), expected, strict=True):
        assert sorted(labels[part].tolist()) == sorted(7 * own.tolist())
    rng = torch.Generator().manual_seed(42)
    expected = torch.utils.data.random_split(range(23), [7, 4, 4, 4, 4], generator=rng)
    for seed in (5, 6):
        parts = split(labels[:23], None, 100, "data", 5, seed)
        assert [part.tolist() for part in parts] == [sorted(part.indices) for part in expected]


def test_what_a_task_is_tested_on():
    """Its classes, the whole test set, or its domain."""
    more = [str(c) for c in range(20)], (0,), (1,)
    train = ImageSet(torch.zeros(703, 3, 1, 1), LABELS, *more, DOMAINS, tuple("abcd"))
    test = train.subset(torch.arange(200))
    everything = list(range(200))
    tasks = plan(train, test, "class", None, 5)
    assert len(tasks.names) == 5 and sorted(torch.cat(tasks.test).tolist()) == everything
    for part, names, tested in zip(tasks.train, tasks.names, tasks.test, strict=True):
        assert set(LABELS[part].tolist()) == set(LABELS[tested].tolist()) == set(names)
    tasks = plan(train, test, "domain", None, 5)
    assert tasks.names == list("abcd") and sorted(torch.cat(tasks.test).tolist()) == everything
    for domain, parts in enumerate(zip(tasks.train, tasks.test)):
        assert all((DOMAINS[part] == domain).all() for part in parts)
    assert [part.tolist() for part in plan(train, test, "data", 3, 5).test] == [everything] * 3
    assert plan(train, None, "class", 5, 5).test is None
    train.probe = test  # labels from elsewhere: the task's classes are not among them
    assert [part.tolist() for part in plan(train, test, "class", 5, 5).test] == [everything] * 5
