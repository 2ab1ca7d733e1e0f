"""Backbones, the queue, frozen copies, and the layouts of checkpoints."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import arguments

import main_cssl
from losses import METHODS
from models import BACKBONES, build_backbone
from models.frozen import Teacher, ema_update
from models.heads import Queue
from utils import checkpoint
from utils.distributed import Process

CPU = Process(torch.device("cpu"))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_backbone_is_torchvisions(name):
    """Same state_dict, strictly, and the same features."""
    theirs = getattr(torchvision.models, name)()
    theirs.fc = torch.nn.Identity()
    ours = build_backbone(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.feature_dim == ours(x).shape[1]


@pytest.mark.parametrize("name", BACKBONES)
def test_cifar_stem_and_width(name):
    backbone = build_backbone(name, width=8, stem="cifar")
    assert (
        backbone.conv1.weight.shape == (8, 3, 3, 3)
        and backbone.conv1.stride == (1, 1)
        and backbone.conv1.padding == (2, 2)
    )
    assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, 8 * 8 * (4 if name == "resnet50" else 1))
    assert backbone.layer1(backbone.maxpool(backbone.conv1(torch.randn(1, 3, 32, 32)))).shape[-1] == 34


def test_queue_is_first_in_first_out():
    """Against a plain list, with a batch that does not divide the size, and in place."""
    queue, size = Queue(7, 3), 7
    assert torch.allclose(queue.rows.norm(dim=-1), torch.ones(2, 7))
    memory, place = [list(queue.rows[v].clone()) for v in (0, 1)], queue.rows.data_ptr()
    for step in range(9):
        batch = torch.randn(2, 3, 3)
        queue.enqueue(*batch)
        for v in (0, 1):
            memory[v] = memory[v][3:] + list(F.normalize(batch[v], dim=1))
            oldest_first = queue.rows[v].roll(-int(queue.pointer), dims=0)
            torch.testing.assert_close(oldest_first, torch.stack(memory[v]))
        assert int(queue.pointer) == 3 * (step + 1) % size
    assert queue.rows.data_ptr() == place


def test_ema_update():
    momentum, online = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [
        0.9 * t.detach() + 0.1 * o.detach() for t, o in zip(momentum.parameters(), online.parameters())
    ]
    ema_update(momentum, online, 0.9)
    for got, want in zip(momentum.parameters(), expected):
        torch.testing.assert_close(got.detach(), want)


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_teacher_keeps_its_statistics(bn):
    """Whatever mode is asked of the network around it; eval uses the running statistics and batch does
    not."""
    backbone, projector = build_backbone("resnet10", 4, "cifar"), torch.nn.Linear(32, 5)
    for _ in range(3):
        backbone(torch.randn(8, 3, 8, 8) * 3 + 1)
    teacher = Teacher(backbone, projector, bn)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    x = torch.randn(8, 3, 8, 8)
    outputs = []
    for mode in (True, False, True):
        torch.nn.ModuleList([teacher]).train(mode)
        outputs.append(teacher(x))
    backbone.train(bn == "batch")
    expected = projector(backbone(x))
    for out in outputs:
        torch.testing.assert_close(out, expected)
        assert not out.requires_grad
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    student = {f"backbone.{k}" for k in backbone.state_dict()} | {
        f"projector.{k}" for k in projector.state_dict()
    }
    assert before.keys() == student


def test_begin_task():
    """Task 0 has no teacher; later the teacher is the student as the task before left it, bit for bit."""
    args = arguments("--regularizer pnr --precision fp32")
    args.stem = "cifar"
    learner = main_cssl.build_learner(args, CPU)
    learner.begin_task(0, CPU.device)
    assert learner.regularizer.teacher is None and learner.regularizer.predictor is None
    for task in (1, 2):
        with torch.no_grad():
            for p in learner.method.parameters():
                p.add_(0.01 * torch.randn_like(p))
        learner.begin_task(task, CPU.device)
        for part in ("backbone", "projector"):
            student, teacher = (
                getattr(x, part).state_dict() for x in (learner.method, learner.regularizer.teacher)
            )
            assert all(torch.equal(student[k], teacher[k]) for k in student)


def build_moco():
    args = arguments()
    torch.manual_seed(0)
    return METHODS["moco"](build_backbone("resnet10", 4, "cifar"), args)


@pytest.mark.parametrize("layout", ["cassle", "solo-learn", "moco", "torchvision"])
def test_foreign_layouts(layout, tmp_path):
    """The same network under other projects' names gives the same backbone, projector, momentum encoder, and
    queue of the same form."""
    source, method = build_moco(), build_moco()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.1 * torch.randn_like(p))
    backbone, projector = source.backbone.state_dict(), source.projector.state_dict()
    momentum_backbone, momentum_projector = (
        source.momentum_encoder["backbone"].state_dict(),
        source.momentum_encoder["projector"].state_dict(),
    )

    def named(prefix, state):
        return {prefix + k: v for k, v in state.items()}

    rows = source.queue.rows.transpose(1, 2).contiguous()  # 2 x D x K there
    source.queue.pointer.fill_(7)
    if layout in ("cassle", "solo-learn"):
        part = "encoder" if layout == "cassle" else "backbone"
        state = named(f"{part}.", backbone) | named("projector.", projector)
        state |= named(f"momentum_{part}.", momentum_backbone) | named(
            "momentum_projector.", momentum_projector
        )
        state |= {"queue": rows, "queue_ptr": torch.tensor([7])}
        content = {"state_dict": state | {"classifier.weight": torch.ones(10, 32)}, "epoch": 3}
    elif layout == "moco":
        state = named("module.encoder_q.", backbone) | named("module.encoder_q.fc.", projector)
        state |= named("module.encoder_k.", momentum_backbone) | named(
            "module.encoder_k.fc.", momentum_projector
        )
        content = {"state_dict": state | {"module.queue": torch.ones(16, 64)}, "arch": "resnet10"}
    else:
        content = dict(backbone) | {"fc.weight": torch.ones(10, 32), "fc.bias": torch.ones(10)}
    torch.save(content, tmp_path / "foreign.pt")
    network = checkpoint.read_network(tmp_path / "foreign.pt")
    assert network["backbone"].keys() == backbone.keys()
    if layout == "torchvision":
        return
    note = checkpoint.load_method(method, tmp_path / "foreign.pt", "it", [[0, 1]])
    assert note.endswith(
        "started anew: queue; left out: queue"
        if layout == "moco"
        else "momentum_encoder, projector, queue; left out: classifier"
    )
    for key, value in source.state_dict().items():
        assert torch.equal(method.state_dict()[key], value) or (
            layout == "moco" and key.startswith("queue.")
        ), key


@pytest.mark.parametrize(
    "rows, pointer", [((2, 16, 32), 1), ((2, 16, 64), 2), ((16, 64), 1), ((2, 16, 64), 0), ((3,), 1)]
)
def test_foreign_queue_of_another_form(rows, pointer, tmp_path):
    """One that does not fit is left out, by name, and the queue starts anew."""
    source, method = build_moco(), build_moco()
    state = {f"encoder.{k}": v for k, v in source.backbone.state_dict().items()}
    state |= {f"projector.{k}": v for k, v in source.projector.state_dict().items()}
    state |= {
        "queue": torch.ones(rows),
        "queue_ptr": torch.zeros(pointer, dtype=torch.long),
        "queue_f": torch.ones(2),
    }
    torch.save({"state_dict": state}, tmp_path / "foreign.pt")
    note = checkpoint.load_method(method, tmp_path / "foreign.pt", "it", [[0, 1]])
    assert note.endswith("momentum_encoder (a copy of the student), queue; left out: queue, queue_f")
    assert (
        checkpoint.read_network(tmp_path / "foreign.pt")["backbone"].keys()
        == source.backbone.state_dict().keys()
    )


def test_foreign_predictor(tmp_path):
    """BYOL's own predictor is taken from a released checkpoint; a momentum network that it lacks is a copy of
    the student."""
    source, method = (
        METHODS["byol"](build_backbone("resnet10", 4, "cifar"), arguments(method="byol")) for _ in range(2)
    )
    names = {"backbone": "encoder", "projector": "projector", "predictor": "predictor"}
    state = {
        f"{new}.{k}": v for part, new in names.items() for k, v in getattr(source, part).state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "foreign.pt")
    note = checkpoint.load_method(method, tmp_path / "foreign.pt", "it", [[0, 1]])
    assert note.endswith(
        "backbone, predictor, projector; started anew: momentum_encoder (a copy of the student)"
    )
    for key, value in source.state_dict().items():
        assert torch.equal(method.state_dict()[key], value), key
