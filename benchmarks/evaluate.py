"""How long the offline protocols take on given features: 50,000 x 512 of 100 classes, 10,000 to test.

example:
    python -m benchmarks.evaluate          (on a GPU, where there is one)
"""

import argparse
import time

import torch

from benchmarks.count import Traffic
from utils import distributed, evaluate


def timed(name, function):
    before = time.monotonic()
    function()
    if process.device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{name:30s} {time.monotonic() - before:6.1f} s", flush=True)


def train(dtype, epochs=100):
    probe = evaluate.SoftmaxRegression(512, 100, [0.1], 0.0, 0, epochs, process, dtype)
    for _ in range(epochs):
        probe.train_one_epoch(x, y)


argparse.ArgumentParser(description=__doc__).parse_args()  # --help
process = distributed.start("auto")
torch.manual_seed(0)
sizes = (50_000, 512), (50_000,), (10_000, 512)
x, y, tests = torch.randn(sizes[0]), torch.randint(0, 100, sizes[1]), torch.randn(sizes[2])
x, y, tests = (tensor.to(process.device) for tensor in (x, y, tests))
everything = torch.ones_like(y, dtype=torch.bool)
with Traffic() as traffic:
    train(torch.float64, 1)
steps = -(-len(x) // evaluate.PROBE_BATCH)
print(f"linear probe: {100 * steps} steps of {sum(traffic.kernels.values()) / steps:.1f} kernels")
timed("linear probe, float64", lambda: train(torch.float64))
timed("linear probe, float32", lambda: train(torch.float32))
sweep = lambda _: (x, y), everything, 100, 0.0, 0, process
timed("choice of the rate (sweep)", lambda: evaluate.choose_lr(*sweep))
timed("k-NN, k 200 and 20", lambda: evaluate.knn(x, y, tests, 100, (200, 20), process=process))
