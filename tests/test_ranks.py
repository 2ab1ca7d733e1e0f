"""Two or three processes compute what one computes: loss, gradients, parameters, queues, momentum encoder and
running statistics after several steps in float64, evaluation bit for bit; and a run may go on with another
number of them."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import trees
from conftest import CPU, TINY, Crash, arguments, fails, free_port, run, settled, start_ranks

import main_cssl
import main_linear
from losses import METHODS, REGULARIZERS
from models.parallel import CrossRankBatchNorm, sync_batch_norms
from utils import UserError, distributed, evaluate
from utils.distributed import Process, explain
from utils.optim import build_optimizer

BATCH, STEPS = 12, 3
# a first task is fine-tuning, whatever the regulariser
CASES = [(m, r, int(r != "finetune"), "off") for m in METHODS for r in REGULARIZERS]
CASES += [("moco", "pnr", 1, "released"), ("simclr", "finetune", 0, "clean")]


class Convolutions(torch.nn.Sequential):
    """A backbone of two batch norms, since three processes on two cores wait long for each of a ResNet's."""

    feature_dim = 8

    def __init__(self, *_):
        blocks = [
            [torch.nn.Conv2d(i, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True)] for i in (3, 8)
        ]
        super().__init__(*blocks[0], *blocks[1], torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


def train(method, regularizer, task, online, process):
    """The learner's state after a few steps on random images, of which each rank sees its share, and the last
    step's loss and gradients."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    flags = f"--regularizer {regularizer} --batch_size {BATCH} --online_probe {online}"
    args = arguments(f"{flags} --precision fp32 --stem cifar", method)
    main_cssl.find(regularizer).resolve(args)
    for name in ("lr", "optimizer", "weight_decay", "online_lr"):
        setattr(args, name, getattr(main_cssl.find(method), name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_cssl, "build_backbone", Convolutions)
        learner = main_cssl.build_learner(args, process, SimpleNamespace(classes=range(4)))
    torch.manual_seed(1)
    learner.begin_task(task, process.device)
    optimizer, model = build_optimizer(args, learner), main_cssl.wrap(learner, process, False)
    images = torch.randn(STEPS, 3, BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(BATCH) % 4
    share = slice(process.rank * BATCH // process.world, (process.rank + 1) * BATCH // process.world)
    for step in range(STEPS):
        labelled = None if online == "off" else (images[step, 2, share], labels[share])
        loss, terms, student, teacher = model(*images[step, :2, share], labelled)
        loss.backward()
        trained = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
        gradients = {f"gradient of {name}": p.grad.clone() for name, p in trained}
        optimizer.step()
        optimizer.zero_grad()
        learner.after_step(student, teacher, step / STEPS)
    torch.set_default_dtype(torch.float32)
    found = {"total": loss, **terms, **gradients, **learner.state_dict()}
    return {name: value.detach() for name, value in found.items()}


def evaluation(process):
    """Features, labels and both protocols' rows for all digits, from shares of which some are empty."""
    args, (_, probe, test, tasks) = settled("--batch_size 36", process=process)
    extract = evaluate.features_of(args, process, main_cssl.build_learner(args, process).method.backbone)
    found = [process.gather(x) for x in (*extract(probe), *extract(probe, 1), *extract(test))]
    cases = [("knn", "cached", 1.0), ("linear", "cached", "sweep"), ("linear", "augmented", 1.0)]
    for args.eval, args.probe_views, args.probe_lr in cases:
        found.append(
            evaluate.accuracy_rows(args, process, extract, probe, extract(test), tasks, (200, 20), True)
        )
    return found


def batch_norm(x, share):
    """The gradient for a share of x, and all states, in float64 and (without gradient) in bf16."""
    norm, half, part = (
        CrossRankBatchNorm(3, dtype=torch.float64),
        CrossRankBatchNorm(3),
        x[share].requires_grad_(),
    )
    (norm(part) ** 3).sum().backward()
    return {"grad": part.grad, **norm.state_dict()}, {
        "y": half(part.detach().bfloat16()),
        **half.state_dict(),
    }


def worker(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    process = Process(torch.device("cpu"), rank, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PROBE_EPOCHS", 4)
        found = [train(*case, process) for case in CASES], evaluation(process)
    x = torch.randn(2 * world, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.save([*found, batch_norm(x, slice(2 * rank, 2 * rank + 2))], f"{folder}/{rank}.pt")
    process.require_same({"--lr": 5, "data set": 3})
    with pytest.raises(UserError, match=f"process 1 of {world} has another --lr than process 0: 7, not 5"):
        process.require_same({"--lr": 7 if rank else 5, "data set": 3})
    assert [process.any_rank(rank == r) for r in (world - 1, world)] == [True, False]
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each of two or three ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(worker, request.param, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def test_training(ranks):
    for i, case in enumerate(CASES):
        alone = train(*case, CPU)
        for rank, (found, *_) in enumerate(ranks):
            assert found[i].keys() == alone.keys()
            for key, value in alone.items():
                message = f"{case}: {key} on rank {rank}"
                torch.testing.assert_close(found[i][key], value, rtol=1e-8, atol=1e-8, msg=message)


def test_evaluation(ranks, monkeypatch):
    monkeypatch.setattr(evaluate, "PROBE_EPOCHS", 4)
    for a, *others in zip(evaluation(CPU), *(found for _, found, _ in ranks)):
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for b in others)


def test_batch_norm(ranks):
    """Against torch's own, of the whole batch."""
    world, norm = len(ranks), torch.nn.BatchNorm2d(3, dtype=torch.float64)
    x = torch.randn(2 * world, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    half = torch.nn.BatchNorm2d(3)
    expected = half(x.bfloat16().float())
    (norm(x.requires_grad_()) ** 3).sum().backward()
    for rank, (*_, (full, low)) in enumerate(ranks):
        share = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(full.pop("grad"), x.grad[share])
        assert low["y"].dtype == torch.bfloat16
        torch.testing.assert_close(low.pop("y").float(), expected[share], rtol=1e-2, atol=1e-2)
        for state, own in ((full, norm), (low, half)):
            for name, value in own.state_dict().items():
                torch.testing.assert_close(state[name], value)


def join(rank, world, port):
    """What torchrun tells a process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


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

    def save_and_crash(self):
        save(self)
        if self.global_step == steps:
            raise Crash

    save = main_cssl.Run.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_cssl, "Learner", Float64)
        patch.setattr(main_cssl.Run, "save", save_and_crash)
        flags = (
            f"{TINY} --num_tasks 2 --epochs 1 --batch_size 72 --moco_queue_size 72 --save_every 2 --eval none"
        )
        try:
            assert run(f"{flags} --out_dir {folder}") == 0
        except Crash:
            assert steps


def test_resume_on_another_number_of_ranks(tmp_path):
    """Saved on 2 ranks in the first task, on 1 in PNR's, finished on 3: in float64 the run that one process
    makes."""
    partial_run(0, 1, None, tmp_path / "one", 0)
    start_ranks(partial_run, 2, free_port(), tmp_path / "many", 4)
    partial_run(0, 1, None, tmp_path / "many", 12)
    start_ranks(partial_run, 3, free_port(), tmp_path / "many", 0)
    one, many = (torch.load(tmp_path / name / "last.pt") for name in ("one", "many"))
    deviations = [
        [state["counters"].pop(name) for name in ("start_std", "last_std")] for state in (one, many)
    ]
    assert deviations[0] == pytest.approx(deviations[1], rel=1e-8)
    assert one["counters"] == many["counters"] and one["counters"]["global_step"] == 19
    assert one["learner"].keys() == many["learner"].keys() and "regularizer.queue.rows" in one["learner"]
    for part in ("learner", "optimizer"):
        torch.testing.assert_close(many[part], one[part], rtol=1e-8, atol=1e-8)


def failing(rank, world, port, flags, folder):
    """Leaves what it says on standard error, and its exit status, in the folder."""
    os.dup2(os.open(f"{folder}/err{rank}", os.O_WRONLY | os.O_CREAT), 2)
    join(rank, world, port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    Path(f"{folder}/status{rank}").write_text(str(run(flags)))
    os._exit(0)  # at once, as a process ends


@pytest.mark.parametrize("case", ["all ranks", "one rank"])
def test_an_error_is_told_once(tmp_path, case):
    """One that every rank meets, and a file that only the rank meets that has to decode it; the other stops,
    too."""
    flags, words = "--batch_size 33", "--batch_size 33"
    if case == "one rank":
        data = trees.fill(tmp_path, "train test", "a b", count=16)
        trees.spoil(data / "train" / "a" / "7.JPEG")
        flags, words = (
            f"--dataset folder --data_dir {data} --scenario data --workers 1 --batch_size 16",
            "7.JPEG",
        )
    # it outlives the ranks, as torchrun's does
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    flags = f"{TINY} --num_tasks 2 --eval none {flags} --out_dir {tmp_path / 'run'}"
    start_ranks(failing, 2, store.port, flags, tmp_path)
    (line,) = [line for rank in (0, 1) for line in (tmp_path / f"err{rank}").read_text().splitlines()]
    assert line.startswith("program: error:") and words in line
    assert "0" not in [(tmp_path / f"status{rank}").read_text() for rank in (0, 1)]


def rank_run(rank, world, port, flags, script, log=os.devnull):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    join(rank, world, port)
    assert run(flags, main_linear if script == "main_linear" else main_cssl) == 0


def test_main_linear(tmp_path):
    """Two processes write what one process writes."""
    assert run(f"{TINY} --num_tasks 2 --epochs 1 --eval none --out_dir {tmp_path / 'one'}") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    start_ranks(rank_run, 2, free_port(), f"--run {tmp_path / 'two'} --protocol knn", "main_linear")
    assert run(f"--run {tmp_path / 'one'} --protocol knn", main_linear) == 0
    one, two = ((tmp_path / name / "results.json").read_text() for name in ("one", "two"))
    (block,) = (block for name, block in json.loads(one).items() if name.endswith("labels=1.0"))
    assert one == two and len(block["matrix"]) == 2


def test_unreadable_images(tmp_path):
    """Images that only some of the ranks meet are counted once, and a rank may have none of the labels that
    the others have."""
    data = trees.fill(tmp_path / "data", "train test", "a b", count=8)
    for name in ("train/a/1.JPEG", "train/b/3.JPEG"):
        trees.spoil(data / name)
    flags = (
        f"{TINY} --dataset folder --data_dir {data} --scenario data --num_tasks 1 --skip_corrupt --workers 0"
    )
    flags += f" --batch_size 8 --out_dir {tmp_path / 'run'}"
    start_ranks(rank_run, 2, free_port(), flags, "main_cssl", tmp_path / "log")
    assert "2 images could not be read" in (tmp_path / "log").read_text()
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["matrix"]) == 1


def test_restarts_need_a_store_of_their_own(capsys, monkeypatch):
    """torch's, which processes that are started again share, still holds the addresses of the dead."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    told = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_MAX_RESTARTS": 3}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "store", None)  # and again afterwards
    fails(capsys, TINY, "--max-restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")


@pytest.mark.parametrize(
    "device, compiled, of_torch", [("cpu", 0, 0), ("cpu", 1, 0), ("cuda", 0, 1), ("cuda", 1, 0)]
)
def test_kinds_of_batch_norm(device, compiled, of_torch):
    """Torch's own would break a compiled graph, and needs CUDA; the state's names stay."""
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Sequential(torch.nn.BatchNorm2d(4)))
    names = [*plain.state_dict()]
    norm = sync_batch_norms(plain, torch.device(device), compiled)[1][0]
    assert type(norm) is (torch.nn.SyncBatchNorm if of_torch else CrossRankBatchNorm)
    assert [*plain.state_dict()] == names


@pytest.mark.parametrize(
    "words",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2000",
        "NCCL error: remote process exited or there was a network error",
        "socketProgress: Connection closed by remote peer node7<4000>",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
def test_a_lost_process_is_told(words):
    """Whichever of the libraries meets its end first."""
    assert "the same command again" in explain(RuntimeError(words))
    assert explain(RuntimeError("shapes differ")) is None
