"""Times one training step of a later task, part by part, and against fine-tuning, on random images.

    python -m benchmarks.step --backbone resnet10 --width 16 --image_size 16 --moco_queue_size 4096
    python -m benchmarks.step --image_size 32 --precision bf16 --against plain --json step.json

Takes every flag of main_cssl.py that shapes a step. --against plain, lightly: also the step of
benchmarks/plain.py, and that of benchmarks/packages.py, held against fine-tuning.
The parts are timed one after the other, waiting for the device in between; the images/s are of undisturbed
steps, a few of each kind in turn, medians of all rounds. A spread is the middle half of the rounds, in
percent of the median.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from importlib.util import find_spec

import torch

import main_cssl
from benchmarks.packages import Lightly
from benchmarks.plain import Plain
from data.datasets import ImageSet
from data.scenarios import Tasks
from utils import distributed
from utils.optim import build_optimizer

OTHERS = {"plain": Plain, "lightly": Lightly}
REFILL = 3  # seconds


def seconds(device, function):
    """(wall time, result) of function(), the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class Trial:
    """A learner in its second task, with its optimizer and endless views of random images."""

    def __init__(self, args, process, images):
        self.args, self.device, self.learner = args, process.device, main_cssl.build_learner(args, process)
        self.learner.begin_task(1, self.device)
        self.optimizer = build_optimizer(args, self.learner)
        self.model = main_cssl.wrap(self.learner, process, args.compile)
        tasks = Tasks(["random"], [torch.arange(len(images.labels))], None)
        loader, _ = main_cssl.build_loaders(args, process, images, None, tasks, 0)
        self.views = (views for epoch in range(10**6) for views, _ in loader.epoch(epoch))

    def step(self, timed=None):
        """timed: called with each part's name and what it does, whose result it returns."""
        if timed is not None:
            return self.parts(timed)
        loss, _, student, teacher = self.model(*next(self.views))
        loss.backward()
        self.update(student, teacher)

    def update(self, student, teacher):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.after_step(student, teacher, 0.5)

    def parts(self, timed):
        """What learner.forward does, in parts."""
        learner, method, regularizer = self.learner, self.learner.method, self.learner.regularizer
        momentum_outputs, dtype = method.momentum_outputs, learner.autocast_dtype

        def cast(function):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                return function()

        views = timed("data", lambda: next(self.views))
        k = timed("forward momentum", lambda: cast(lambda: momentum_outputs(views)))
        method.momentum_outputs = lambda views: k
        student = timed("forward student", lambda: cast(lambda: method(views))).of_all_ranks()
        del method.momentum_outputs
        teacher = timed("forward teacher", lambda: cast(lambda: regularizer.teach(views)))
        predicted = timed("forward predictor", lambda: cast(lambda: regularizer.predict(method, student)))
        teacher, predicted = (None if x is None else x.of_all_ranks() for x in (teacher, predicted))
        loss = timed("loss", lambda: sum(regularizer.losses(method, student, predicted, teacher).values()))
        timed("backward", loss.backward)
        timed("optimiser, EMA, queues", lambda: self.update(student, teacher))


def median_parts(trial, rounds):
    """{part: seconds}, medians."""
    times = {}

    def timed(name, function):
        spent, result = seconds(trial.device, function)
        times.setdefault(name, []).append(spent)
        return result

    for _ in range(rounds + 1):
        trial.step(timed)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def middle(values):
    """Median, and the middle half of the values in percent of it."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, 100 * (high - low) / median


def in_turn(device, contenders, rounds):
    """{name: seconds in each round}, of functions by name that take turns, so that a busy machine slows them
    all alike; a round before warms up. After steps of OTHERS their workers fill their queues, out of which
    the first steps of the next turn have their views for nothing."""
    times = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, function in contenders.items():
            times[name].append(seconds(device, function)[0])
            time.sleep(REFILL if name in OTHERS else 0)
    return {name: found[1:] for name, found in times.items()}


def report(args, table, times):
    """Prints the parts, the steps, and ratios of steps; returns the latter."""
    print(f"{'ms':24s} " + " ".join(f"{name:>9s}" for name in table))
    for part in next(iter(table.values())):
        print(f"{part:24s} " + " ".join(f"{1e3 * found.get(part, 0):9.2f}" for found in table.values()))
    for name, found in times.items():
        median, spread = middle(found)
        rate = f"{args.batch_size / median:9.0f} images/s"
        print(f"{'step, ' + name:24s} {1e3 * median:9.2f} ms   {rate}   spread {spread:.0f} %")
    pairs = [(args.regularizer, "finetune"), ("plain", args.regularizer), ("lightly", "finetune")]
    pairs = [(a, b) for a, b in pairs if a in times and a != b]
    ratios = {f"{a} / {b}": middle([x / y for x, y in zip(times[a], times[b])]) for a, b in pairs}
    for name, (ratio, spread) in ratios.items():
        print(f"{name:24s} {ratio:9.2f}      spread {spread:.0f} %")
    return ratios


def main(flags):
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--against", nargs="+", choices=OTHERS, default=[])
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)  # of a round
    own, flags = parser.parse_known_args(flags)
    if own.rounds < 2:
        parser.error("--rounds: at least 2")
    if "lightly" in own.against and find_spec("lightly") is None:
        parser.error("--against lightly: it is not installed: pip install lightly")
    process = distributed.start("auto")
    args = main_cssl.parse_arguments(flags)
    if own.against and (args.method, args.regularizer) != ("moco", "pnr"):
        parser.error("--against: with --method moco --regularizer pnr, the default")
    if args.precision == "fp16":
        parser.error("--precision fp16: its scaling of the loss is not timed here: use bf16 or fp32")
    torch.set_float32_matmul_precision(main_cssl.PRECISIONS[args.loss_precision])
    shape = (4 * args.batch_size, 3, *[args.image_size or 32] * 2)
    pixels, labels = torch.randint(0, 256, shape, dtype=torch.uint8), torch.zeros(shape[0], dtype=torch.int64)
    images = ImageSet(pixels, labels, [], (0.5,) * 3, (0.25,) * 3)
    main_cssl.resolve(args, process, images, None, Tasks(["random"], [labels], None))
    images.to(process.device)
    baseline = copy.copy(args)
    baseline.regularizer = "finetune"
    trials = {args.regularizer: Trial(args, process, images), "finetune": Trial(baseline, process, images)}
    trials |= {name: OTHERS[name](args, process.device, pixels) for name in own.against}
    cuda = process.device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    setting = f"{args.method} + {args.regularizer}, {args.backbone} width {args.width}, {args.image_size} px"
    setting += f", batch {args.batch_size}, {args.precision}, losses {args.loss_precision}, "
    setting += f"{'compiled, ' * args.compile}{where}, torch {torch.__version__}"
    print(setting)
    shown = (args.regularizer, *["finetune"] * ("lightly" in own.against), *own.against)
    table = {name: median_parts(trials[name], own.rounds) for name in shown}
    turn = lambda trial: lambda: [trial.step() for _ in range(own.steps)]  # noqa: E731
    times = in_turn(process.device, {name: turn(trial) for name, trial in trials.items()}, own.rounds)
    times = {name: [spent / own.steps for spent in found] for name, found in times.items()}
    ratios = report(args, table, times)
    if own.json:
        with open(own.json, "w") as file:
            json.dump({"setting": setting, "parts": table, "steps": times, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
