"""Disturbs runs in every way that machines know, and starts them again: each must end where an undisturbed
run ends.

    python tests/fault_campaign.py               the long form: 25 kills, and every other fault in every phase
    of a run python tests/fault_campaign.py --short       each fault once, as in the test suite python
    tests/fault_campaign.py --only nan    the faults whose name holds a word; --seed 1 for other moments

Prints what was tried, how often it struck, and what was lost; the exit status is 0 if nothing was. A run is
lost if the disturbance costs more steps than those since the last checkpoint was due, and SIGTERM any; if the
same command then does not go on from that checkpoint, or does not end with the same metrics, results and
weights, bit for bit; or if a failure was not one line that says so.
"""

import argparse
import contextlib
import ctypes
import importlib
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trees
from conftest import TINY, counters, outcome, same
from test_torchrun import ranks_of, start

import main_cssl
from data import stream

CONTEXT = multiprocessing.get_context("forkserver")
SAVE_EVERY = 3  # steps
HANGS = 180  # seconds after which a run that does not end counts as lost
# what runs do, one after the other, and where: a disturbance comes with one of the calls
PHASES = {
    "reading data": "main_cssl:load_dataset",
    "caching": "data.cache:decode",
    "building the network": "main_cssl:build_learner",
    "writing settings": "utils.run:write_text",
    "extracting features": "utils.evaluate:extract",
    "classifying": "utils.evaluate:knn",
    "beginning a task": "models.learner:Learner.begin_task",
    "decoding": "data.stream:Crops.__getitem__",
    "augmenting": "data.augment:make_view",
    "a forward pass": "models.learner:Learner.forward",
    "EMA and queues": "models.learner:Learner.after_step",
    "logging": "utils.log:Log.metrics",
    "saving": "utils.checkpoint:torch.save",
    "syncing": "os:fsync",
    "renaming": "os:replace",
    "between tasks": "main_cssl:save_network",
    "writing results": "utils.run:Run.publish",
    "printing results": "main_cssl:print_results",
}


@dataclass
class Disturbance:
    """Takes its action at the given call (from 1) of a phase's function; `mark` is a file that then holds the
    steps done so far."""

    action: str
    phase: str
    call: int
    mark: str


def kill(do):
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(do):
    os.kill(os.getpid(), signal.SIGTERM)
    return do()


def full_disk(do):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond
    return do()


def read_only(do):
    """The run folder can no longer be written, by root either."""
    os.chmod(work.folder, 0o555)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110  # of the effective capabilities those that overrule permissions
    assert libc.capset(header, data) == 0
    return do()


def clock_back(do):
    now = time.time
    time.time = lambda: now() - 30 * 86400
    return do()


def stall(do):
    time.sleep(3600)


def not_a_number(do):
    return do().mul_(float("nan"))


ACTIONS = {f.__name__: f for f in (kill, terminate, full_disk, read_only, clock_back, stall, not_a_number)}


def replace(phase, around):
    """Makes around(do) what a call of the phase's function is, do being the call itself."""
    module, _, path = PHASES[phase].partition(":")
    owner = importlib.import_module(module)
    *inner, name = path.split(".")
    for part in inner:
        owner = getattr(owner, part)
    function = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: around(lambda: function(*args, **options)))


