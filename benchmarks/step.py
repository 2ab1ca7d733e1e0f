"""Times one training step of a later task, part by part, and against fine-tuning, on random images.

    python benchmarks/step.py --backbone resnet18 --image_size 32 --batch_size 256 --precision bf16
    [--compile] python benchmarks/step.py --backbone resnet10 --width 16 --image_size 16 --batch_size 64
    --moco_queue_size 4096

Takes every flag of main_cssl.py that shapes a step. The parts are timed one after the other, waiting for the
device in between; the images/s of the regulariser and of fine-tuning are of undisturbed steps, a few of each
in turn, medians of all rounds.
"""

import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_cssl
from data.augment import ViewConfig
from data.loader import Loader
from utils import distributed

ROUNDS, STEPS = 7, 4


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

    def __init__(self, args, process):
        self.args, self.device, self.learner = args, process.device, main_cssl.build_learner(args, process)
        self.learner.begin_task(1, self.device)
        self.optimizer = main_cssl.build_optimizer(args, self.learner)
        self.model = main_cssl.wrap(self.learner, process, args.compile)
        images = torch.randint(
            0, 256, (4 * args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8
        )
        views = [ViewConfig(args.image_size, args.min_scale, *p) for p in zip(args.blur_p, args.solarize_p)]
        statistic = ((0.5,) * 3, (0.25,) * 3)
        key = (args.seed, 1, process.rank, process.world)
        loader = Loader(
            images.to(self.device), torch.arange(len(images)), args.batch_size, views, *statistic, *key
        )
        self.views = (pair for epoch in range(10**6) for pair in loader.epoch(epoch))

    def step(self):
        loss, _, student, teacher = self.model(*next(self.views))
        loss.backward()
        self.update(student, teacher)

    def update(self, student, teacher):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.after_step(student, teacher, 0.5)

    def parts(self):
        """Seconds of each part of a step."""
        learner, method, regularizer = self.learner, self.learner.method, self.learner.regularizer
        times = {}

        def timed(name, function):
            times[name], result = seconds(self.device, function)
            return result

        def cast(function):
            with torch.autocast(
                self.device.type, learner.autocast_dtype, enabled=learner.autocast_dtype is not None
            ):
                return function()

        views = timed("data", lambda: next(self.views))
        momentum, _ = seconds(self.device, lambda: cast(lambda: method.momentum_outputs(views)))
        student = timed("forward student", lambda: cast(lambda: method(views))).of_all_ranks()
        times["forward student"] -= momentum
        times["forward momentum"] = momentum
        teacher = timed("forward teacher", lambda: cast(lambda: regularizer.teach(views)))
        predicted = timed("forward predictor", lambda: cast(lambda: regularizer.predict(method, student)))
        teacher, predicted = (None if x is None else x.of_all_ranks() for x in (teacher, predicted))
        loss = timed("loss", lambda: sum(regularizer.losses(method, student, predicted, teacher).values()))
        timed("backward", loss.backward)
        timed("optimiser, EMA, queues", lambda: self.update(student, teacher))
        return times


def main(flags):
    process = distributed.start("auto")
    args = main_cssl.parse_arguments(flags)
    args.image_size = args.image_size or 32
    args.stem = "cifar" if args.image_size <= 64 else "imagenet"
    args.precision = args.precision or ("bf16" if process.device.type == "cuda" else "fp32")
    baseline = copy.copy(args)
    baseline.regularizer = "finetune"
    trial, plain = Trial(args, process), Trial(baseline, process)
    rows = [trial.parts() for _ in range(ROUNDS + 2)][2:]
    device = (
        torch.cuda.get_device_name()
        if process.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    compiled = ", compiled" if args.compile else ""
    print(
        f"{args.method} + {args.regularizer}, {args.backbone} width {args.width}, {args.image_size} px, "
        f"batch {args.batch_size}"
    )
    print(f"{args.precision}{compiled}, {device}, torch {torch.__version__}")
    for name in rows[0]:
        print(f"{name:24s} {1e3 * statistics.median(row[name] for row in rows):9.2f} ms")
    times = {trial: [], plain: []}
    for t in times:
        seconds(t.device, lambda t=t: [t.step() for _ in range(STEPS)])
    for _ in range(ROUNDS):
        for t in times:
            times[t].append(seconds(t.device, lambda t=t: [t.step() for _ in range(STEPS)])[0] / STEPS)
    for t in times:
        median = statistics.median(times[t])
        print(
            f"{'step, ' + t.args.regularizer:24s} {1e3 * median:9.2f} ms   {t.args.batch_size / median:9.0f} "
            "images/s"
        )
    ratio = statistics.median(a / b for a, b in zip(*times.values()))
    print(f"{args.regularizer} / finetune       {ratio:9.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
