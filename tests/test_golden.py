"""The losses, LARS and the schedules against numbers that the released code gave (see golden/README.md)."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments

import main_cssl
from losses import METHODS, REGULARIZERS
from losses.falcon import falcon_loss
from models import build_backbone
from models.frozen import ema_tau
from models.learner import Outputs
from utils.optim import LARS, warmup_cosine

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("losses_*.npz"))
CHECKED = {}  # file -> keys that a test compared or read
RTOL = 1e-9


class Golden:
    """One file: tensors by key, with a note of which keys were used."""

    def __init__(self, path):
        self.arrays = np.load(path)
        self.used = CHECKED.setdefault(path.name, set())

    def __getitem__(self, key):
        self.used.add(key)
        return torch.tensor(self.arrays[key])

    def leaves(self, *names):
        return [[self[f"in_{name}{v}"].requires_grad_() for v in (1, 2)] for name in names]

    def check(self, name, value, **leaves):
        """value, and the gradient for each leaf that the file has one of, e.g. z=[z1, z2] for name_grad_z1,
        name_grad_z2."""
        torch.testing.assert_close(value.detach(), self[name], rtol=RTOL, atol=0)
        wanted = [(f"{name}_grad_{k}{v + 1}", x) for k, pair in leaves.items() for v, x in enumerate(pair)]
        wanted = [(key, x) for key, x in wanted if key in self.arrays]
        assert wanted or not leaves, f"{name} has no gradient to compare"
        grads = torch.autograd.grad(value, [x for _, x in wanted]) if wanted else []
        for (key, _), grad in zip(wanted, grads):
            torch.testing.assert_close(grad, self[key], rtol=RTOL, atol=1e-9 * float(self[key].abs().max()))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request):
    return Golden(request.param)


def method_and_outputs(golden, name):
    """The method with the file's temperatures; Outputs of the student, of the teacher and of the predictor
    g."""
    tau = (
        f"--{name}_tau {golden['T']} --{name}_tau_distill {golden['Td']}"
        if name in ("moco", "simclr")
        else ""
    )
    method = METHODS[name](build_backbone("resnet10", 4, "cifar"), arguments(tau, name))
    z, k, f, g, b = golden.leaves("z", "k", "zo", "g", "b")
    out, old, pred = Outputs(z=z, k=k, q=b), Outputs(z=f), Outputs(z=g)
    if name == "moco":
        out.queue, old.queue = golden["in_queue"], golden["in_queue_old"]
    return method, out, old, pred


def terms(regularizer, method, out, old, pred):
    """The named terms that the regulariser's own code makes of them."""
    return REGULARIZERS[regularizer](arguments(f"--regularizer {regularizer}")).losses(method, out, pred, old)


@pytest.mark.parametrize("name", ["moco", "simclr", "byol", "vicreg", "barlow"])
def test_ssl(golden, name):
    method, out, old, pred = method_and_outputs(golden, name)
    golden.check(
        name,
        terms("finetune", method, out, old, pred)["ssl"],
        **({"b": out.q} if name == "byol" else {"z": out.z}),
    )


@pytest.mark.parametrize("name", ["moco", "simclr", "byol", "vicreg", "barlow"])
def test_cassle(golden, name):
    """The distillation term alone; the SSL term beside it is that of fine-tuning."""
    method, out, old, pred = method_and_outputs(golden, name)
    parts = terms("cassle", method, out, old, pred)
    key = "contrastive_cassle" if name in ("moco", "simclr") else f"{name}_cassle"
    golden.check(key, parts["distill"], g=pred.z) if f"{key}_grad_g1" in golden.arrays else golden.check(
        key, parts["distill"]
    )
    torch.testing.assert_close(parts["ssl"], method.ssl(out), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["moco", "simclr"])
def test_pnr_contrastive(golden, name):
    """Both terms together, which replace the SSL loss."""
    method, out, old, pred = method_and_outputs(golden, name)
    golden.check(f"{name}_pnr", sum(terms("pnr", method, out, old, pred).values()), z=out.z, g=pred.z)


@pytest.mark.parametrize("name", ["byol", "vicreg", "barlow"])
def test_pnr_non_contrastive(golden, name):
    """The regularisation: distillation minus lambda_neg x pseudo-negatives, with the paper's lambda_neg as
    default."""
    method, out, old, pred = method_and_outputs(golden, name)
    parts = terms("pnr", method, out, old, pred)
    golden.check(f"{name}_pnr", parts["distill"] + parts["pseudo_negatives"], g=pred.z)


