"""What a run says while it trains: metrics.jsonl, TensorBoard, and a progress bar or plain lines.

metrics.jsonl holds only what the seed decides, so that two runs of one command can be compared with diff;
timings go to TensorBoard and to the terminal.
"""

import json
import math
import os
import sys
import threading
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

PLAIN_SECONDS = 10  # at least so far apart are the lines of a run without a terminal


class Log:
    """Writes metrics.jsonl and TensorBoard events of a run folder; does nothing where folder is None (ranks
    other than 0).

    offset, step: the size of metrics.jsonl and the global step of the checkpoint that the run resumes from;
    what was written after it is dropped, since it will be written again.
    """

    def __init__(self, folder, offset=0, step=0):
        self.file = self.writer = None
        if folder is not None:
            path = Path(folder) / "metrics.jsonl"
            self.file = open(path, "a+")
            self.file.truncate(min(offset, path.stat().st_size))
            self.file.seek(0, os.SEEK_END)
            threading.excepthook = pass_over_oserror
            self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def metrics(self, kind, step, values, **where):
        """One line in metrics.jsonl, and each number as the TensorBoard scalar kind/name."""
        if self.file is None:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **where, **values}) + "\n")
        self.scalars(kind, step, values)

    def scalars(self, kind, step, values):
        """TensorBoard only: what depends on the machine."""
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)

    def views(self, step, views, mean, std, count=8):
        """A grid with the two views of some images, above each other."""
        if self.writer is None:
            return
        shape = (1, 3, 1, 1)
        mean, std = (views[0].new_tensor(s).view(shape) for s in (mean, std))
        rows = torch.stack([v[:count] for v in views])  # 2 x count images
        grid = make_grid(rows.flatten(0, 1), nrow=rows.shape[1])
        self.writer.add_image("views", (grid * std[0] + mean[0]).clamp(0, 1), step)

    def figure(self, name, figure, step):
        if self.writer is not None:
            self.writer.add_figure(name, figure, step)

    def hparams(self, arguments, values):
        if self.writer is not None:
            simple = {
                k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in arguments.items()
            }
            known = {f"final/{k}": v for k, v in values.items() if isinstance(v, float)}
            self.writer.add_hparams(simple, known, run_name=".")

    def flush(self):
        """Puts everything on the disk; returns the size of metrics.jsonl, for the checkpoint."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        self.writer.flush()
        return self.file.tell()


def pass_over_oserror(failed):
    """What a thread that failed prints: nothing where a disk did, since TensorBoard's thread tells that to
    the main one."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


class Progress:
    """One bar for a task's steps on a terminal, a plain line now and then elsewhere, nothing on ranks other
    than 0."""

    def __init__(self, task, tasks, epochs, steps, done, shown):
        self.title = f"task {task} (of {tasks})"
        self.epochs, self.steps, self.done, self.total = epochs, steps, done, epochs * steps
        self.shown = shown
        terminal = shown and sys.stderr.isatty()
        self.bar = (
            tqdm(total=self.total, initial=done, desc=self.title, unit="step", dynamic_ncols=True)
            if terminal
            else None
        )
        self.start, self.start_done = time.monotonic(), done
        self.printed, self.printed_done = -math.inf, None

    @property
    def share(self):
        """Of the task's steps done, 0 to 1."""
        return self.done / max(self.total, 1)

    def step(self):
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def say(self, loss, lr, images_per_second, waiting):
        speed = f"{images_per_second:.0f} images/s, {100 * waiting:.0f} % waiting for data"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.4f}, {speed}")
        elif self.shown and self.done != self.printed_done and self.line_is_due():
            self.printed, self.printed_done = time.monotonic(), self.done
            left = (
                (self.total - self.done) * (self.printed - self.start) / max(self.done - self.start_done, 1)
            )
            eta = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days"
            epoch = max(self.done - 1, 0) // self.steps + 1
            print(f"{self.title} epoch {epoch}/{self.epochs} step {self.done}/{self.total} loss {loss:.4f} "
                  f"lr {lr:.4f} "
                  f"{speed}, {eta} left", flush=True)  # fmt: skip

    def warn(self, message):
        """A line on stderr that leaves the bar whole."""
        if self.shown:
            tqdm.write(f"warning: {message}", file=sys.stderr)

    def line_is_due(self):
        return self.done == self.total or time.monotonic() - self.printed > PLAIN_SECONDS

    def close(self):
        if self.bar is not None:
            self.bar.close()
