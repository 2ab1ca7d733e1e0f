"""Two or three processes compute what one computes: loss, gradients, parameters, queues, momentum encoder and
running statistics after several steps in float64, evaluation bit for bit; and a run may go on with another
number of them."""

import gc
import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import trees
from conftest import TINY, arguments, run, start_ranks

import main_cssl
import main_linear
from losses import METHODS, REGULARIZERS
from models.parallel import CrossRankBatchNorm
from utils import RunError, distributed, evaluate
from utils.distributed import Process
from utils.run import Run

BATCH, STEPS = 12, 3
# a first task is fine-tuning, whatever the regulariser
CASES = [
    (method, regularizer, int(regularizer != "finetune"), "off")
    for method in METHODS
    for regularizer in REGULARIZERS
]
CASES += [("moco", "pnr", 1, "released"), ("simclr", "finetune", 0, "clean")]


class Convolutions(torch.nn.Sequential):
    """A backbone of two batch norms, since three processes on two cores wait long for each of a ResNet's."""

    feature_dim = 8

    def __init__(self, *_):
        widths = ((3, 8), (8, 8))
        blocks = [
            m
            for i, o in widths
            for m in (torch.nn.Conv2d(i, o, 3), torch.nn.BatchNorm2d(o), torch.nn.ReLU(inplace=True))
        ]
        super().__init__(*blocks, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def train(method, regularizer, task, online, rank, world, of):
    """The learner's state after a few steps on random images, of which each rank sees its share, and the last
    step's loss and gradients. of: the number of ranks that the comparison is about: a ResNet for 2,
    Convolutions for 3."""
    with pytest.MonkeyPatch.context() as patch:
        if of == 3:
            patch.setattr(main_cssl, "build_backbone", Convolutions)
        return train_backbone(method, regularizer, task, online, rank, world)


def train_backbone(method, regularizer, task, online, rank, world):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    args = arguments(
        f"--regularizer {regularizer} --batch_size {BATCH} --precision fp32 --online_probe {online}", method
    )
    args.stem = "cifar"
    process = Process(torch.device("cpu"), rank, world)
    learner = main_cssl.build_learner(args, process, SimpleNamespace(classes=range(4)))
    torch.manual_seed(1)
    learner.begin_task(task, process.device)
    optimizer, model = main_cssl.build_optimizer(args, learner), main_cssl.wrap(learner, process, False)
    images = torch.randn(STEPS, 3, BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(BATCH) % 4
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        labelled = None if online == "off" else (images[step, 2, share], labels[share])
        loss, terms, student, teacher = model(*images[step, :2, share], labelled)
        loss.backward()
        gradients = {
            f"gradient of {name}": p.grad.clone() for name, p in learner.named_parameters() if p.requires_grad
        }
        optimizer.step()
        optimizer.zero_grad()
        learner.after_step(student, teacher, step / STEPS)
    torch.set_default_dtype(torch.float32)
    return {
        "loss": loss.detach(),
        **{name: term.detach() for name, term in terms.items()},
        **gradients,
        **learner.state_dict(),
    }


def worker(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save([train(*case, rank, world, of=world) for case in CASES], f"{folder}/{rank}.pt")
    torch.save(evaluation(Process(torch.device("cpu"), rank, world)), f"{folder}/evaluation{rank}.pt")
    x = torch.randn(2 * world, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    norm = CrossRankBatchNorm(3, dtype=torch.float64)
    part = x[2 * rank : 2 * rank + 2].requires_grad_()
    (norm(part) ** 3).sum().backward()
    torch.save({"grad": part.grad, **norm.state_dict()}, f"{folder}/norm{rank}.pt")
    norm = CrossRankBatchNorm(3)
    torch.save({"y": norm(part.detach().bfloat16()), **norm.state_dict()}, f"{folder}/bf16{rank}.pt")
    process = Process(torch.device("cpu"), rank, world)
    process.require_same({"--lr": 5, "data set": 3})
    with pytest.raises(RunError, match=f"process 1 of {world} has another --lr than process 0: 7, not 5"):
        process.require_same({"--lr": 7 if rank else 5, "data set": 3})
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
        single = train(*case, 0, 1, of=count)
        for rank in range(count):
            together = states[rank][i]
            assert together.keys() == single.keys()
            for key, value in single.items():
                torch.testing.assert_close(
                    together[key], value, rtol=1e-8, atol=1e-8, msg=f"{case}: {key} on rank {rank}"
                )


def evaluation(process):
    """Features, labels and both protocols' predictions for all digits, gathered from shares of which some are
    empty."""
    args = arguments("--batch_size 36 --precision fp32")
    _, probe, test, tasks = main_cssl.build_data(args, process)
    backbone = main_cssl.build_learner(args, process).method.backbone
    known, tested = (main_cssl.frozen_features(args, process, backbone, images) for images in (probe, test))
    assert sum(process.counts(len(known[0]))) == len(probe.labels)
    found = {
        "train": process.gather(known[0]),
        "test": process.gather(tested[0]),
        "labels": process.gather(known[1]),
    }
    found["views"] = process.gather(main_cssl.frozen_features(args, process, backbone, probe, epoch=1)[0])
    everything = torch.ones(len(known[1]), dtype=torch.bool)
    probed = (lambda _: known[0]), known[1], [everything], tested[0], 10
    found["knn"] = process.gather(evaluate.classify(args, process, *probed)[0])
    found["row"] = main_cssl.accuracies(args, process, backbone, probe, tested, tasks)[""]
    setting = {
        "lr": 3.0,
        "momentum": 0.9,
        "seed": 0,
        "epochs": 20,
    }  # at so high a rate rounding in another order would show
    found["linear"] = process.gather(evaluate.linear_probe(*probed, **setting, process=process)[0])
    return found


def test_evaluation_is_shared(world):
    """Every rank has the single process's features, predictions and accuracies, bit for bit."""
    count, folder = world
    single = evaluation(Process(torch.device("cpu")))
    assert len(set(single["linear"].tolist())) == 10 and not torch.equal(single["linear"], single["knn"])
    for rank in range(count):
        together = torch.load(folder / f"evaluation{rank}.pt")
        for name, value in single.items():
            assert torch.equal(torch.as_tensor(together[name]), torch.as_tensor(value)), (rank, name)


def test_batch_norm_over_ranks_is_batch_norm(world):
    count, folder = world
    x = torch.randn(
        2 * count, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).requires_grad_()
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
    x = torch.randn(
        2 * count, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).bfloat16()
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


def join(rank, world, port):
    """What torchrun says to its processes."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def partial_run(rank, world, port, folder, steps):
    """main_cssl.py in float64 on `world` ranks, until this many steps are saved (0: to its end)."""
    if world > 1:
        join(rank, world, port)

    class Float64(main_cssl.Learner):
        def forward(self, view1, view2, labelled):
            return super().forward(view1.double(), view2.double(), labelled)

        def begin_task(self, task, device, loader):
            super().begin_task(task, device, loader)
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
            f"--num_tasks 2 --epochs 1 --batch_size 72 --moco_queue_size 72 --save_every 2 --eval none "
            f"--out_dir {folder}"
        )
        try:
            main_cssl.main(args)
        except Interrupted:
            assert steps
        gc.collect()  # the lock of the run folder
        distributed.stop()


def test_resume_on_another_number_of_ranks(tmp_path):
    """Saved on 2 ranks in the first task, on 1 in PNR's, finished on 3: in float64 the run that one process
    makes."""
    partial_run(0, 1, None, tmp_path / "one", 0)
    start_ranks(partial_run, 2, free_port(), tmp_path / "many", 4)
    partial_run(0, 1, None, tmp_path / "many", 12)
    start_ranks(partial_run, 3, free_port(), tmp_path / "many", 0)
    one, many = (torch.load(tmp_path / name / "last.pt") for name in ("one", "many"))
    spreads = ("start_std", "last_std")
    numbers = [[state["counters"].pop(name) for name in spreads] for state in (one, many)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-8)
    assert one["counters"] == many["counters"] and one["counters"]["global_step"] == 19
    assert one["learner"].keys() == many["learner"].keys() and "regularizer.queue.rows" in one["learner"]
    for part in ("learner", "optimizer"):
        torch.testing.assert_close(many[part], one[part], rtol=1e-8, atol=1e-8)


def evaluate_again(rank, world, port, folder):
    join(rank, world, port)
    assert run(f"--run {folder} --protocol knn", main_linear) == 0


def test_main_linear(tmp_path):
    """Two processes write what one process writes."""
    assert run(f"{TINY} --num_tasks 2 --epochs 1 --eval none --out_dir {tmp_path / 'one'}") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    start_ranks(evaluate_again, 2, free_port(), tmp_path / "two")
    assert run(f"--run {tmp_path / 'one'} --protocol knn", main_linear) == 0
    one, two = ((tmp_path / name / "results.json").read_text() for name in ("one", "two"))
    assert one == two and len(json.loads(one)["knn"]["matrix"]) == 2


def failing(rank, world, port, flags, folder):
    """Leaves what it says on standard error, and its exit status, in the folder."""
    os.dup2(os.open(f"{folder}/err{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    join(rank, world, port)
    status = run(flags)
    Path(f"{folder}/status{rank}").write_text(str(status))
    os._exit(0)  # at once, as a process ends


@pytest.mark.parametrize("case", ["all ranks", "one rank"])
def test_an_error_is_told_once(tmp_path, case):
    """One that every rank meets, and a file that only the rank meets that has to decode it; the other stops,
    too."""
    flags, words = "--batch_size 33", "does not divide by 2"
    if case == "one rank":
        data = trees.fill(tmp_path, [f"{split}/{name}" for split in ("train", "test") for name in "ab"], 16)
        (data / "train" / "a" / "7.JPEG").unlink()
        (data / "train" / "a" / "7.JPEG").write_text("no image")
        flags, words = (
            f"--dataset folder --data_dir {data} --scenario data --workers 1 --batch_size 16",
            "7.JPEG",
        )
    store = dist.TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False
    )  # it outlives the ranks, as torchrun's does
    start_ranks(
        failing,
        2,
        store.port,
        f"{TINY} --num_tasks 2 --eval none {flags} --out_dir {tmp_path / 'run'}",
        tmp_path,
    )
    lines = [line for rank in (0, 1) for line in (tmp_path / f"err{rank}").read_text().splitlines()]
    assert (
        len([line for line in lines if line.startswith("program: error:") and words in line])
        == 1
        == len(lines)
    ), lines
    assert "0" not in [(tmp_path / f"status{rank}").read_text() for rank in (0, 1)]


def whole_run(rank, world, port, flags):
    join(rank, world, port)
    assert run(flags) == 0


def test_a_rank_may_have_nothing_but_unreadable_images(tmp_path):
    """With --skip_corrupt the second rank's share of the test set is two broken files: no reason to stop."""
    data = trees.fill(tmp_path, ["train/a", "train/b"], 16)
    trees.fill(tmp_path, ["test/a", "test/b"], 257)
    for path in sorted((data / "test" / "b").iterdir())[-2:]:
        path.unlink()
        path.write_text("no image")
    flags = f"{TINY} --dataset folder --data_dir {data} --scenario data --num_tasks 1 --epochs 1"
    flags += " --batch_size 16 --workers 1"
    start_ranks(whole_run, 2, free_port(), f"{flags} --skip_corrupt --out_dir {tmp_path / 'run'}")
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["matrix"]) == 1
