"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: one line and status 128 + the signal, and no step lost."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def end_workers():
    """Of processes that decode images, for which the interpreter would wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes the end of a worker for an error
    threading.excepthook = lambda _: None  # and its thread that pins memory may have been taking a batch
    for worker in multiprocessing.active_children():
        worker.kill()


class Stop:
    """From its creation on a signal ends the program: at once, or, within `deferred`, when the loop has saved
    and calls `leave`. One that comes over a second later does not wait; before, it may be the same one, from
    the terminal and from the script or the batch system that hands it on."""

    def __init__(self, program):
        self.program, self.signal, self.deferring, self.since = program, None, False, math.inf
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        again = time.monotonic() - self.since > 1
        self.since = min(self.since, time.monotonic())
        self.signal = self.signal or signal.Signals(number)
        if not self.deferring or again:
            self.tell()
            end_workers()
            os._exit(128 + self.signal)  # what it interrupts, such as a callback, might swallow SystemExit

    @contextlib.contextmanager
    def deferred(self):
        self.deferring = True
        try:
            yield
        except Exception:
            if self.signal is None:
                raise
        finally:
            self.deferring = False
        if self.signal is not None:  # an exception may come of processes that the signal has ended, too
            self.leave()

    def leave(self):
        """After saving."""
        self.signal = self.signal or signal.SIGTERM  # another rank's
        self.tell()
        sys.exit(128 + self.signal)

    def tell(self):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            words = "what was saved is safe: run the same command again to go on"
            os.write(2, f"{self.program}: stopped by {self.signal.name}; {words}\n".encode())
