"""On a GPU, where there is one: views and steps are those of the CPU, a step never waits for the device, and
runs of each precision end and go on."""

import copy
import json

import pytest
import torch
import trees
from conftest import CPU, TINY, crash, run, settled

import main_cssl
import main_linear
from data import augment
from data.loader import generator
from losses import METHODS, REGULARIZERS
from utils.distributed import Process
from utils.optim import build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("height", [32, None])
def test_views(height):
    """Of whole images and of crops; each sample meets other operations."""
    config = augment.ViewConfig(32, grey_p=0.4, blur_p=0.5, solarize_p=0.5)
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator(1))
    for order in range(4):
        params = augment.draw(config, 256, height, height, generator(2, order))
        there, here = (
            augment.make_view(x, params, config, (0.5,) * 3, (0.25,) * 3) for x in (images.to(CUDA), images)
        )
        assert there.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-4)


def two_steps(learner, args, views, device):
    """In float64, by name: the losses, all gradients, and the state after them; all on the CPU."""
    learner, found = copy.deepcopy(learner).to(device, torch.float64), {}
    optimizer = build_optimizer(args, learner)
    for step, pair in enumerate(views):
        loss, _, student, teacher = learner(*(x.to(device) for x in pair))
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        for name, p in learner.named_parameters():
            if p.grad is not None:
                found[f"gradient {step} {name}"] = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        learner.after_step(student, teacher, 0.5)
    return {name: value.cpu() for name, value in (found | learner.state_dict()).items()}


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_steps(method, regularizer):
    args, _ = settled(f"--regularizer {regularizer}", method)
    learner = main_cssl.build_learner(args, CPU)
    learner.begin_task(1, CPU.device)
    views = torch.randn(2, 2, 32, 3, 8, 8, dtype=torch.float64, generator=generator(3))
    here, there = (two_steps(learner, args, views, device) for device in (CPU.device, CUDA))
    assert here.keys() == there.keys()
    largest = max(float(x.abs().max()) for name, x in here.items() if name.startswith("gradient"))
    for name, value in here.items():  # a bias before a batch norm has a gradient of rounding errors alone
        scale = largest if name.startswith("gradient") else float(value.double().abs().max())
        near = 1e-12 if name.startswith("loss") else 1e-10
        torch.testing.assert_close(there[name], value, rtol=near, atol=near * scale, msg=f"{name} differs")


@pytest.mark.parametrize("method, streamed", [*((method, False) for method in METHODS), ("moco", True)])
def test_no_step_waits_for_the_device(method, streamed, tmp_path):
    """Views, of images in memory or in files, forward, backward and update of a later task; what is logged
    now and then may wait."""
    flags = "--regularizer pnr --device cuda"
    if streamed:
        data = trees.fill(tmp_path / "data", "train test", "a b", count=96)
        flags += f" --dataset folder --data_dir {data} --scenario data --num_tasks 2 --workers 1"
    args, (train, probe, _, tasks) = settled(flags, method, Process(CUDA))
    learner = main_cssl.build_learner(args, Process(CUDA))
    loader, _ = main_cssl.build_loaders(args, Process(CUDA), train, probe, tasks, 1)
    learner.begin_task(1, CUDA, loader)
    optimizer = build_optimizer(args, learner)
    try:
        for step, (views, _) in enumerate(loader.epoch(0)):
            loss, _, student, teacher = learner(*views)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            learner.after_step(student, teacher, 0.5)
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first may choose kernels
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step > 1  # at least one step was watched


@pytest.mark.parametrize("precision", main_cssl.DTYPES)
def test_run_goes_on(precision, tmp_path, monkeypatch):
    """Ends in the middle of a task, and the same command finishes it."""
    flags = f"{TINY} --device cuda --precision {precision} --online_probe clean --eval linear --num_tasks 2"
    flags += f" --out_dir {tmp_path}"
    crash(monkeypatch, flags, lambda run: run.task and run.epoch)
    assert run(flags) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["matrix"]) == 2


def test_evaluation(tmp_path):
    """Every protocol of main_linear.py, on features of a GPU, gives what it gives on those of a CPU, but for
    images that rounding moves across a boundary."""
    flags = f"{TINY} --num_tasks 2 --eval none --out_dir {tmp_path / 'run'}"
    assert run(flags) == 0
    found = {}
    for device in ("cpu", "cuda"):
        for protocol in ("knn --task_masked", "linear --task_masked", "linear", "clustering"):
            shown = f"--run {tmp_path / 'run'} --protocol {protocol} --precision fp32 --device {device}"
            assert run(f"{shown} --out {tmp_path / device}.json", main_linear) == 0
        found[device] = json.loads((tmp_path / f"{device}.json").read_text())
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, block in found["cpu"].items():
        for part in {"matrix", "nmi", "accuracy"} & block.keys():
            there, here = (torch.tensor(values[part]) for values in (found["cuda"][name], block))
            torch.testing.assert_close(there, here, rtol=0, atol=3.0)
