"""The losses, LARS and the schedules give the numbers that the released code gave (see golden/README.md)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, settled

from losses import find
from losses.falcon import falcon_loss
from models.frozen import ema_tau
from models.learner import Outputs
from models.resnet import build_backbone
from utils.optim import LARS, set_lr, warmup_cosine

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("losses_*.npz"))
assert FILES, f"no losses_*.npz in {FOLDER}"


class Golden(dict):
    """One file: tensors by key, with a note of which keys were read or compared."""

    def __init__(self, path):
        super().__init__(np.load(path))
        self.used = set()

    def __getitem__(self, key):
        self.used.add(key)
        return torch.tensor(super().__getitem__(key))

    def compare(self, key, got, **views):
        """Also its gradients that the file has: for z=[z1, z2] KEY_grad_z1 and KEY_grad_z2."""
        got, want = torch.as_tensor(got, dtype=torch.float64), self[key]
        near = {"rtol": 1e-9, "atol": 1e-9 * float(want.abs().max()) if "_grad_" in key else 0.0}
        torch.testing.assert_close(got.detach(), want, **near, msg=lambda m: f"{key}: {m}")
        for name, x in [(f"{name}{v}", x) for name, pair in views.items() for v, x in enumerate(pair, 1)]:
            if (gradient := f"{key.partition('_beta')[0]}_grad_{name}") in self:
                self.compare(gradient, torch.autograd.grad(got, x, retain_graph=True)[0])

    def compare_method(self, name):
        """Its loss, CaSSLe's term and PNR's terms, by the regularisers' code and with the default weights."""
        contrastive = name in ("moco", "simclr")
        tau = f"--{name}_tau {self['T']} --{name}_tau_distill {self['Td']}" if contrastive else ""
        method = find(name)(build_backbone("resnet10", 8, "cifar"), arguments(tau, name))
        z, k, f, g, b = ([self[f"in_{x}{v}"].requires_grad_() for v in (1, 2)] for x in "z k zo g b".split())
        student, teacher, predicted = Outputs(z=z, k=k, q=b), Outputs(z=f), Outputs(z=g)
        if name == "moco":
            student.queue, teacher.queue = self["in_queue"], self["in_queue_old"]
        regularizers = [find(key)(arguments(f"--regularizer {key}")) for key in ("finetune", "cassle", "pnr")]
        plain, cassle, pnr = (r.losses(method, student, predicted, teacher) for r in regularizers)
        self.compare(name, plain["ssl"], z=z, b=b)
        self.compare("contrastive_cassle" if contrastive else f"{name}_cassle", cassle["distill"], g=g)
        # PNR's terms replace the loss of contrastive methods, and in the file stand without that of others
        own = [pnr["ssl"], pnr["align"]] if contrastive else [pnr["distill"], pnr["pseudo_negatives"]]
        self.compare(f"{name}_pnr", sum(own), z=z, g=g)
        assert cassle["ssl"].equal(plain["ssl"]) and (contrastive or pnr["ssl"].equal(plain["ssl"]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_of_the_file(path):
    golden = Golden(path)
    for name in ("moco", "simclr", "byol", "vicreg", "barlow"):
        golden.compare_method(name)
    for key in [key for key in golden if key.startswith("falcon_beta")]:  # z are its logits
        z = [golden[f"in_z{v}"].requires_grad_() for v in (1, 2)]
        golden.compare(key, falcon_loss(*z, beta=float(key.removeprefix("falcon_beta"))), z=z)
    for exclude in (False, True):
        w, b = torch.nn.Parameter(golden["lars_w0"]), torch.nn.Parameter(golden["lars_b0"])
        optimizer = LARS([w, b], lr=0.6, momentum=0.9, weight_decay=1e-4, exclude_bias_n_norm=exclude)
        for w.grad, b.grad in zip(golden["lars_gw"], golden["lars_gb"]):
            optimizer.step()
        golden.compare(f"lars_w3_excl{exclude:d}", w)
        golden.compare(f"lars_b3_excl{exclude:d}", b)
    golden.compare("warmup_cosine_lr", [warmup_cosine(epoch, 0.6, 40) for epoch in range(40)])
    golden.compare("tau_every10of100", [ema_tau(tenth / 10, 0.99, 0.999) for tenth in range(11)])
    assert sorted(golden.keys() - golden.used) == [], "numbers that nothing compares"


def test_lars_outlives_a_skipped_step(monkeypatch):
    """Where GradScaler skips an optimiser's first step, the next one starts from zero momentum."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))
    results = []
    for skipped in (0, 1):
        w = torch.nn.Parameter(torch.ones(3, 3))
        optimizer, scaler = LARS([w], lr=0.1, fused=True), torch.amp.GradScaler("cpu")
        for factor in [float("inf")] * skipped + [1.0, 2.0]:
            optimizer.zero_grad()
            scaler.scale((factor * w).sum()).backward()
            scaler.unscale_(optimizer), scaler.step(optimizer), scaler.update()
        results.append(w.detach())
    torch.testing.assert_close(*results)


def rates(flags, method="moco"):
    """The learning rate at each step of a run on 39 batches."""
    (args, _), found = settled(flags, method), []
    optimizer = torch.optim.SGD([torch.zeros(1)])
    optimizer.param_groups[0]["base_lr"] = args.lr * args.batch_size / 256
    for epoch, step in np.ndindex(args.epochs, 39):
        set_lr(optimizer, args, find(method).warmup_start_lr, epoch, step, 39)
        found.append(optimizer.param_groups[0]["lr"])
    return np.array(found)


def test_schedule_of_a_run():
    """At the papers' lengths the released one, by epochs; in short runs and for FALCON a smooth one."""
    flags = "--batch_size 256 --moco_queue_size 256 --lr 0.6 --epochs"
    assert rates(f"{flags} 500").tolist() == [warmup_cosine(step // 39, 0.6, 500) for step in range(500 * 39)]
    short, shortest = rates(f"{flags} 6"), rates(f"{flags} 1")
    assert short[0] == 0.003 and short.max() == 0.6 and abs(np.diff(short)).max() < 0.6 / 30
    assert shortest[0] == 0.003 and shortest.argmax() == 12  # a third of the steps
    falcon = rates("--epochs 200 --batch_size 64", "falcon")
    assert (falcon[0], falcon[389], falcon.max()) == (3e-5, 2.5e-4, 2.5e-4) and falcon[195] < 1.5e-4


def test_lars_where_a_norm_is_zero():
    """The gradient stays as it is: weight decay alone moves nothing, and a weight of zero can leave it."""
    w, zero = (torch.nn.Parameter(x * torch.ones(2, 2)) for x in (3.0, 0.0))
    optimizer = LARS([w, zero], lr=0.1, weight_decay=0.5)
    w.grad, zero.grad = torch.zeros(2, 2), 2 * torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(w, torch.full_like(w, 3.0)) and torch.equal(zero, torch.full_like(zero, -0.2))
