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

import main_cssl

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
RUNS = [(path, key.removesuffix("/hyper")) for path in sorted(FOLDER.glob("trajectories_*.npz"))
        for key in np.load(path).files if key.endswith("/hyper")]  # fmt: skip
TOLERANCE = 1e-9  # relative; for a state, to the largest entry of its tensor
# only shapes are passed as flags, so that the defaults are compared, too
SHAPES = {
    "proj_hidden_dim": "--{method}_hidden {}",
    "output_dim": "--{method}_dim {}",
    "pred_hidden_dim": "--byol_predictor_hidden {}",
    "queue_size": "--moco_queue_size {}",
    "distill_proj_hidden_dim": "--predictor_hidden {}",
    "tasks": "--num_tasks {}",
    "epochs": "--epochs {}",
    "batch_size": "--batch_size {}",
    "warmup_epochs": "--warmup_epochs {}",
    "teacher_bn": "--teacher_bn {}",
}
# their names and ours; all others: method.
PLACES = {
    "g.": "regularizer.predictor.",
    "queue_f.": "regularizer.queue.",
    "twin.": "method.momentum_encoder.",
}


class Trajectory:
    """One run of a file; an array that equals an earlier one is stored as its key."""

    def __init__(self, path, name):
        self.arrays, self.name, self.hyper = (
            np.load(path),
            name,
            json.loads(np.load(path)[f"{name}/hyper"].item()),
        )

    def __getitem__(self, key):
        value = self.arrays[f"{self.name}/{key}"]
        while value.dtype.kind == "U" and value.item().startswith("="):
            value = self.arrays[value.item()[1:]]
        return value

    def __contains__(self, key):
        return f"{self.name}/{key}" in self.arrays

    def logged(self, *endings):
        """The one logged array whose name has one of these endings."""
        start = f"{self.name}/logged/"
        (key,) = [key for key in self.arrays.files if key.startswith(start) and key.endswith(endings)]
        return self[key.removeprefix(f"{self.name}/")]

    def state(self, key, task, only=lambda name: True):
        """The vector at `key`, cut into the tensors of the task's layout, under this project's names."""
        layout = [(name, shape) for name, shape in json.loads(self[f"layout{task}"].item()) if only(name)]
        parts = torch.from_numpy(self[key]).split([int(np.prod(shape)) for _, shape in layout])
        return {ours(name): part.view(shape) for (name, shape), part in zip(layout, parts)}

    def fresh(self, task):
        """What the task drew: g and the teacher's queue, in the second one only."""
        before = {name for name, _ in json.loads(self[f"layout{task - 1}"].item())} if task else set()
        return (
            self.state(f"fresh{task}", task, lambda name: name not in before)
            if f"fresh{task}" in self
            else {}
        )


def ours(name):
    return next(
        (own + name.removeprefix(theirs) for theirs, own in PLACES.items() if name.startswith(theirs)),
        f"method.{name}",
    )


