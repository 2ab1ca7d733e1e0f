"""A run lives in one folder: who may write it, what experiment it is, how far it is, and how it is asked to
stop."""

import contextlib
import copy
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
import torchvision

from utils import RunError, checkpoint
from utils.collapse import spread
from utils.evaluate import plot_matrix
from utils.log import Log, Progress
from utils.meter import Clock, Meter

# arguments that may differ when a run is resumed: they change where and how fast it runs, not what it
# computes
FREE = set(
    "out_dir data_dir download cache_dir device compile save_every log_every workers skip_corrupt".split()
)
PROTOCOL = set(
    "eval probe_lr probe_momentum probe_views probe_data_dir".split()
)  # may change until a task ends
SPLIT, LOCK = "split.pt", ".lock"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def write_text(path, text):
    """Written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def open_folder(path, arguments):
    """Makes or reopens a run folder, writes config.json, and holds the folder's lock until the process ends.

    Returns the lock; keep it. Raises RunError if the folder cannot be written, if another process holds it,
    or if it holds networks without the checkpoint that would tell what run they are of.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")
    except OSError as error:
        raise RunError(f"--out_dir {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RunError(
            f"another process is writing {folder}: wait for it, or choose another --out_dir"
        ) from error
    lock.write(os.urandom(8).hex())  # by which processes on other machines see that they see this folder
    lock.flush()
    os.fsync(lock.fileno())
    if not checkpoint.exists(folder):
        if any(folder.glob("task*.pt")):
            raise RunError(
                f"{folder} holds networks of a run but no {checkpoint.LAST}: choose another --out_dir, or "
                "empty it"
            )
        write_text(
            folder / "config.json", json.dumps({"arguments": arguments, **environment()}, indent=2) + "\n"
        )
    return lock


def read_config(folder):
    """The arguments in a run folder's config.json; raises RunError where there is none to read."""
    try:
        arguments = json.loads((Path(folder) / "config.json").read_text())["arguments"]
        return dict(arguments.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder} is not a run folder: its config.json is missing or damaged") from error


def compare_arguments(folder, old, new, free):
    """Raises RunError that names the first argument in which two experiments differ."""
    names = sorted((old.keys() | new.keys()) - free)
    for name in sorted(names, key=lambda name: name not in ("dataset", "method", "regularizer")):
        if name not in old or name not in new:
            raise RunError(
                f"{folder} holds a run of another version of this code, in which --{name} means nothing: "
                "finish it with that version, or choose another --out_dir"
            )
        if old[name] != new[name]:
            raise RunError(
                f"{folder} holds a run with --{name} {old.get(name)}, not {new.get(name)}: "
                "use the old value to resume it, or another --out_dir for a new run"
            )


def environment():
    """Versions and commit, so that a number can be traced."""
    versions = {module.__name__: module.__version__ for module in (numpy, torch, torchvision)}
    versions["python"] = platform.python_version()
    root = Path(__file__).resolve().parent.parent
    try:
        git = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {"versions": versions, "git_commit": commit, "command": sys.argv}


def write_results(folder, block):
    """Puts the block's entries into the folder's results.json; what is there under other names stays."""
    path = Path(folder) / "results.json"
    try:
        present = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        present = {}
    write_text(path, json.dumps({**present, **block}, indent=2) + "\n")