def work(flags, folder, disturbance, counts):
    """A run in a process of its own, with its output in files beside the folder; writes a line per call of a
    phase to counts."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    main_cssl.torch.set_num_threads(1)
    work.folder, calls, steps = folder, 0, 0

    def count_step(do):
        nonlocal steps
        do()
        steps += 1

    def strike(do):
        nonlocal calls
        calls += 1
        if calls != disturbance.call:
            return do()
        Path(disturbance.mark).write_text(str(steps))
        return ACTIONS[disturbance.action](do)

    def count(phase):
        def around(do):
            os.write(handle, f"{phase}\n".encode())
            return do()

        handle = os.open(counts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return around

    if disturbance is not None:
        replace(disturbance.phase, strike)
        replace("EMA and queues", count_step)
        if disturbance.action == "stall":
            stream.TIMEOUT = 2
    elif counts is not None:
        for phase in PHASES:
            replace(phase, count(phase))
    flags = f"{flags} --out_dir {folder}".split()
    sys.exit(
        main_cssl.report_errors(lambda: main_cssl.main(main_cssl.parse_arguments(flags)), "main_cssl.py")
    )


class Experiment:
    """One command, how an undisturbed run of it ends, and what its disturbed runs ended as."""

    def __init__(self, name, flags, root):
        self.flags, self.root, self.numbers = flags, root / name, itertools.count()
        self.root.mkdir()
        folder, before = self.folder(), time.monotonic()
        assert self.run(folder, counts=self.root / "counts") == 0, Path(f"{folder}.err").read_text()
        self.seconds = time.monotonic() - before
        self.calls = Counter((self.root / "counts").read_text().splitlines())
        self.expected = outcome(folder)

    def folder(self):
        return self.root / str(next(self.numbers))

    def start(self, folder, disturbance=None, counts=None):
        cache = f"--cache_dir {folder}.cache" if "--cache" in self.flags else ""
        process = CONTEXT.Process(target=work, args=(f"{self.flags} {cache}", folder, disturbance, counts))
        process.start()
        return process

    def run(self, folder, *disturbance, **options):
        """The exit status; None of a run that hangs."""
        return self.wait(self.start(folder, *disturbance, **options))

    def wait(self, process):
        process.join(HANGS)
        if process.exitcode is None:
            process.kill()
        return process.exitcode

    def disturb(self, action, phase, call):
        """(Whether it struck, what was lost or None) of a run that is disturbed once."""
        folder = self.folder()
        disturbance = Disturbance(action, phase, call, f"{folder}.mark")
        status = self.run(folder, disturbance)
        struck = Path(disturbance.mark).exists()
        allowed = (
            0 if not struck else 2 if (action, phase) == ("kill", "decoding") else EXPECTED[action]
        )  # that killed a worker
        steps = int(Path(disturbance.mark).read_text()) if struck else 0
        kept = (counters(folder) or {"global_step": 0})["global_step"]
        lost = self.verdict(folder, status, (allowed,), WORDS.get(action, "") if allowed != 0 else "")
        if lost is None and kept < steps - (0 if action == "terminate" else SAVE_EVERY):
            lost = f"of {steps} steps it kept {kept}"
        return struck, lost

    def verdict(self, folder, status, allowed, words=""):
        """What is wrong with the end of a disturbed run, or with what the same command then makes of it."""
        lines = Path(f"{folder}.err").read_text().splitlines()
        kept = shutil.copy(f"{folder}.err", f"{folder}.disturbed.err")
        with contextlib.suppress(FileNotFoundError):
            os.chmod(folder, 0o755)
        own = [line for line in lines if line.startswith("main_cssl.py:")]
        if status not in allowed:
            return f"ended with status {status}, not {allowed}: {kept}"
        if (status > 0 and (len(own) != 1 or words not in own[0])) or any(
            "Traceback" in line for line in lines
        ):
            return f"not one line with {words!r}: {kept}"
        return self.rerun(folder)

    def rerun(self, folder):
        found = counters(folder)
        if (status := self.run(folder)) != 0:
            return f"started again, it ended with status {status}: {folder}.err"
        place = found and "resumed at task {task}, epoch {epoch}, step {step}".format(**found)
        if place and f"({place})" not in Path(f"{folder}.out").read_text():
            return f"started again, it did not say that it {place}: {folder}.out"
        if not same(outcome(folder), self.expected):
            return f"started again, it ended elsewhere: {folder}"
        shutil.rmtree(folder, ignore_errors=True)  # a disk of its own stays

    # ---- faults

    def kill_at_a_moment(self, moment):
        """SIGKILL from outside, after a share of the time that a run takes."""
        folder = self.folder()
        process = self.start(folder)
        time.sleep(moment * self.seconds)
        struck = process.is_alive()
        process.kill()
        status = self.wait(process)
        return struck, self.verdict(folder, status, (-signal.SIGKILL, 0))

    def damage(self, how, place):
        """last.pt of an interrupted run is damaged; the one before it is used."""
        folder = self.folder()
        killed = self.run(
            folder,
            Disturbance("kill", "EMA and queues", self.calls["EMA and queues"] * 3 // 4, f"{folder}.mark"),
        )
        assert killed == -signal.SIGKILL
        last = folder / "last.pt"
        content = bytearray(last.read_bytes())
        if how == "flipped":  # a kilobyte within the tensors
            kilobyte = slice(
                int(len(content) * (0.25 + place / 2)), int(len(content) * (0.25 + place / 2)) + 1024
            )
            content[kilobyte] = bytes(255 - byte for byte in content[kilobyte])
        cut = content[: 1 + int(place * (len(content) - 1))]
        last.write_bytes({"truncated": cut, "empty": b"", "foreign": b"no checkpoint"}.get(how, content))
        if how == "missing":  # as between the two renames of a save
            last.unlink()
        lost = self.rerun(folder)
        warned = "warning: cannot read checkpoint" in Path(f"{folder}.err").read_text()
        return True, lost or (None if warned or how == "missing" else f"no warning: {folder}.err")

    def fill_disk(self, free):
        """A disk of its own for the run, so small that `free` of its bytes are left; then there is room
        again."""
        folder = self.folder()
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True, capture_output=True
        )
        try:
            (folder / "filler").write_bytes(bytes(max(0, 16 * 2**20 - free)))
            status = self.run(folder)
            (folder / "filler").unlink()
            lost = self.verdict(folder, status, (2,), "No space left")
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return True, lost


EXPECTED = dict.fromkeys(ACTIONS, 2) | {"terminate": 143, "clock_back": 0, "kill": -signal.SIGKILL}
WORDS = {"not_a_number": "not finite", "stall": "no images came", "terminate": "stopped by SIGTERM"}


class Pair:
    """A run of two ranks under torchrun, which starts them again when one of them ends."""

    def __init__(self, flags, root):
        self.flags, self.root, self.numbers = flags, root / "pair", itertools.count()
        self.root.mkdir()
        before = time.monotonic()
        self.expected = outcome(self.run(None)[1])
        self.seconds = time.monotonic() - before

    def run(self, moment, rank=0):
        """(Whether the rank could be killed after a share of the usual time, the run folder)."""
        folder, struck = self.root / str(next(self.numbers)), False
        job = start("--standalone --nproc-per-node 2 --max-restarts 1", f"{self.flags} --out_dir {folder}")
        if moment is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(moment * self.seconds)
            pid = ranks_of(job).get(rank)
            if struck := pid is not None and job.poll() is None:
                os.kill(pid, signal.SIGKILL)
        _, error = job.communicate(timeout=HANGS)
        assert job.returncode == 0, error
        return struck, folder

    def kill_a_rank(self, moment, rank):
        struck, folder = self.run(moment, rank)
        return struck, None if same(outcome(folder), self.expected) else f"it ended elsewhere: {folder}"


def may_mount():
    with tempfile.TemporaryDirectory() as folder:
        done = (
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
            if shutil.which("mount")
            else None
        )
        return (
            done is not None and done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0
        )


def trials(root, short, rng):
    """Yields (name of a fault, function that tries it once)."""
    flags = f"{TINY} --num_tasks 2 --epochs 1 --save_every {SAVE_EVERY} --batch_size 64"
    tree = trees.fill(
        root / "images", [f"{split}/{name}" for split in ("train", "test") for name in "abcd"], 32
    )
    files = f"{flags} --dataset folder --data_dir {tree} --workers 1 --cache disk --cache_size 16"
    files += " --batch_size 8 --moco_queue_size 16"
    memory, streamed = Experiment("memory", flags, root), Experiment("streamed", files, root)

    def disturb(action, phase, of=streamed):
        return partial(of.disturb, action, phase, rng.randint(1, of.calls[phase]))

    for phase in ("caching", "extracting features", "saving", "between tasks") if short else PHASES:
        yield (
            f"SIGKILL, {phase}",
            disturb("kill", phase, rng.choice([e for e in (memory, streamed) if e.calls[phase]])),
        )
    for _ in range(1 if short else 4):
        yield "SIGKILL at any moment", partial(rng.choice([memory, streamed]).kill_at_a_moment, rng.random())
    if not short:  # tests/test_torchrun.py has one
        pair = Pair(flags, root)
        for rank in (0, 1, 0):
            yield "SIGKILL of one rank of two", partial(pair.kill_a_rank, rng.uniform(0.4, 1), rank)
    for phase in ("augmenting", "saving", "classifying") if short else PHASES:
        if phase != "decoding":  # workers leave signals to the main process
            yield f"SIGTERM, {phase}", disturb("terminate", phase)
    for how in (
        ("flipped", "truncated", "empty")
        if short
        else ("flipped", "truncated", "empty", "foreign", "missing")
    ):
        yield f"last.pt {how}", partial(memory.damage, how, rng.random())
    repeat = 1 if short else 3
    for i in range(repeat):
        yield "no file may grow", disturb("full_disk", "EMA and queues", (streamed, memory)[i % 2])
        yield "run folder read-only", disturb("read_only", "EMA and queues", memory)
        yield "clock jumps back a month", disturb("clock_back", "EMA and queues")
        yield "a worker stalls", disturb("stall", "decoding")
        yield "NaN in the images", disturb("not_a_number", "augmenting", memory)
    if not short and may_mount():
        for free in (50_000, 1_000_000, 2_000_000, 2_400_000):
            yield "disk full", partial(memory.fill_disk, free)


def campaign(short=False, only="", seed=0, show=print):
    """Tries everything, two at a time; returns what was lost, a line each."""
    root = Path(tempfile.mkdtemp(prefix="faults"))
    CONTEXT.set_forkserver_preload(["main_cssl", "fault_campaign"])
    tried, struck, lost = Counter(), Counter(), []

    def attempt(trial):
        name, function = trial
        try:
            return name, *function()
        except Exception as error:  # the fault could not be tried: that is no pass
            return name, False, f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(2) as pool:
        chosen = (trial for trial in trials(root, short, random.Random(seed)) if only in trial[0])
        for name, hit, loss in pool.map(attempt, chosen):
            tried[name] += 1
            struck[name] += hit
            if loss is not None:
                lost.append(f"{name}: {loss}")
            show(
                f"{name:34s} "
                f"{'lost' if loss else 'as undisturbed' if hit else 'as undisturbed (it ended first)'}"
            )
    show(f"\n{'fault':34s} tried  struck")
    for name in tried:
        show(f"{name:34s} {tried[name]:5d} {struck[name]:7d}")
    if not tried:
        lost.append(f"no fault is called {only!r}")
    show(
        "\n".join(
            [f"{sum(tried.values())} faults, {sum(struck.values())} struck, {len(lost)} runs lost", *lost]
        )
    )
    if not lost:
        shutil.rmtree(root)
    return lost


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="each fault once")
    parser.add_argument("--only", default="", help="faults whose name holds this word")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    sys.exit(bool(campaign(args.short, args.only, args.seed)))


if __name__ == "__main__":
    main()
