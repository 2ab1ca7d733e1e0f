"""benchmarks/scaling.py: its formulas are what a step takes, here in tiny networks; docs/SCALING.md has
larger ones."""

import pytest
import torch.distributed as dist
from conftest import arguments

from benchmarks import scaling
from losses import METHODS, REGULARIZERS


def check(method, regularizer, world=1, backbone="resnet10", stem="cifar"):
    args = arguments(f"--regularizer {regularizer} --precision fp32 --backbone {backbone}", method)
    args.stem = stem
    found = scaling.measure(args, 0, world)
    formula = scaling.memory_formula(args, world) | (
        scaling.communication_formula(args, world) if world > 1 else {}
    )
    loss, B, D = formula.pop("loss"), args.batch_size, scaling.network(args).D
    assert {name: found.get(name, 0) for name in formula} == formula
    # vectors are not in the formula; nor, in several processes, are gathered copies of z
    assert 0 <= found["loss"] - loss <= 4 * (32 * (B + D) + 2 * B * D * (world > 1))


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_memory_is_that_of_the_formula(method, regularizer):
    check(method, regularizer)


@pytest.mark.parametrize(("backbone", "stem"), [("resnet50", "cifar"), ("resnet18", "imagenet")])
def test_the_formula_knows_the_backbones(backbone, stem):
    check("simclr", "pnr", backbone=backbone, stem=stem)


@pytest.mark.filterwarnings("ignore:Grad strides")
@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("method", ["moco", "byol", "barlow"])
def test_communication_is_that_of_the_formula(method, world):
    """Of one process in a group whose collectives send nothing; only what is asked for counts here, not what
    arrives."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=world)
    try:
        check(method, "pnr", world)
    finally:
        dist.destroy_process_group()
