"""Two processes compute what one computes: parameters, queues, EMA twin and running statistics after several steps, in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import arguments

import main_cssl
from losses import METHODS, REGULARIZERS
from models.parallel import CrossRankBatchNorm
from utils.distributed import Process

BATCH, STEPS = 12, 3
# a first task is fine-tuning, whatever the regulariser
CASES = [(method, regularizer, int(regularizer != "finetune")) for method in METHODS for regularizer in REGULARIZERS]


def train(method, regularizer, task, rank, world):
    """The learner's state and the last loss after a few steps on random images, of which each rank sees its share."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    args = arguments(f"--regularizer {regularizer} --batch_size {BATCH} --precision fp32", method)
    args.stem = "cifar"
    process = Process(torch.device("cpu"), rank, world)
    learner = main_cssl.build_learner(args, process)
    torch.manual_seed(1)
    learner.begin_task(task, process.device)
    optimizer, model = main_cssl.build_optimizer(args, learner), main_cssl.wrap(learner, process, False)
    images = torch.randn(STEPS, 2, BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        loss, _, out, old = model(*images[step, :, share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.after_step(out, old, step / STEPS)
    torch.set_default_dtype(torch.float32)
    return {"loss": loss.detach(), **learner.state_dict()}


def worker(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save([train(*case, rank, world) for case in CASES], f"{folder}/{rank}.pt")
    x = torch.randn(2 * world, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    norm = CrossRankBatchNorm(3, dtype=torch.float64)
    part = x[2 * rank : 2 * rank + 2].requires_grad_()
    (norm(part) ** 3).sum().backward()
    torch.save({"grad": part.grad, **norm.state_dict()}, f"{folder}/norm{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (request.param, str(folder)), nprocs=request.param)
    return request.param, folder


def test_ranks_equal_one_process(world):
    count, folder = world
    states = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    for i, case in enumerate(CASES):
        single = train(*case, 0, 1)
        for rank in range(count):
            together = states[rank][i]
            assert together.keys() == single.keys()
            for key, value in single.items():
                torch.testing.assert_close(together[key], value, rtol=1e-8, atol=1e-8, msg=f"{case}: {key} on rank {rank}")


def test_batch_norm_over_ranks_is_batch_norm(world):
    count, folder = world
    x = torch.randn(2 * count, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    norm = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    (norm(x) ** 3).sum().backward()
    for rank in range(count):
        saved = torch.load(folder / f"norm{rank}.pt")
        torch.testing.assert_close(saved.pop("grad"), x.grad[2 * rank : 2 * rank + 2])
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(saved[key], value)