class Run:
    """A run folder and all that must survive an interruption.

    Its counters say where the run is: task, epoch, step (of the epoch), global_step; finished tasks, the
    accuracy matrices so far, and a random backbone's rows, by protocol; the projections' feature_std when the
    task began and when it was last logged; the last task in which its fall was warned of; the tasks in which
    the network had collapsed. process: only rank 0 writes. stop: the StopRequest. data: what identifies
    images and tasks; indices: of the images of each task, kept in split.pt. Both are compared at resume.
    """

    COUNTERS = {
        **{"task": 0, "epoch": 0, "step": 0, "global_step": 0, "finished": 0},
        **{
            "matrices": {},
            "random_rows": {},
            "start_std": 0.0,
            "last_std": 0.0,
            "warned": -1,
            "collapsed": [],
        },
    }

    def __init__(self, arguments, data, indices, process, stop):
        self.folder, self.main = Path(arguments["out_dir"]), process.main
        self.arguments = json.loads(json.dumps(arguments))  # as they will be read back: tuples become lists
        self.data = data
        self.lock = process.first(lambda: open_folder(self.folder, self.arguments) if self.main else None)
        self.saved = checkpoint.load_last(self.folder, warn=self.main)
        self.resumed = self.saved is not None
        vars(self).update(self.saved["counters"] if self.resumed else copy.deepcopy(self.COUNTERS))
        if self.resumed:
            self.check_experiment(self.saved["arguments"])
        flags = {f"--{name}": value for name, value in self.arguments.items() if name not in FREE}
        process.require_same(
            {**flags, "data set in --data_dir": data["digest"], "folder in --out_dir": self.read_lock()}
        )
        if self.main:
            self.check_split(indices)
        complete = self.finished == arguments["num_tasks"]
        size = self.saved["metrics_size"] if self.resumed else 0
        self.log = Log(self.folder if self.main and not complete else None, size, self.global_step)
        self.every, self.unit = arguments["save_every"]
        self.started = self.last_save = time.monotonic()
        self.seconds_saving = 0.0
        self.process, self.stop, self.clock = process, stop, Clock()

    def read_lock(self):
        try:
            return (self.folder / LOCK).read_text()
        except OSError:
            return None

    def check_experiment(self, arguments):
        """Raises RunError unless the checkpoint is of these arguments and data. Until a task is finished the
        protocol may still change, for instance to mend a probe that diverged."""
        compare_arguments(self.folder, arguments, self.arguments, FREE if self.finished else FREE | PROTOCOL)
        if any(arguments.get(name) != self.arguments[name] for name in PROTOCOL):
            self.random_rows = {}
        if self.saved["data"] != self.data:
            raise RunError(
                f"{self.folder} was trained on other data, or on another split of it: the files have changed "
                "since"
            )

    def check_split(self, indices):
        """Writes split.pt: for each task the indices of its images; raises RunError where the one of this run
        is another."""
        path = self.folder / SPLIT
        if self.resumed and path.exists():
            saved = checkpoint.load(path)
            if len(saved) != len(indices) or not all(torch.equal(a, b) for a, b in zip(saved, indices)):
                raise RunError(
                    f"{path} is not the split that these flags and data give: has a file been copied into "
                    "the folder?"
                )
        else:
            checkpoint.save(path, indices)

    def begin_task(self, task, epochs, loader, **parts):
        """Before a task's first step: learner, optimizer and scaler by name, whose state the run saves, and
        restores where it is resumed."""
        self.loader, self.epochs, self.meter = loader, epochs, Meter(self.process.device)
        self.parts = {**parts, "meter": self.meter}
        if self.saved is not None:
            for name, part in self.parts.items():
                part.load_state_dict(self.saved[name])
            self.saved = None
        done = self.epoch * loader.steps + self.step
        self.progress = Progress(task, self.arguments["num_tasks"], epochs, loader.steps, done, self.main)
        self.clock.restart()

    def end_step(self, terms, student, views):
        """Counts a step and logs it; saves where that is due, and leaves where a signal asked one of the
        ranks to."""
        self.meter.add(terms, self.global_step)
        self.z = student.z[0].detach()
        self.progress.step()
        self.step, self.global_step = self.step + 1, self.global_step + 1
        if self.epoch == 0 and self.step == 1:
            self.start_std = spread(self.z)
            self.log.views(self.global_step, views, self.loader.mean, self.loader.std)
        if self.global_step % self.arguments["log_every"] == 0:
            self.check_finite()
            self.report("train", self.meter.latest())
        epoch_ends = self.step == self.loader.steps
        self.leaving = self.process.agree(bool(self.stop), epoch_ends or self.global_step % 10 == 0)
        if not epoch_ends and (self.leaving or self.save_due()):
            self.save()
            self.stop.leave(self.leaving)

    def end_epoch(self):
        """Logs the epoch's means; saves unless that would take a tenth of the time."""
        self.check_finite()
        self.report("epoch", self.meter.means())
        self.epoch, self.step = self.epoch + 1, 0
        if self.leaving or self.epoch == self.epochs or self.save_due() or self.saving_is_cheap():
            self.save()
            self.stop.leave(self.leaving)

    def end_task(self):
        """After a task's evaluation."""
        self.progress.close()
        if self.finished == self.task:
            self.finished += 1
            self.save()
        self.task, self.epoch, self.step = self.task + 1, 0, 0

    def report(self, kind, values):
        """A line of metrics, with what is worth watching beside the losses; on the terminal the speed too."""
        lr, tau = self.parts["optimizer"].param_groups[0]["lr"], self.parts["learner"].method.ema_tau
        std, norm = spread(self.z), float(self.z.norm(dim=1).mean())
        values = {**values, "lr": lr, "ema_tau": tau, "feature_std": std, "z_norm": norm}
        self.log.metrics(kind, self.global_step, values, task=self.task, epoch=self.epoch)
        speed = {**self.clock.read(), "skipped_images": len(self.loader.skipped)}
        self.log.scalars("speed", self.global_step, speed)
        self.progress.say(values["loss"], lr, speed["images_per_second"], speed["data_wait_share"])
        self.last_std = std
        if std < self.start_std / 10 and self.warned < self.task:
            fall = f"from {self.start_std:.2g} to {std:.2g} since the task began, task {self.task}"
            self.progress.warn(
                f"the spread of the projections (feature_std) fell {fall}: they are collapsing; more "
                "--warmup_epochs or a lower --lr may prevent that"
            )
            self.warned = self.task

    def save_due(self):
        """Every --save_every steps or seconds."""
        if self.unit == "steps":
            return self.global_step % self.every == 0
        return time.monotonic() - self.last_save >= self.every

    def saving_is_cheap(self):
        """Whether it took under a tenth of the time so far, so that one more at an epoch's end does no
        harm."""
        return self.seconds_saving < 0.1 * (time.monotonic() - self.started)

    def check_finite(self, weights=False):
        """Raises RunError if a loss of the epoch, or a weight, is not finite. Waits for the device."""
        step = self.meter.first_bad_step()
        if step < 0 and weights:
            norms = torch.stack(torch._foreach_norm(list(self.parts["learner"].parameters())))
            step = -1 if norms.isfinite().all() else self.global_step - 1
        if step >= 0:
            kept = self.folder / checkpoint.LAST
            good = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
            raise RunError(
                f"the loss or a weight is not finite at step {step}, task {self.task}: start a run in another"
                f" --out_dir with a lower --lr or with --precision fp32; {good}"
            )

    def save(self):
        """Writes last.pt with the state of every part; the one before it becomes last.prev.pt."""
        before = time.monotonic()
        self.check_finite(weights=True)
        if self.main:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"counters": {name: getattr(self, name) for name in self.COUNTERS}, "data": self.data}
            state |= {"arguments": self.arguments, "metrics_size": self.log.flush()}
            checkpoint.save(self.folder / checkpoint.LAST, state, self.folder / checkpoint.PREVIOUS)
        self.last_save = time.monotonic()
        self.seconds_saving += self.last_save - before

    def publish(self, name, block, monitors, title):
        """After an evaluation: its row in the logs, results.json, the matrix as accuracy_matrix.png and in
        TensorBoard.

        name: of the protocol, "" for that of --eval.
        """
        if not self.main:
            return
        scores = {
            name: block[name] for name in ("average_accuracy", "forgetting", "forward_transfer", "plasticity")
        }
        values = {**scores, **monitors, "row": block["matrix"][-1]}
        self.log.metrics(
            f"eval_{name}".rstrip("_"), self.global_step, values, task=self.task, protocol=block["protocol"]
        )
        names = self.data["tasks"] if self.arguments["scenario"] == "domain" else None
        protocol = block["protocol"].split(":")[0]
        figure = plot_matrix(
            block["matrix"], f"{title}\n{protocol}, A = {scores['average_accuracy']:.2f} %", names
        )
        picture = f"accuracy_matrix_{name}".rstrip("_")
        self.log.figure(picture, figure, self.global_step)
        figure.savefig(self.folder / f"{picture}.png")
        write_results(self.folder, {name: block} if name else block)
        if not name and len(block["matrix"]) == block["tasks"]:
            self.log.hparams(self.arguments, scores)


class Stopped(BaseException):
    """A signal asked the run to leave; its name is the argument. Like KeyboardInterrupt no Exception: nothing
    else catches it."""


def ignore_signals():
    """For a process that is ending already."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the run to leave: at once, or, while steps are deferred, when the loop
    has saved."""

    def __init__(self):
        self.signal, self.deferring = None, False
        for number in STOP_SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        again, self.signal = self.signal is not None, signal.Signals(number)
        if not self.deferring or again:
            raise Stopped(self.signal)

    def __bool__(self):
        return self.signal is not None

    def leave(self, agreed):
        """Raises Stopped where the ranks agreed to leave."""
        if agreed:
            raise Stopped(self.signal or signal.SIGTERM)

    @contextlib.contextmanager
    def deferred(self):
        """Within it, the first signal only sets the flag."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        self.leave(bool(self))
