"""Times one training step of a later task, part by part, and against fine-tuning, on random images.

    python benchmarks/step.py --image_size 32 --batch_size 256 --precision bf16 [--compile]
    python benchmarks/step.py --backbone resnet10 --width 16 --image_size 16 --moco_queue_size 4096

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
from data.datasets import ImageSet
from data.scenarios import Tasks
from utils import distributed
from utils.optim import build_optimizer

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

    def __init__(self, args, process, images):
        self.args, self.device, self.learner = args, process.device, main_cssl.build_learner(args, process)
        self.learner.begin_task(1, self.device)
        self.optimizer = build_optimizer(args, self.learner)
        self.model = main_cssl.wrap(self.learner, process, args.compile)
        tasks = Tasks(["random"], [torch.arange(len(images.labels))], None)
        loader, _ = main_cssl.build_loaders(args, process, images, None, tasks, 0)
        self.views = (views for epoch in range(10**6) for views, _ in loader.epoch(epoch))

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
    shape = (4 * args.batch_size, 3, *[args.image_size or 32] * 2)
    pixels, labels = torch.randint(0, 256, shape, dtype=torch.uint8), torch.zeros(shape[0], dtype=torch.int64)
    images = ImageSet(pixels, labels, [], (0.5,) * 3, (0.25,) * 3)
    main_cssl.resolve(args, process, images, None, Tasks(["random"], [labels], None))
    images.to(process.device)
    baseline = copy.copy(args)
    baseline.regularizer = "finetune"
    trial, plain = Trial(args, process, images), Trial(baseline, process, images)
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
