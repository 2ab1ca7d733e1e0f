"""Sums of losses that stay on the device, and the clock of a run."""

import time

import torch


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

    def first_bad_step(self):
        """The first global step whose loss was not finite, or -1. Waits for the device."""
        return int(self.bad_step)

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


class Clock:
    """Images per second, and the share of the time spent waiting for data."""

    def __init__(self):
        self.reading = {"images_per_second": 0.0, "data_wait_share": 0.0}
        self.restart()

    def restart(self):
        self.start, self.waited, self.images = time.monotonic(), 0.0, 0

    def watch(self, batches, batch_size):
        """Yields the batches and counts the time until each was there."""
        batches = iter(batches)
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            self.images += batch_size
            yield batch

    def read(self):
        """Of the time since the last reading; that reading again if there was no batch in between."""
        if self.images:
            elapsed = max(time.monotonic() - self.start, 1e-9)
            self.reading = {
                "images_per_second": self.images / elapsed,
                "data_wait_share": self.waited / elapsed,
            }
            self.restart()
        return self.reading