class Backbone(torch.nn.Sequential):
    feature_dim = 16

    def __init__(self, *_):
        super().__init__(
            *(
                torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
                torch.nn.BatchNorm2d(8),
                torch.nn.ReLU(),
                torch.nn.AvgPool2d(2),
            ),
            *(torch.nn.Conv2d(8, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU()),
            *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
        )


def replay(trajectory, folder, monkeypatch, as_released=True):
    """Runs main_cssl.py on the trajectory's views from its first state; (lines of metrics.jsonl, state after
    each task). as_released: what its trainer did beside the code is done, too: under lightning 1.5.4 a task's
    first step does not move the momentum encoder and step m uses the tau of m - 1; on CIFAR the end of an
    epoch's validation flips the teacher from eval mode to batch statistics."""
    hyper, views, states = trajectory.hyper, trajectory.arrays["views"], []

    def loader(task):
        def epoch(number, first_step=0):
            return (
                (torch.from_numpy(view1 / 16), torch.from_numpy(view2 / 16))
                for view1, view2 in views[task, number]
            )

        fixed = {"indices": torch.arange(1), "skipped": (), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        return SimpleNamespace(steps=hyper["steps"], epoch=epoch, **fixed)

    class Learner(main_cssl.Learner):
        """Starts from the released state, and takes from it what a task draws at random; notes how each task
        ends."""

        def begin_task(self, task, device, loader):
            if task > 0:
                states.append({name: value.clone() for name, value in self.state_dict().items()})
            super().begin_task(task, device, loader)
            self.double()
            released = trajectory.fresh(task) | (trajectory.state("start0", 0) if task == 0 else {})
            _, unknown = self.load_state_dict(released, strict=False)
            assert not unknown

        def after_step(self, student, teacher, progress):
            step, ema = round(progress * hyper["epochs"] * hyper["steps"]), self.method.ema
            if as_released and hyper["ema_count"] == "pl1.5.4" and step == 0:
                self.method.ema = None
            elif as_released and hyper["ema_count"] == "pl1.5.4":
                progress = (step - 1) / (hyper["epochs"] * hyper["steps"])
            super().after_step(student, teacher, progress)
            self.method.ema = ema
            if as_released and teacher is not None and step + 1 == hyper["flip_after_epoch"] * hyper["steps"]:
                self.regularizer.teacher.bn = "batch"
                self.train()

    monkeypatch.setattr(main_cssl, "Learner", Learner)
    monkeypatch.setattr(main_cssl, "build_backbone", Backbone)
    monkeypatch.setattr(
        main_cssl, "build_loaders", lambda *_: [loader(task) for task in range(hyper["tasks"])]
    )
    shapes = [
        flag.format(hyper[name], **hyper)
        for name, flag in SHAPES.items()
        if hyper.get(name, "none") != "none"
    ]
    flags = f"--method {hyper['method']} --regularizer {hyper['regularizer']} {' '.join(shapes)}"
    assert (
        run(
            f"{flags} --lr_schedule epoch --scenario data --device cpu --eval none --log_every 1 --out_dir "
            f"{folder}"
        )
        == 0
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    states.append(torch.load(folder / "last.pt")["learner"])
    return [row for row in rows if row["kind"] == "train"], states


def compare(what, got, want):
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    torch.testing.assert_close(
        got, want, rtol=TOLERANCE, atol=TOLERANCE * float(want.abs().max()), msg=lambda m: f"{what}: {m}"
    )


def terms(trajectory, task):
    """The terms that this project logs, from those that the released code logs, for a task."""
    hyper = trajectory.hyper
    if hyper["regularizer"] == "finetune" or task == 0:
        return {"ssl": trajectory["loss"][task]}
    if hyper["regularizer"] == "pnr" and hyper["method"] in ("moco", "simclr"):
        return {"ssl + align": trajectory.logged("_pnr_loss")[task]}
    ssl = trajectory.logged("nce_loss", "neg_cos_sim", "vicreg_loss", "barlow_loss")[task]
    distill = hyper["distill_lamb"] * trajectory.logged("_distill_loss", "_positive_loss")[task]
    if hyper["regularizer"] == "cassle":
        return {"ssl": ssl, "distill": distill}
    pseudo_negatives = -hyper["negative_lamb"] * trajectory.logged("_negative_loss")[task]
    return {"ssl": ssl, "distill": distill, "pseudo_negatives": pseudo_negatives}


@pytest.mark.parametrize("path, name", RUNS, ids=[f"{path.stem}:{name}" for path, name in RUNS])
def test_trajectory(path, name, tmp_path, monkeypatch):
    trajectory = Trajectory(path, name)
    hyper = trajectory.hyper
    rows, states = replay(trajectory, tmp_path, monkeypatch)
    count = hyper["epochs"] * hyper["steps"]
    assert len(rows) == hyper["tasks"] * count and len(states) == hyper["tasks"]
    for task in range(hyper["tasks"]):
        part = rows[task * count : (task + 1) * count]
        compare(f"loss of task {task}", [row["loss"] for row in part], trajectory["loss"][task])
        compare(f"learning rate of task {task}", [row["lr"] for row in part], trajectory["lr"][task])
        if "tau" in trajectory:
            moved = ~np.isnan(trajectory["tau"][task])
            taus = [row["ema_tau"] for row, m in zip(part, moved) if m]
            compare(f"tau of task {task}", taus, trajectory["tau"][task][moved])
        for term, values in terms(trajectory, task).items():
            compare(
                f"{term} of task {task}", [sum(row[t] for t in term.split(" + ")) for row in part], values
            )
        state = {key: value for key, value in states[task].items() if ".teacher." not in key}
        released = trajectory.state(f"end{task}", task)
        assert state.keys() == released.keys()
        for key, value in released.items():
            compare(f"{key} after task {task}", state[key], value)


def test_ema_count(tmp_path, monkeypatch):
    """What this project does without help: the first step moves the momentum encoder, as under later
    trainers; so runs under lightning 1.5.4 part from it at the second step."""
    for number, (path, name) in enumerate(RUNS):
        trajectory = Trajectory(path, name)
        if trajectory.hyper["method"] in ("moco", "byol") and trajectory.hyper["regularizer"] == "finetune":
            with monkeypatch.context() as patch:
                rows, _ = replay(trajectory, tmp_path / str(number), patch, as_released=False)
            got, want = np.array([row["loss"] for row in rows[:2]]), trajectory["loss"][0, :2]
            apart = abs(got / want - 1)
            assert apart[0] < TOLERANCE and (apart[1] < TOLERANCE) == (
                trajectory.hyper["ema_count"] != "pl1.5.4"
            )


def test_runs_are_there():
    assert RUNS, f"no trajectories_*.npz in {FOLDER}"
