"""The losses, LARS and the schedules against numbers that the released code gave (see golden/README.md)."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments

from losses import METHODS, REGULARIZERS
from losses.base import Outputs
from models import build_backbone
from models.twins import ema_tau
from utils.optim import LARS, warmup_cosine

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
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
        """value, and the gradient for each leaf that the file has one of, e.g. z=[z1, z2] for name_grad_z1, name_grad_z2."""
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


def moco_and_outputs(golden):
    """MoCo with the file's temperatures; the student's and the teacher's outputs with the file's queues; the predictor's."""
    args = arguments("--method moco --regularizer pnr")
    args.moco_tau, args.moco_tau_distill = golden["T"].item(), golden["Td"].item()
    method = METHODS["moco"](build_backbone("resnet10", 4, "cifar"), args)
    z, k, f, g = golden.leaves("z", "k", "zo", "g")
    return method, Outputs(z=z, k=k, queue=golden["in_queue"]), Outputs(z=f, queue=golden["in_queue_old"]), Outputs(z=g)


def test_moco(golden):
    method, out, _, _ = moco_and_outputs(golden)
    golden.check("moco", method.ssl(out), z=out.z)


def test_moco_pnr(golden):
    method, out, old, pred = moco_and_outputs(golden)
    pnr = REGULARIZERS["pnr"](arguments("--regularizer pnr"))
    golden.check("moco_pnr", sum(pnr.losses(method, out, pred, old).values()), z=out.z, g=pred.z)


def test_contrastive_cassle(golden):
    method, out, old, pred = moco_and_outputs(golden)
    cassle = REGULARIZERS["cassle"](arguments("--regularizer cassle"))
    terms = cassle.losses(method, out, pred, old)
    golden.check("contrastive_cassle", terms["distill"], g=pred.z)
    golden.check("moco", terms["ssl"], z=out.z)


@pytest.mark.parametrize("exclude", [False, True])
def test_lars(golden, exclude):
    w, b = torch.nn.Parameter(golden["lars_w0"]), torch.nn.Parameter(golden["lars_b0"])
    optimizer = LARS([w, b], lr=0.6, momentum=0.9, weight_decay=1e-4, exclude_bias_n_norm=exclude)
    for gw, gb in zip(golden["lars_gw"], golden["lars_gb"]):
        w.grad, b.grad = gw.clone(), gb.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), golden[f"lars_w3_excl{exclude:d}"], rtol=RTOL, atol=0)
    torch.testing.assert_close(b.detach(), golden[f"lars_b3_excl{exclude:d}"], rtol=RTOL, atol=0)


def test_schedules(golden):
    lrs = torch.tensor([warmup_cosine(epoch, 0.6, 40) for epoch in range(40)], dtype=torch.float64)
    torch.testing.assert_close(lrs, golden["warmup_cosine_lr"], rtol=RTOL, atol=0)
    taus = torch.tensor([ema_tau(step / 100, 0.99, 0.999) for step in range(0, 101, 10)], dtype=torch.float64)
    torch.testing.assert_close(taus, golden["tau_every10of100"], rtol=RTOL, atol=0)


def test_coverage(golden):
    """Runs last: says which numbers nothing has been compared with, so that they do not look as if they had passed."""
    assert FILES, f"no golden files in {FOLDER}"
    missing = sorted(set(golden.arrays) - golden.used)
    methods = {key.split("_")[0] for key in missing if not key.startswith("in_")}
    assert not methods & {*METHODS, "lars", "warmup", "tau", "contrastive"}, f"not compared: {missing}"
    if missing:
        warnings.warn(f"golden numbers of methods that are not here yet, not covered: {', '.join(missing)}", stacklevel=1)
