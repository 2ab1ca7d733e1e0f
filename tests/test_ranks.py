"""Two or three processes compute what one computes: parameters, queues, EMA twin and running statistics after several steps in
float64, evaluation bit for bit; and a run may go on with another number of them."""

import gc
import os
import socket

import pytest
import torch
import torch.distributed as dist
from conftest import arguments, start_ranks

import main_cssl
from losses import METHODS, REGULARIZERS
from models.parallel import CrossRankBatchNorm
from utils import distributed, evaluate
from utils.distributed import Process
from utils.run import Run

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
    torch.save(evaluation(Process(torch.device("cpu"), rank, world)), f"{folder}/evaluation{rank}.pt")
    x = torch.randn(2 * world, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    norm = CrossRankBatchNorm(3, dtype=torch.float64)
    part = x[2 * rank : 2 * rank + 2].requires_grad_()
    (norm(part) ** 3).sum().backward()
    torch.save({"grad": part.grad, **norm.state_dict()}, f"{folder}/norm{rank}.pt")
    norm = CrossRankBatchNorm(3)
    torch.save({"y": norm(part.detach().bfloat16()), **norm.state_dict()}, f"{folder}/bf16{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(worker, request.param, str(folder))
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


def evaluation(process):
    """Features, labels and both protocols' predictions for all digits, gathered from shares of which some are empty."""
    args = arguments("--batch_size 36 --precision fp32")
    _, probe, test, tasks = main_cssl.build_data(args, process)
    backbone = main_cssl.build_learner(args, process).method.backbone
    known, tested = main_cssl.frozen_features(args, process, backbone, probe, test)
    assert sum(process.counts(len(known[0]))) == len(probe.labels)
    found = {"train": process.gather(known[0]), "test": process.gather(tested[0]), "labels": process.gather(known[1])}
    for protocol in ("knn", "linear"):
        args.eval, args.probe_lr = protocol, 3.0  # so high that rounding of another order would show
        found[protocol] = process.gather(evaluate.classify(args, process, *known, tested[0], 10))
        found[f"{protocol} row"] = main_cssl.accuracies(args, process, known, tested, probe.classes, tasks)
    return found


def test_evaluation_is_shared(world):
    """Every rank has the single process's features, predictions and accuracies, bit for bit."""
    count, folder = world
    single = evaluation(Process(torch.device("cpu")))
    assert len(set(single["linear"].tolist())) == 10 and single["linear row"] != single["knn row"]
    for rank in range(count):
        together = torch.load(folder / f"evaluation{rank}.pt")
        for name, value in single.items():
            assert torch.equal(torch.as_tensor(together[name]), torch.as_tensor(value)), (rank, name)


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


def test_batch_norm_over_ranks_in_bf16(world):
    """As under autocast: the input and output in bf16, statistics in full precision."""
    count, folder = world
    x = torch.randn(2 * count, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).bfloat16()
    norm = torch.nn.BatchNorm2d(3)
    y = norm(x.float()).bfloat16()
    for rank in range(count):
        saved = torch.load(folder / f"bf16{rank}.pt")
        torch.testing.assert_close(saved.pop("y"), y[2 * rank : 2 * rank + 2])
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(saved[key], value)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Interrupted(Exception):
    """Stands for a machine that fails."""


def partial_run(rank, world, port, folder, steps):
    """main_cssl.py in float64 on `world` ranks, until this many steps are saved (0: to its end)."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    distributed.meeting_place.cache_clear()

    class Float64(main_cssl.Learner):
        def forward(self, *views):
            return super().forward(*(view.double() for view in views))

        def begin_task(self, task, device):
            super().begin_task(task, device)
            self.double()

    def save(self, **parts):
        save_run(self, **parts)
        if self.global_step == steps:
            raise Interrupted

    save_run = Run.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_cssl, "Learner", Float64)
        patch.setattr(Run, "save", save)
        args = arguments(
            f"--num_tasks 2 --epochs 1 --batch_size 36 --moco_queue_size 72 --save_every 4 --eval none --out_dir {folder}"
        )
        try:
            main_cssl.main(args)
        except Interrupted:
            assert steps
        distributed.stop()
        gc.collect()  # the lock of the run folder
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]


def test_resume_on_another_number_of_ranks(tmp_path):
    """Saved on 2 ranks in the first task, on 1 in PNR's, finished on 3: in float64 the run that one process makes."""
    partial_run(0, 1, None, tmp_path / "one", 0)
    start_ranks(partial_run, 2, free_port(), tmp_path / "many", 8)
    partial_run(0, 1, None, tmp_path / "many", 24)
    start_ranks(partial_run, 3, free_port(), tmp_path / "many", 0)
    one, many = (torch.load(tmp_path / name / "last.pt") for name in ("one", "many"))
    assert one["counters"] == many["counters"] and one["counters"]["global_step"] == 39
    assert one["learner"].keys() == many["learner"].keys() and "regularizer.queue.rows" in one["learner"]
    for part in ("learner", "optimizer"):
        torch.testing.assert_close(many[part], one[part], rtol=1e-8, atol=1e-8)
