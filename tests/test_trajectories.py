"""Whole training runs, by main_cssl.py itself, against those of the released code (golden/TRAJECTORIES.md):
losses, their terms, learning rates, EMA tau and all states at every task's end, in float64."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from torch import nn

import main_cssl

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = {path: np.load(path) for path in sorted(FOLDER.glob("trajectories_*.npz"))}
RUNS = [(path, key.removesuffix("/hyper")) for path in FILES for key in FILES[path] if key.endswith("/hyper")]
assert RUNS, f"no trajectories_*.npz in {FOLDER}"
TOLERANCE = 1e-9  # relative; for a state, to the largest entry of its tensor
# shapes by their names and by our flags, which say no more, so that the defaults are compared, too
SHAPES = {name: name for name in "method regularizer epochs batch_size warmup_epochs teacher_bn".split()}
SHAPES |= {"proj_hidden_dim": "{method}_hidden", "output_dim": "{method}_dim", "tasks": "num_tasks"}
SHAPES |= {"pred_hidden_dim": "byol_predictor_hidden", "distill_proj_hidden_dim": "predictor_hidden"}
SHAPES["queue_size"] = "moco_queue_size"
# parts of the state by their names and by ours
PARTS = {"g": "regularizer.predictor", "queue_f": "regularizer.queue", "twin": "method.momentum_encoder"}


def load(path, name):
    """A run's arrays by key, and its hyperparameters. What equals an earlier array is stored as its key; what
    the first task draws is where it starts."""
    start, arrays = f"{name}/", FILES[path]
    found = {key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)}
    for key, value in found.items():
        while value.dtype.kind == "U" and value.item().startswith("="):
            value = found[key] = arrays[value.item()[1:]]
    found |= {"views": arrays["views"], "fresh0": found["start0"], "layout-1": np.array("[]")}
    return found, json.loads(found["hyper"].item())


def state(released, key, task, known=()):
    """The vector at `key`, cut into the tensors of the task's layout that are not known, by our names."""
    layout = {k: shape for k, shape in json.loads(released[f"layout{task}"].item()) if k not in known}
    parts = torch.from_numpy(released[key]).split([int(np.prod(shape)) for shape in layout.values()])
    names = (name.partition(".")[::2] for name in layout)
    names = [f"{PARTS.get(part, f'method.{part}')}.{rest}" for part, rest in names]
    return {name: x.view(shape) for name, x, shape in zip(names, parts, layout.values())}


def terms(released, hyper, task):
    """What this project logs in the task, from what the released code logs."""

    def logged(*endings):
        (values,) = [x for key, x in released.items() if key.startswith("logged/") and key.endswith(endings)]
        return values[task]

    found, kind = {"loss": released["loss"][task], "lr": released["lr"][task]}, hyper["regularizer"]
    if kind == "finetune" or task == 0:
        return found | {"ssl": found["loss"]}
    if kind == "pnr" and hyper["method"] in ("moco", "simclr"):
        return found | {"ssl + align": logged("_pnr_loss")}
    found["ssl"] = logged("nce_loss", "neg_cos_sim", "vicreg_loss", "barlow_loss")
    found["distill"] = hyper["distill_lamb"] * logged("_distill_loss", "_positive_loss")
    if kind == "pnr":
        found["pseudo_negatives"] = -hyper["negative_lamb"] * logged("_negative_loss")
    return found


