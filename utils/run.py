"""A run lives in one folder: who may write it, what experiment it is, how far it is, and what it says."""

import copy
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
import torchvision
from tqdm import tqdm

from data import same_value, set_names
from utils import LATER, UserError, checkpoint
from utils.collapse import feature_std
from utils.log import Log, Meter, Progress
from utils.metrics import SCORES, format_row, kind_of

# arguments that may differ when a run is resumed: they change where and how fast it runs, not what it does
FREE = "out_dir data_dir download cache device compile save_every log_every workers skip_corrupt"
FREE = set(f"{FREE} reference embedding".split())
PROTOCOL = set("eval probe_lr probe_momentum probe_views probe_data_dir".split())  # until a task has ended
COUNTERS = dict.fromkeys("task epoch step global_step finished start_std last_std".split(), 0)
COUNTERS |= {"warned": -1, "given_tasks": 0, "matrices": {}, "random_rows": {}, "collapsed": []}


def write_json(path, content):
    """Written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def read_config(folder):
    """The arguments in a run folder's config.json; raises UserError where there is none to read."""
    try:
        arguments = json.loads((Path(folder) / "config.json").read_text())["arguments"]
        return {**arguments, "num_tasks": int(arguments["num_tasks"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a run folder: its config.json is missing or damaged") from error


def read_results(path):
    """What a results.json holds; {} where there is none. Raises UserError if it is damaged or another
    file."""
    try:
        found = json.loads(Path(path).read_text()) if path else {}
        return {**found}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no results, or is damaged: move it away") from error


def write_results(path, blocks):
    """Puts the blocks into a results.json; what is there under other names stays, also what another process
    is about to write."""
    path = Path(path)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        write_json(path, {**read_results(path), **blocks})


def environment():
    """Versions and commit, so that a number can be traced."""
    versions = {module.__name__: module.__version__ for module in (numpy, torch, torchvision)}
    call = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(call, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    versions["python"] = platform.python_version()
    return {"versions": versions, "git_commit": commit, "command": sys.argv}


class Run:
    """A run folder and all that must survive an interruption.

    Its counters say where the run is: task, epoch, step (of the epoch), global_step; finished tasks, the
    accuracy matrices so far, and a random backbone's rows, by protocol; the projections' feature_std when the
    task began and when it was last logged; the last task in which its fall was warned of; the tasks in which
    the network had collapsed. tasks, digest (of the data): compared at resume; process: only rank 0 writes;
    stop: the program's Stop."""

    def __init__(self, args, tasks, digest, process, stop):
        self.folder, self.main, self.process, self.stop = Path(args.out_dir), process.main, process, stop
        self.arguments = json.loads(json.dumps(vars(args)))  # as they will be read back: tuples become lists
        self.args, self.data = args, {"tasks": tasks.names, "digest": digest}
        process.rank0_first(self.open_folder)
        self.saved = checkpoint.load_last(self.folder, warn=self.main)
        self.resumed = self.saved is not None
        vars(self).update(self.saved["counters"] if self.resumed else copy.deepcopy(COUNTERS))
        if self.resumed:
            self.check_experiment()
        flags = {f"--{name}": value for name, value in self.arguments.items() if name not in FREE}
        found = {"data set in --data_dir": digest, "step in the --out_dir": self.global_step}
        process.require_same(flags | found)
        if self.main and not self.resumed:
            write_json(self.folder / "config.json", {"arguments": self.arguments, **environment()})
            checkpoint.save(self.folder / "split.pt", tasks.train)  # for the reader; the digest is compared
        logs = self.main and self.finished < args.num_tasks
        size = self.saved["metrics_size"] if self.resumed else 0
        self.log = Log(self.folder if logs else None, size, self.global_step)
        if not self.resumed:
            plain = {name: value for name, value in self.arguments.items() if name not in FREE}
            first = {name.title(): plain.pop(name) for name in ("method", "regularizer", "seed")}  # as sorted
            first["Regularizer"] = kind_of(self.arguments)
            kinds = {"eval": args.eval, f"eval_online_linear_{args.online_probe}": args.online_probe}
            kinds = [kind for kind, how in kinds.items() if how not in ("none", "off")]
            tags = [f"{kind}/{score}" for kind in kinds for score in SCORES]
            self.log.hparams(first | plain, tags)
        self.started = self.last_save = self.told = time.monotonic()
        self.seconds_saving, self.leaving = 0.0, False

    def open_folder(self):
        """Makes or reopens the folder, on rank 0, and holds its lock until the process ends. Raises UserError
        if the folder cannot be written, if another process holds it, or if it holds networks without the
        checkpoint that would tell what run they are of."""
        if not self.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
        except OSError as error:
            raise UserError(f"--out_dir {self.folder} cannot be written: {error.strerror}") from error
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by worker processes
        except OSError as error:
            advice = "wait for it, or choose another --out_dir"
            raise UserError(f"another process is writing {self.folder}: {advice}") from error
        if not checkpoint.states(self.folder) and any(self.folder.glob("task*.pt")):
            advice = "choose another --out_dir, or empty it"
            raise UserError(f"{self.folder} holds networks of a run but no {checkpoint.LAST}: {advice}")

    def check_experiment(self):
        """Raises UserError unless the checkpoint is of these arguments and data. Until a task is finished the
        protocol may still change, for instance to mend a probe that diverged."""
        old, new = LATER | self.saved["arguments"], self.arguments
        free = FREE if self.finished else FREE | PROTOCOL
        first = ("dataset", "method", "regularizer")
        for name in sorted((old.keys() | new.keys()) - free, key=lambda name: (name not in first, name)):
            if not same_value(name, old.get(name, "?"), new.get(name, "?")):
                words = f"a run with --{name} {old.get(name, 'unknown')}, not {new.get(name, 'unknown')}"
                words += " (None: without --cache)" if name == "cache_size" else ""
                advice = "use the old value to resume it, or another --out_dir for a new run"
                raise UserError(f"{self.folder} holds {words}: {advice}")
        if any(old.get(name) != new[name] for name in PROTOCOL):
            self.random_rows = {}
        if self.saved["data"] != self.data:
            raise UserError(f"{self.folder} was trained on other data, or another split: have files changed?")

    def begin_task(self, task, epochs, loader, **parts):
        """Before a task's first step: learner, optimizer and scaler by name, whose state the run saves, and
        restores where it is resumed."""
        self.loader, self.epochs, self.meter = loader, epochs, Meter(self.process.device)
        self.parts = {**parts, "meter": self.meter}
        for name, part in self.parts.items() if self.saved else ():
            part.load_state_dict(self.saved[name])
        self.saved, done = None, self.epoch * loader.steps + self.step
        self.progress = Progress(task, self.args, epochs, loader.steps, done, self.main)

    def end_step(self, terms, student, views):
        """Counts a step and logs it; saves where that is due or where a signal came to one of the ranks."""
        self.meter.add(terms, self.global_step)
        self.z = student.z[0].detach()
        self.progress.step()
        self.step, self.global_step = self.step + 1, self.global_step + 1
        if self.epoch == 0 and self.step == 1:
            self.start_std = feature_std(self.z)
            self.log.views(self.global_step, views, self.loader.images.mean, self.loader.images.std)
        if self.global_step % self.args.log_every == 0:
            self.check_finite()
            self.report("train", self.meter.latest())
        epoch_ends = self.step == self.loader.steps
        if epoch_ends or self.global_step % 10 == 0 or self.process.world == 1:
            self.leaving = self.process.any_rank(self.stop.signal is not None)
        if not epoch_ends and (self.leaving or self.save_is_due()):
            self.save()

    def end_epoch(self):
        """Logs the epoch's means; saves unless that would take over 2 % of the time."""
        self.check_finite()
        self.report("epoch", self.meter.means())
        self.epoch, self.step = self.epoch + 1, 0
        self.leaving = self.process.any_rank(self.leaving or self.stop.signal is not None)
        cheap = self.seconds_saving < 0.02 * (time.monotonic() - self.started)
        if cheap or self.leaving or self.epoch == self.epochs or self.save_is_due():
            self.save()

    def end_task(self):
        """After a task's evaluation."""
        self.progress.bar.close()
        if self.finished == self.task:
            self.finished += 1
            self.save()
        self.task, self.epoch, self.step = self.task + 1, 0, 0

    def report(self, kind, values):
        """A line of metrics, with what is worth watching beside the losses; on the terminal the speed too."""
        lr, tau = self.parts["optimizer"].param_groups[0]["lr"], self.parts["learner"].method.ema_tau
        self.last_std, norm = feature_std(self.z), float(self.z.norm(dim=1).mean())
        values = {**values, "lr": lr, "ema_tau": tau, "feature_std": self.last_std, "z_norm": norm}
        self.log.metrics(kind, self.global_step, values, task=self.task, epoch=self.epoch)
        speed = self.progress.say(self.epoch, values["loss"], lr)
        speed["skipped_images"] = len(self.loader.images.skipped)
        if self.process.device.type == "cuda":
            speed["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.process.device) / 2**30
        self.log.scalars("speed", self.global_step, speed)
        if kind == "epoch" and self.main:
            since, self.told = self.told, time.monotonic()
            line = {"kind": kind, "task": self.task, "epoch": self.epoch, "seconds": self.told - since}
            with open(self.folder / "speed.jsonl", "a") as file:
                print(json.dumps(line | speed), file=file)
        if self.last_std < self.start_std / 10 and self.warned < self.task:
            fall = f"from {self.start_std:.2g} to {self.last_std:.2g} since the task began, task {self.task}"
            advice = "they are collapsing; more --warmup_epochs or a lower --lr may prevent that"
            self.warn(f"the projections' feature_std fell {fall}: {advice}")
            self.warned = self.task

    def warn(self, message):
        """A line on stderr that leaves the bar whole."""
        if self.main:
            tqdm.write(f"warning: {message}", file=sys.stderr)

    def check_finite(self, weights=False):
        """Raises UserError if a loss of the epoch, or a weight, is not finite. Waits for the device."""
        step = int(self.meter.bad_step)
        if step < 0 and weights:
            norms = torch.stack(torch._foreach_norm(list(self.parts["learner"].parameters())))
            step = -1 if norms.isfinite().all() else self.global_step - 1
        if step >= 0:
            kept = self.folder / checkpoint.LAST
            good = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
            advice = f"start a run in another --out_dir with a lower --lr or with --precision fp32; {good}"
            raise UserError(f"the loss or a weight is not finite at step {step}, task {self.task}: {advice}")

    def save_is_due(self):
        """Every --save_every steps or seconds."""
        every, unit = self.args.save_every
        passed = time.monotonic() - self.last_save
        return self.global_step % every == 0 if unit == "steps" else passed >= every

    def save(self):
        """Writes last.pt with the state of every part; the one before it becomes last.prev.pt. Leaves where a
        signal asked one of the ranks to."""
        before = time.monotonic()
        self.check_finite(weights=True)
        if self.main:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"counters": {name: getattr(self, name) for name in COUNTERS}, "data": self.data}
            state |= {"arguments": self.arguments, "metrics_size": self.log.flush()}
            checkpoint.save(self.folder / checkpoint.LAST, state, self.folder / checkpoint.PREVIOUS)
        self.last_save = time.monotonic()
        self.seconds_saving += self.last_save - before
        if self.leaving:
            self.stop.leave()

    def save_network(self, learner):
        """taskN.pt: the backbone under torchvision's names, the rest of the method as heads, what the
        regulariser carries on (a teacher is made anew), and the online probe's classifier."""
        state, network = learner.method.state_dict(), {"config": self.arguments, "task": self.task}
        backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        heads = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        kept = {k: v for k, v in learner.regularizer.state_dict().items() if not k.startswith("teacher.")}
        network |= {"backbone": backbone, "heads": heads, "tasks": self.data["tasks"], "regularizer": kept}
        if learner.online is not None:
            network["online"] = learner.online.state_dict()
        if self.main:
            checkpoint.save(self.folder / f"task{self.task}.pt", network)

    def publish(self, name, block, monitors, spectrum):
        """After an evaluation: its row on the terminal and in the logs, results.json, the matrix as
        accuracy_matrix.png and in TensorBoard. name: of the protocol, "" for that of --eval."""
        if not self.main:
            return
        from utils.plots import plot_matrix, plot_spectrum, save

        scores, writer = {score: block[score] for score in SCORES}, self.log.writer
        kind, picture = f"eval_{name}".rstrip("_"), f"accuracy_matrix_{name}".rstrip("_")
        values = {**scores, "row": block["matrix"][-1]}
        where = {**monitors, "task": self.task, "protocol": block["protocol"]}
        self.log.metrics(kind, self.global_step, values, **where)
        self.log.scalars("collapse", self.global_step, monitors)
        protocol = block["protocol"].split(":")[0]
        title = f"{self.args.dataset}, {self.args.method} + {kind_of(self.arguments)}, "
        title += f"seed {self.args.seed}\n{protocol}, A = "
        names = self.data["tasks"] if self.args.scenario == "domain" else None
        names = set_names(self.args.sequence) or names  # of joint training, too
        figure = plot_matrix(block["matrix"], f"{title}{scores['average_accuracy']:.2f} %", names)
        save(figure, self.folder / picture)
        writer.add_figure(picture, figure, self.global_step)
        # against the number of tasks trained, so that forgetting is a curve
        tag = picture.replace("accuracy_matrix", "accuracy")
        for number, accuracy in enumerate(block["matrix"][-1]):
            writer.add_scalar(f"{tag}/task{number}", accuracy, self.task + 1)
        write_results(self.folder / "results.json", {name: block} if name else block)
        line = format_row(f"after task {self.task}: accuracy (%), {protocol}", block["matrix"][-1])
        random_row = block["random_backbone"]
        print(line + (f"; {format_row('random network', random_row)}" if random_row else ""), flush=True)
        if monitors:
            writer.add_figure("collapse/spectrum", plot_spectrum(spectrum), self.global_step)
