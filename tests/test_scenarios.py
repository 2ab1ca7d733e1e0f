"""Tasks: disjoint, complete, those of the released code, and a function of labels, domains and seed alone."""

import pytest
import torch

from data import DataError
from data.datasets import ImageSet
from data.scenarios import class_order, plan, split


def labels_and_domains(n=703, classes=20, domains=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (n,), generator=rng), torch.randint(0, domains, (n,), generator=rng)


@pytest.mark.parametrize(
    "scenario, tasks",
    [(s, t) for s in ("class", "data", "domain") for t in (1, 2, 4, 5) if s != "domain" or t in (1, 4)],
)
def test_parts_are_disjoint_complete_and_repeatable(scenario, tasks):
    labels, domains = labels_and_domains()
    parts = split(labels, domains, 20, scenario, tasks, seed=5)
    assert len(parts) == tasks and all(len(part) for part in parts)
    assert all(torch.equal(part, part.sort().values) for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))
    torch.manual_seed(99)  # neither the global generator nor the number of threads matters
    torch.set_num_threads(2)
    again = split(labels.clone(), domains.clone(), 20, scenario, tasks, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


@pytest.mark.parametrize("tasks", [1, 5, 10])
def test_classes_are_the_released_ones(tasks):
    """torch.randperm after seeding, in chunks; whole classes."""
    labels = torch.arange(100).repeat(7)
    torch.manual_seed(5)
    expected = torch.randperm(100).chunk(tasks)
    assert all(torch.equal(a, b) for a, b in zip(class_order(100, tasks, 5), expected, strict=True))
    for part, own in zip(split(labels, None, 100, "class", tasks, seed=5), expected, strict=True):
        assert set(labels[part].tolist()) == set(own.tolist()) and len(part) == 700 // tasks


def test_data_parts_are_those_of_random_split():
    """The released code's call; the first part takes the remainder, and the run's seed changes nothing."""
    labels = torch.zeros(23, dtype=torch.int64)
    sizes = [23 // 5 + 23 % 5, 4, 4, 4, 4]
    expected = torch.utils.data.random_split(range(23), sizes, generator=torch.Generator().manual_seed(42))
    for seed in (5, 6):
        parts = split(labels, None, 1, "data", 5, seed)
        assert [part.tolist() for part in parts] == [sorted(part.indices) for part in expected]


def test_domains_are_tasks():
    labels, domains = labels_and_domains()
    for task, part in enumerate(split(labels, domains, 20, "domain", 4, seed=5)):
        assert (domains[part] == task).all() and len(part) == (domains == task).sum()


def test_misfits():
    labels, domains = labels_and_domains()
    none = torch.full((40,), -1)
    for words, arguments in {
        "does not divide the 20 classes": (labels, None, 20, "class", 3),
        "has 1 domain, ": (labels, None, 20, "domain", 4),
        "has 4 domains": (labels, domains, 20, "domain", 3),
        "have no labels": (none, None, 0, "class", 2),
        "more than the 40": (none, None, 0, "data", 41),
    }.items():
        with pytest.raises(DataError, match=words):
            split(*arguments, seed=5)
    assert [len(p) for p in split(none, None, 0, "data", 2, 5)] == [20, 20]
    assert len(split(none, None, 0, "class", 1, 5)[0]) == 40  # joint training needs no labels


def images(count, seed, probe=None):
    labels, domains = labels_and_domains(count, seed=seed)
    return ImageSet(
        torch.zeros(count, 3, 1, 1),
        labels,
        [str(c) for c in range(20)],
        (0,) * 3,
        (1,) * 3,
        domains,
        tuple("abcd"),
        probe,
    )


def test_what_a_task_is_tested_on():
    """Its classes, the whole test set, or its domain."""
    train, test = images(300, 1), images(200, 2)
    by_class = plan(train, test, "class", 5, 5)
    for part, names, tested in zip(by_class.train, by_class.names, by_class.test, strict=True):
        assert set(train.labels[part].tolist()) == set(test.labels[tested].tolist()) == set(names)
    everything = torch.arange(200)
    by_data = plan(train, test, "data", 5, 5)
    assert all(torch.equal(part, everything) for part in by_data.test) and len(by_data.test) == 5
    by_domain = plan(train, test, "domain", 4, 5)
    assert by_domain.names == list("abcd")
    assert (
        all((test.domains[part] == task).all() for task, part in enumerate(by_domain.test))
        and len(torch.cat(by_domain.test)) == 200
    )
    assert torch.equal(plan(train, test, "domain", 1, 5).test[0], everything)
    foreign = images(300, 1, probe=test)
    assert all(torch.equal(part, everything) for part in plan(foreign, test, "class", 5, 5).test)
    assert plan(train, None, "class", 5, 5).test is None
