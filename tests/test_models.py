"""Backbones, the queue, frozen copies, and the layouts of checkpoints."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import CPU, TINY, arguments, fails, run, same, settled

import main_cssl
from losses import find
from models import BACKBONES
from models.frozen import Teacher, ema_update
from models.heads import Queue
from models.learner import Learner
from models.resnet import build_backbone
from utils import UserError, checkpoint, export


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_backbone_is_torchvisions(name):
    """Same state_dict, strictly, and the same features."""
    theirs, ours, x = getattr(torchvision.models, name)(), build_backbone(name), torch.randn(2, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.feature_dim == ours(x).shape[1]


@pytest.mark.parametrize("name", BACKBONES)
def test_cifar_stem_and_width(name):
    backbone = build_backbone(name, width=8, stem="cifar")
    conv = backbone.conv1
    assert (conv.weight.shape, conv.stride, conv.padding) == ((8, 3, 3, 3), (1, 1), (2, 2))
    assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, 8 * 8 * (4 if name == "resnet50" else 1))
    assert backbone.layer1(backbone.maxpool(conv(torch.randn(1, 3, 32, 32)))).shape[-1] == 34


def test_queue_is_first_in_first_out():
    """Against plain lists, with a batch that does not divide the size, and in place."""
    queue = Queue(7, 3)
    assert torch.allclose(queue.rows.norm(dim=-1), torch.ones(2, 7))
    memory, place = [list(rows.clone()) for rows in queue.rows], queue.rows.data_ptr()
    for step in range(1, 10):
        batch = torch.randn(2, 3, 3)
        queue.enqueue(*batch)
        memory = [rows[3:] + list(F.normalize(view, dim=1)) for rows, view in zip(memory, batch)]
        oldest_first = queue.rows.roll(-int(queue.pointer), dims=1)
        torch.testing.assert_close([list(rows) for rows in oldest_first], memory)
        assert int(queue.pointer) == 3 * step % 7
    assert queue.rows.data_ptr() == place


def test_ema_update():
    momentum, online = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * m.detach() + 0.1 * o for m, o in zip(momentum.parameters(), online.parameters())]
    ema_update(momentum, online, 0.9)
    torch.testing.assert_close(list(momentum.parameters()), expected)


@pytest.mark.parametrize("bn", ["eval", "batch"])
def test_teacher_keeps_its_statistics(bn):
    """Whatever mode is asked of the network around it; eval uses the running statistics, batch does not."""
    student = torch.nn.ModuleDict({"backbone": build_backbone("resnet10", 8, "cifar")})
    student["projector"] = torch.nn.Linear(64, 5)
    for _ in range(3):
        student["backbone"](torch.randn(8, 3, 8, 8) * 3 + 1)
    teacher, x = Teacher(**student, bn=bn), torch.randn(8, 3, 8, 8)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    expected = student["projector"](student["backbone"].train(bn == "batch")(x))
    for mode in (True, False, True):
        torch.nn.ModuleList([teacher]).train(mode)
        torch.testing.assert_close(teacher(x), expected)
        assert not teacher(x).requires_grad and same(before, dict(teacher.state_dict()))


@torch.no_grad()
def scramble(module):
    for p in module.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return module


def test_begin_task():
    """Task 0 has no teacher; later the teacher is the student as the task before left it, bit for bit."""
    learner = main_cssl.build_learner(settled("--regularizer pnr")[0], CPU)
    learner.begin_task(0, CPU.device)
    assert learner.regularizer.teacher is None and learner.regularizer.predictor is None
    for task in (1, 2):
        student = scramble(learner.method).state_dict()
        learner.begin_task(task, CPU.device)
        teacher = dict(learner.regularizer.teacher.state_dict())
        assert same(teacher, {k: v for k, v in student.items() if k.startswith(("backbone.", "projector."))})


def test_torchvision_layout(tmp_path):
    backbone = build_backbone("resnet10", 8, "cifar").state_dict()
    torch.save({**backbone, "fc.weight": torch.ones(10, 64), "fc.bias": torch.ones(10)}, tmp_path / "bare.pt")
    assert same(checkpoint.read_network(tmp_path / "bare.pt")["backbone"], backbone)


PARTS = "backbone. projector. predictor. momentum_encoder.backbone. momentum_encoder.projector.".split()
CASSLE = "encoder. projector. predictor. momentum_encoder. momentum_projector."
SOLO = "backbone. projector. predictor. momentum_backbone. momentum_projector."
MOCO = "module.encoder_q. module.encoder_q.fc. - module.encoder_k. module.encoder_k.fc."
TAKEN = {"queue": torch.randn(2, 16, 64), "queue_ptr": torch.tensor([7]), "classifier.bias": torch.ones(5)}
COPIED = "backbone, predictor, projector; started anew: momentum_encoder (a copy of the student)"
FOREIGN = {  # method, what the other project calls its parts, what it saves besides, what is said of it
    "cassle": ("moco", CASSLE, TAKEN, "momentum_encoder, projector, queue; left out: classifier"),
    "solo-learn": ("moco", SOLO, TAKEN, "momentum_encoder, projector, queue; left out: classifier"),
    "moco": ("moco", MOCO, {"module.queue": torch.ones(16, 64)}, "started anew: queue; left out: queue"),
    "predictor": ("byol", "encoder. projector. predictor.", {}, COPIED),
}
for rows, pointers in [((2, 16, 32), 1), ((2, 16, 64), 2), ((16, 64), 1), ((2, 16, 64), 0), ((3,), 1)]:
    more = {"queue": torch.ones(rows), "queue_ptr": torch.zeros(pointers).long(), "queue_f": torch.ones(2)}
    note = "(a copy of the student), queue; left out: queue, queue_f"
    FOREIGN[f"queue of {rows} and {pointers}"] = "moco", "encoder. projector.", more, note


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_checkpoint(case, tmp_path):
    """Gives the same network; a queue that does not fit starts anew, a momentum encoder is copied."""
    name, theirs, more, note = FOREIGN[case]
    args, cifar = arguments(method=name), ("resnet10", 8, "cifar")
    source, method = (scramble(find(name)(build_backbone(*cifar), args)) for _ in range(2))
    names, state = dict(zip(PARTS, theirs.split())), source.state_dict()
    queue = {k: v.clone() for k, v in method.state_dict().items() if k.startswith("queue.")}
    if more is TAKEN:
        queue = {"queue.rows": more["queue"].transpose(1, 2), "queue.pointer": torch.tensor(7)}
    saved = {names[p] + k.removeprefix(p): v for p in names for k, v in state.items() if k.startswith(p)}
    torch.save({"state_dict": saved | more, "epoch": 3}, tmp_path / "foreign.pt")
    vars(args).update(backbone=cifar[0], width=cifar[1], stem=cifar[2])
    learner = Learner(method, find("finetune")(args))
    said, done = checkpoint.load_method(learner, tmp_path / "foreign.pt", args, [["0", "1"]])
    assert said.endswith(note) and done
    for key, value in method.state_dict().items():
        origin = key if len(names) == len(PARTS) else key.removeprefix("momentum_encoder.")
        assert torch.equal(value, queue[key] if key in queue else state[origin]), key


def test_layouts_of_others(tmp_path):
    """Children of a Sequential as lightly saves them, a whole training state as Barlow Twins' and VICReg's;
    what the architecture is; and what is said of files of no known layout."""
    network = build_backbone("resnet34", 4, "imagenet").state_dict()
    number = {name: place for place, name in checkpoint.CHILDREN.items()}
    lightly = {"projection_head.layers.0.weight": torch.ones(2)}
    for key, value in network.items():
        first, _, rest = key.partition(".")
        lightly[f"backbone.{number[first]}.{rest}"] = value
    barlow = {f"module.backbone.{key}": value for key, value in network.items()}
    barlow = {
        "epoch": 3,
        "model": {**barlow, "module.projector.0.weight": torch.ones(3), "module.bn.bias": torch.ones(1)},
    }
    for content, left_out, heads in (
        (lightly, {"projection_head"}, set()),
        (barlow, {"bn"}, {"projector.0.weight"}),
    ):
        torch.save(content, tmp_path / "theirs.pt")
        found = checkpoint.read_network(tmp_path / "theirs.pt")
        assert (
            same(found["backbone"], network)
            and found["left_out"] == left_out
            and set(found["heads"]) == heads
        )
        flags = {"backbone": "resnet34", "width": 4, "stem": "imagenet"}
        assert checkpoint.architecture(found["backbone"], "it") == flags
    torch.save({"blocks.0.weight": torch.ones(2)}, tmp_path / "vit.pt")
    with pytest.raises(UserError, match=r"lightly.*blocks\.0\.weight"):
        checkpoint.read_network(tmp_path / "vit.pt")
    with pytest.raises(UserError, match="no backbone of resnet10"):
        checkpoint.architecture({"conv1.weight": torch.ones(4, 3, 7, 7), "layer1.0.conv1.weight": 0}, "it")


def test_weights_without_projector(tmp_path, capsys):
    """Of torchvision, say: the first task is trained from them, the heads start anew; resumed, too."""
    weights = build_backbone("resnet10", 8, "cifar").state_dict()
    torch.save(weights, tmp_path / "imagenet.pt")
    call = f"{TINY} --num_tasks 2 --epochs 1 --eval none --regularizer finetune --online_probe clean"
    call += f" --init_from {tmp_path / 'imagenet.pt'} --out_dir {tmp_path / 'run'}"
    fails(capsys, f"{call} --width 16", "--width 8")
    assert run(f"{call} --lr 1e-9 --weight_decay 0") == 0
    assert "started anew: classifier, momentum_encoder" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["task"] for line in lines} == {0, 1}  # both are trained
    trained = torch.load(tmp_path / "run" / "task0.pt")["backbone"]
    torch.testing.assert_close(
        trained["layer4.0.conv1.weight"], weights["layer4.0.conv1.weight"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_export(tmp_path, stem):
    """What is written loads strictly into stock torchvision and timm by the card's lines, and gives the same
    features."""
    backbone, x = build_backbone("resnet18", 64, stem).eval(), torch.randn(2, 3, 32, 32)
    config = dict(
        backbone="resnet18", width=64, stem=stem, method="moco", regularizer="pnr", num_tasks=2, seed=5
    )
    config |= dict(dataset="digits", scenario="class", epochs=1, batch_size=32, lr=0.1, optimizer="lars")
    config |= dict(normalize=[[0.5] * 3, [0.2] * 3], image_size=32)
    network = {
        "backbone": backbone.state_dict(),
        "heads": {},
        "config": config,
        "task": 1,
        "tasks": [[0], [1]],
    }
    torch.save(network, tmp_path / "task1.pt")
    (tmp_path / "config.json").write_text(json.dumps({"arguments": config}))
    block = {"matrix": [[50.0, 0.0], [40.0, 60.0]], "protocol": "words"}
    (tmp_path / "results.json").write_text(json.dumps({**block, "knn": block}))
    for suffix in (".pt", ".safetensors") if find_spec("safetensors") else (".pt",):
        path = tmp_path / f"network{suffix}"
        assert export.main(export.parse_arguments([str(tmp_path), "--out", str(path)])) is None
        card = json.loads(Path(f"{path}.json").read_text())
        assert [*card["accuracy"].values()] == [{"protocol": "words", "row": [40.0, 60.0]}] * 2
        assert card["tasks"] == [
            [0],
            [1],
        ]
        for library, lines in card["load"].items():
            if find_spec(library):
                found = {}
                exec("\n".join(lines).replace("network.", f"{tmp_path}/network."), found)
                torch.testing.assert_close(found["model"].eval()(x), backbone(x), rtol=0, atol=1e-6)
    for name, words in (("network.onnx", "onnx"), ("network.pt", "is there already")):
        with pytest.raises(UserError, match=words):
            export.main(export.parse_arguments([str(tmp_path), "--task", "1", "--out", str(tmp_path / name)]))
    assert export.parse_arguments(["x", "--task", "0", "--out", "y"]).task == 0