def test_falcon(golden):
    """The file takes z as logits; the key's number is beta."""
    for key in [key for key in golden.arrays if key.startswith("falcon_beta")]:
        logits = golden.leaves("z")[0]
        loss = falcon_loss(*logits, beta=float(key.removeprefix("falcon_beta")))
        golden.check(key, loss)
        for v, gradient in enumerate(torch.autograd.grad(loss, logits)):
            if (name := f"falcon_grad_z{v + 1}") in golden.arrays:
                torch.testing.assert_close(
                    gradient, golden[name], rtol=RTOL, atol=1e-9 * float(gradient.abs().max())
                )


@pytest.mark.parametrize("exclude", [False, True])
def test_lars(golden, exclude):
    w, b = torch.nn.Parameter(golden["lars_w0"]), torch.nn.Parameter(golden["lars_b0"])
    optimizer = LARS([w, b], lr=0.6, momentum=0.9, weight_decay=1e-4, exclude_bias_n_norm=exclude)
    for gw, gb in zip(golden["lars_gw"], golden["lars_gb"]):
        w.grad, b.grad = gw.clone(), gb.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), golden[f"lars_w3_excl{exclude:d}"], rtol=RTOL, atol=0)
    torch.testing.assert_close(b.detach(), golden[f"lars_b3_excl{exclude:d}"], rtol=RTOL, atol=0)


def test_lars_outlives_a_skipped_step():
    """Where GradScaler skips an optimiser's first step, the next one starts from zero momentum."""
    results = []
    for skipped in (0, 1):
        w = torch.nn.Parameter(torch.ones(3, 3))
        optimizer = LARS([w], lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu")
        for factor in [float("inf")] * skipped + [1.0, 2.0]:
            scaler.scale((factor * w).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(w.detach().clone())
    torch.testing.assert_close(*results)


def test_schedules(golden):
    lrs = torch.tensor([warmup_cosine(epoch, 0.6, 40) for epoch in range(40)], dtype=torch.float64)
    torch.testing.assert_close(lrs, golden["warmup_cosine_lr"], rtol=RTOL, atol=0)
    taus = torch.tensor([ema_tau(step / 100, 0.99, 0.999) for step in range(0, 101, 10)], dtype=torch.float64)
    torch.testing.assert_close(taus, golden["tau_every10of100"], rtol=RTOL, atol=0)


def rate(args, epoch, step):
    """The learning rate of a step in epochs of 39 steps, as the loop sets it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    optimizer.param_groups[0]["base_lr"] = args.lr * args.batch_size / 256
    return main_cssl.set_lr(optimizer, args, epoch, step, 39)


def test_schedule_of_a_run():
    """At the papers' lengths the released one, every epoch; in short runs and for FALCON one without jumps,
    every step."""
    args = arguments("--epochs 500 --batch_size 256 --moco_queue_size 256 --lr 0.6")
    assert (args.lr_schedule, args.warmup_epochs) == ("epoch", 10)
    rates = [rate(args, epoch, step) for epoch in range(500) for step in (0, 38)]
    assert rates == [warmup_cosine(epoch, 0.6, 500) for epoch in range(500) for _ in range(2)]
    args = arguments("--epochs 6 --batch_size 256 --moco_queue_size 256 --lr 0.6")
    rates = [rate(args, epoch, step) for epoch in range(6) for step in range(39)]
    assert rates[0] == 0.003 and max(rates) == 0.6 and max(abs(a - b) for a, b in pairwise(rates)) < 0.6 / 30
    args = arguments("--epochs 1 --batch_size 256 --moco_queue_size 256 --lr 0.6")
    rates = [rate(args, 0, step) for step in range(39)]
    assert rates[0] == 0.003 and rates.index(0.6) == 12  # a third of the steps
    args = arguments("--epochs 200 --batch_size 64", "falcon")
    rates = [rate(args, epoch, step) for epoch in range(200) for step in range(39)]
    assert (
        args.optimizer == "adam"
        and (rates[0], rates[389], max(rates)) == (3e-5, 2.5e-4, 2.5e-4)
        and rates[195] < 1.5e-4
    )


def test_coverage(golden):
    """Runs last: every number in the file has been compared with ours, or read as input."""
    assert FILES, f"no golden files in {FOLDER}"
    assert sorted(set(golden.arrays) - golden.used) == [], "numbers that no test compares"
