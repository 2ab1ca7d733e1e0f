"""How long the offline protocols take on given features: 50,000 x 512 of 100 classes, 10,000 to test."""

import argparse
import time

import torch

from utils import evaluate


def timed(name, function):
    before = time.monotonic()
    function()
    print(f"{name:30s} {time.monotonic() - before:6.1f} s", flush=True)


def train(dtype):
    probe = evaluate.SoftmaxRegression(512, 100, [0.1], 0.0, 0, 100, evaluate.ALONE, dtype)
    for _ in range(100):
        probe.train_one_epoch(x, y)


argparse.ArgumentParser(description=__doc__).parse_args()  # --help
torch.manual_seed(0)
x, y, tests = torch.randn(50_000, 512), torch.randint(0, 100, (50_000,)), torch.randn(10_000, 512)
everything = torch.ones(len(x), dtype=torch.bool)
timed("linear probe, float64", lambda: train(torch.float64))
timed("linear probe, float32", lambda: train(torch.float32))
timed("choice of the rate (sweep)", lambda: evaluate.choose_lr(lambda _: (x, y), everything, 100, 0.0, 0))
timed("k-NN, k 200 and 20", lambda: evaluate.knn(x, y, tests, 100, (200, 20)))
