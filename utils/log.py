"""What a run says while it trains: metrics.jsonl, TensorBoard, and a progress bar or plain lines.

metrics.jsonl holds only what the seed decides, so that two runs of one command can be compared with diff;
timings go to speed.jsonl, TensorBoard and the terminal.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm


class Lines:
    """What tqdm writes, as lines."""

    def write(self, text):
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self):
        pass


def bar(*iterable, delay=30, **options):
    """tqdm; without a terminal a line now and then, and none for what is done within the delay."""
    if sys.stderr.isatty():
        return tqdm(*iterable, dynamic_ncols=True, **options)
    plain = {"bar_format": "{desc}: {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}", "delay": delay}
    return tqdm(*iterable, file=Lines(), mininterval=10, **plain, **options)


class Log:
    """Writes metrics.jsonl and TensorBoard events of a run folder; does nothing where folder is None (ranks
    other than 0).

    offset, step: the size of metrics.jsonl and the global step of the checkpoint that the run resumes from;
    what was written after it is dropped, since it will be written again."""

    def __init__(self, folder, offset=0, step=0):
        self.file = self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            path = Path(folder) / "metrics.jsonl"
            self.file = open(path, "a+")
            self.file.truncate(min(offset, path.stat().st_size))
            self.file.seek(0, os.SEEK_END)
            threading.excepthook = pass_over_oserror
            self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
            listed = Path(folder) / "projector_config.pbtxt"
            self.embeddings = listed.read_text() if listed.exists() else ""

    def metrics(self, kind, step, values, **where):
        """One line in metrics.jsonl, and each number as the TensorBoard scalar kind/name."""
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, "step": step, **where, **values}) + "\n")
            self.scalars(kind, step, values)

    def scalars(self, kind, step, values):
        """TensorBoard only: what depends on the machine."""
        for name, value in values.items():
            if self.writer is not None and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def hparams(self, values, tags):
        """A line of TensorBoard's table of runs: what the run is, and tags of scalars, its results."""
        if self.writer is not None:
            from torch.utils.tensorboard.summary import hparams

            plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items()}
            for part in hparams(plain, dict.fromkeys(tags)):
                self.writer.file_writer.add_summary(part)

    def embedding(self, step, features, labels, classes, parts, count=2000):
        """Up to `count` of the test features [N, F] for TensorBoard's projector, each with its class and the
        tasks that are tested on it. labels: int64 [N], -1 for none; parts: for each task int64 indices."""
        if self.writer is not None:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            drawn, owners = order[labels.cpu()[order] >= 0][:count], [set(part.tolist()) for part in parts]
            names = [classes[label] for label in labels[drawn].tolist()]
            tested = [" ".join(str(t) for t, own in enumerate(owners) if i in own) for i in drawn.tolist()]
            columns = [*zip(names, tested)], ["class", "task"]
            self.writer.add_embedding(features[drawn], columns[0], None, step, "features", columns[1])
            # TensorBoard's writer begins this list anew when a run is resumed
            listed = Path(self.writer.log_dir) / "projector_config.pbtxt"
            listed.write_text(self.embeddings + listed.read_text())

    def views(self, step, views, mean, std, count=8):
        """A grid with the two views of some images, above each other."""
        if self.writer is not None:
            from torchvision.utils import make_grid

            rows = torch.cat([view[:count] for view in views])
            mean, std = (rows.new_tensor(s).view(3, 1, 1) for s in (mean, std))
            self.writer.add_image("views", make_grid((rows * std + mean).clamp(0, 1), len(rows) // 2), step)

    def flush(self):
        """Puts everything on the disk; returns the size of metrics.jsonl, for the checkpoint."""
        if self.file is None:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        self.writer.flush()
        return self.file.tell()


def pass_over_oserror(failed):
    """Of a thread that a full disk has ended nothing is printed: TensorBoard tells the main thread."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


class Meter:
    """Sums of what a step measures, over an epoch, kept on the device, so that no step waits for it."""

    def __init__(self, device):
        self.device, self.names, self.sums, self.count = device, [], None, 0
        self.bad_step = torch.full((), -1, device=device)

    def add(self, terms, step):
        """terms: 0-dim tensors by name, the loss first; step: the global step that they belong to."""
        self.last = torch.stack([t.detach() for t in terms.values()])
        if self.sums is None:
            self.names, self.sums = list(terms), torch.zeros_like(self.last)
        self.sums += self.last
        self.count += 1
        self.bad_step = torch.where((self.bad_step < 0) & ~self.last.isfinite().all(), step, self.bad_step)

    def latest(self):
        """The last step's loss and terms by name. Waits for the device."""
        return dict(zip(self.names, self.last.tolist()))

    def means(self):
        """Of the epoch by name; the next epoch starts from zero. Waits for the device."""
        means = dict(zip(self.names, (self.sums / self.count).tolist()))
        self.sums, self.count = None, 0
        return means

    def state_dict(self):
        return {"names": self.names, "sums": self.sums, "count": self.count}

    def load_state_dict(self, state):
        self.names, self.count = state["names"], state["count"]
        self.sums = None if state["sums"] is None else state["sums"].to(self.device)


class Progress:
    """A bar for a task's steps, with images per second and the share of the time spent waiting for data."""

    def __init__(self, task, args, epochs, steps, done, shown):
        self.done, self.total, self.batch_size = done, epochs * steps, args.batch_size
        options = {"desc": f"task {task} (of {args.num_tasks})", "unit": "step", "delay": 0}
        self.bar = bar(total=self.total, initial=done, disable=not (shown and self.total), **options)
        self.read, self.read_done, self.waited = time.monotonic(), done, 0.0
        self.speed = {"images_per_second": 0.0, "data_wait_share": 0.0}

    @property
    def share(self):
        """Of the task's steps done, 0 to 1."""
        return self.done / max(self.total, 1)

    def watch(self, batches):
        """Yields the batches, counts them, and the time until each was there."""
        before = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def step(self):
        self.done += 1
        self.bar.update()

    def say(self, epoch, loss, lr):
        """Loss and rate beside the bar; returns the speed since it was called before, by name."""
        if self.done > self.read_done:
            seconds, images = time.monotonic() - self.read, (self.done - self.read_done) * self.batch_size
            self.speed = {"images_per_second": images / seconds, "data_wait_share": self.waited / seconds}
            self.read, self.read_done, self.waited = time.monotonic(), self.done, 0.0
        rate, waiting = self.speed.values()
        words = f"epoch {epoch + 1}, loss {loss:.4f}, lr {lr:.4f}, {rate:.0f} images/s"
        self.bar.set_postfix_str(f"{words}, {100 * waiting:.0f} % waiting for data", refresh=False)
        return dict(self.speed)