class Backbone(nn.Sequential):
    feature_dim = 16

    def __init__(self, *_):
        first = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)
        second = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        super().__init__(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def replay(released, hyper, folder, monkeypatch, as_released=True):
    """Runs main_cssl.py on its views from its first state; (lines of metrics.jsonl, state after each task).
    as_released: what the trainer did beside the code is done, too: under lightning 1.5.4 a task's first step
    does not move the momentum encoder and step m uses the tau of m - 1; on CIFAR the end of an epoch's
    validation flips the teacher from eval mode to batch statistics."""
    views, states = torch.from_numpy(released["views"]).double() / 16, []
    images = SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3, skipped={})

    def build_loaders(args, process, train, probe, tasks, task):
        loader = SimpleNamespace(steps=hyper["steps"], images=images)
        loader.epoch = lambda epoch, start: ((list(pair), None) for pair in views[task, epoch, start:])
        return loader, lambda epoch, start: [None] * hyper["steps"]

    class Learner(main_cssl.Learner):
        """Takes from the released run what a task draws at random; notes how each task ends."""

        def begin_task(self, task, device, loader):
            if task > 0:
                states.append({name: value.clone() for name, value in self.state_dict().items()})
            super().begin_task(task, device, loader)
            self.double()
            if f"fresh{task}" in released:
                known = dict(json.loads(released[f"layout{task - 1}"].item()))
                _, unknown = self.load_state_dict(state(released, f"fresh{task}", task, known), strict=False)
                assert not unknown

        def after_step(self, student, teacher, progress):
            count, ema = hyper["epochs"] * hyper["steps"], self.method.ema
            step = round(progress * count)
            if as_released and hyper["ema_count"] == "pl1.5.4":
                self.method.ema, progress = ema if step else None, (step - 1) / count
            super().after_step(student, teacher, progress)
            self.method.ema = ema
            if as_released and teacher is not None and step + 1 == hyper["flip_after_epoch"] * hyper["steps"]:
                self.regularizer.teacher.bn = "batch"
                self.train()

    monkeypatch.setattr(main_cssl, "Learner", Learner)
    monkeypatch.setattr(main_cssl, "build_backbone", Backbone)
    monkeypatch.setattr(main_cssl, "build_loaders", build_loaders)
    shapes = {flag.format(**hyper): hyper.get(name, "none") for name, flag in SHAPES.items()}
    flags = " ".join(f"--{flag} {value}" for flag, value in shapes.items() if value != "none")
    flags += f" --lr_schedule epoch --scenario data --device cpu --eval none --log_every 1 --out_dir {folder}"
    assert run(flags) == 0
    states.append(torch.load(folder / "last.pt")["learner"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"], states


def compare(what, got, want):
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    near = {"rtol": TOLERANCE, "atol": TOLERANCE * float(want.abs().max())}
    torch.testing.assert_close(got, want, **near, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("path, name", RUNS, ids=[f"{path.stem}:{name}" for path, name in RUNS])
def test_trajectory(path, name, tmp_path, monkeypatch):
    (released, hyper), count = load(path, name), 0
    rows, states = replay(released, hyper, tmp_path, monkeypatch)
    for task, found in enumerate(states):
        wanted, part = terms(released, hyper, task), rows[count : count + hyper["epochs"] * hyper["steps"]]
        count += len(part)
        for term, want in wanted.items():
            compare(f"{term} of task {task}", [sum(row[t] for t in term.split(" + ")) for row in part], want)
        if "tau" in released:
            want = released["tau"][task]
            moved = ~np.isnan(want)
            compare(f"tau of task {task}", [row["ema_tau"] for row, m in zip(part, moved) if m], want[moved])
        wanted = state(released, f"end{task}", task)
        assert wanted.keys() == {key for key in found if ".teacher." not in key}
        for key, value in wanted.items():
            compare(f"{key} after task {task}", found[key], value)
    assert len(states) == hyper["tasks"] and len(rows) == count


def test_ema_count(tmp_path, monkeypatch):
    """What this project does without help: the first step moves the momentum encoder, as under later
    trainers; so runs under lightning 1.5.4 part from it at the second step."""
    for number, (released, hyper) in enumerate(load(*key) for key in RUNS):
        if hyper["method"] in ("moco", "byol") and hyper["regularizer"] == "finetune":
            with monkeypatch.context() as patch:
                rows, _ = replay(released, hyper, tmp_path / str(number), patch, as_released=False)
            near = abs(np.array([row["loss"] for row in rows[:2]]) / released["loss"][0, :2] - 1) < TOLERANCE
            assert near.tolist() == [True, hyper["ema_count"] != "pl1.5.4"]
