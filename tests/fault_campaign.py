"""Disturbs runs from outside at random moments and repeats their command: each must end where an undisturbed
run ends, bit for bit.

    python tests/fault_campaign.py --rounds 5 --seed 1       (about five minutes on two cores)

Prints what was tried, how often it struck before the run had ended, the most steps that it cost, and what was
lost; the exit status is 0 if nothing was. A run is lost if a fault costs more steps than those since the last
checkpoint was due, and a signal that asks it to stop any; if it then says anything but one line; or if the
same command does not go on from the checkpoint to the same metrics, results and weights.
"""

import argparse
import contextlib
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed.run
import trees
from conftest import ENVIRONMENT, ROOT, TINY, counters, mp, outcome, ranks_of, same

SAVE_EVERY, HANGS = 3, 100  # steps; seconds after which a run that does not end is lost
DIGITS = f"{TINY} --num_tasks 2 --epochs 1 --batch_size 64 --save_every {SAVE_EVERY} --log_every 1"
FILES = f"{DIGITS} --dataset folder --workers 1 --cache_size 16 --batch_size 8"
TORCHRUN = f"{torch.distributed.run.__file__} --standalone --nproc_per_node 2 --max_restarts 1 --"
FORKSERVER = mp.get_context("forkserver")  # imports PyTorch once for all processes


def program(flags, folder, launcher):
    """main_cssl.py as a process, perhaps under torchrun; what it says is in files beside its folder."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    cache = f"--cache {folder}.cache" if "--cache_size" in flags else ""
    sys.argv = f"{launcher} {ROOT}/main_cssl.py {flags} --out_dir {folder} {cache}".split()
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    sys.exit(status)


def wait_for(condition, process):
    """Returns once the condition holds or the process has ended."""
    while not condition() and process.is_alive():
        time.sleep(0.001)


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


# Each fault strikes a process and its folder, up to the yield; what follows comes once the process has ended.


def send(number):
    def strike(process, folder):
        os.kill(process.pid, number)
        yield

    return strike


def kill_worker(process, folder):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(children.read_text, process)
    os.kill(int(random.choice(children.read_text().split())), signal.SIGKILL)
    yield


def kill_rank(process, folder):
    wait_for(lambda: ranks_of(process), process)
    os.kill(random.choice([*ranks_of(process).values()]), signal.SIGKILL)
    yield


def fill_disk(process, folder):
    """The folder is a disk of its own where one can be mounted; elsewhere no file may grow any more."""
    if os.path.ismount(folder):
        with contextlib.suppress(OSError):
            (folder / "filler").write_bytes(bytes(2**25))
    else:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    yield
    (folder / "filler").unlink(missing_ok=True)


def forbid_writing(process, folder):
    """What is open stays open; nothing can be opened, renamed or removed any more, by root either."""
    mount("--bind", folder, folder)
    wait_for(lambda: mount("-o", "remount,bind,ro", folder), process)  # not while a file is being written
    yield
    subprocess.run(["umount", folder], check=True)


def damage(how):
    """Of last.pt of a run that was asked to stop: the one before it has to do."""

    def strike(process, folder):
        wait_for((folder / "last.prev.pt").exists, process)
        os.kill(process.pid, signal.SIGTERM)
        yield
        content = bytearray((folder / "last.pt").read_bytes())
        with zipfile.ZipFile(folder / "last.pt") as archive:  # within a tensor, not in what lies between them
            tensor = max(map(archive.read, archive.namelist()), key=len)
        place = content.index(tensor) + random.randrange(len(tensor))
        content[place] ^= 1 << random.randrange(8)
        ruins = {"truncated": content[:place], "empty": b"", "foreign": b"no checkpoint"}
        (folder / "last.pt").write_bytes(ruins.get(how, content))
        if how == "missing":  # as between the two renames of a save
            (folder / "last.pt").unlink()

    return strike


FAULTS = {  # what strikes, the status that the run then ends with, and the steps that it may cost
    "kill -9": (send(signal.SIGKILL), -signal.SIGKILL, SAVE_EVERY),
    "SIGTERM": (send(signal.SIGTERM), 143, 0),
    "SIGUSR1": (send(signal.SIGUSR1), 138, 0),
    "disk full": (fill_disk, 2, SAVE_EVERY),
    "folder read-only": (forbid_writing, 2, SAVE_EVERY),
    "worker killed": (kill_worker, 2, SAVE_EVERY),
    "rank killed": (kill_rank, 0, 0),  # torchrun starts both again
} | {f"last.pt {how}": (damage(how), 143, 3) for how in "truncated empty foreign flipped missing".split()}


class Experiment:
    """One command, and how an undisturbed run of it ends."""

    def __init__(self, root, flags, launcher=""):
        self.root, self.flags, self.launcher, self.numbers = root, flags, launcher, count()
        root.mkdir()
        process, before = self.start(root / "undisturbed"), time.monotonic()
        assert self.end(process) == 0, (root / "undisturbed.err").read_text()
        self.seconds, self.expected = time.monotonic() - before, outcome(root / "undisturbed")

    def start(self, folder):
        process = FORKSERVER.Process(target=program, args=(self.flags, folder, self.launcher))
        process.start()
        wait_for(Path(f"{folder}.err").exists, process)
        return process

    def end(self, process):
        process.join(HANGS)
        process.kill()
        return process.exitcode

    def disturb(self, name):
        """Whether the fault struck before the run had ended, and what it cost in steps; AssertionError if the
        run is lost."""
        strike, expected, allowed = FAULTS[name]
        folder, struck = self.root / f"{next(self.numbers)}", False
        folder.mkdir()
        disk = strike is fill_disk and mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", folder)
        try:
            process = self.start(folder)
            time.sleep(random.uniform(0, 0.9) * self.seconds)
            if name != "kill -9":  # which may come while a cache is made
                wait_for((folder / "config.json").exists, process)
            hand = strike(process, folder)
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):  # it has ended
                struck = next(hand) is None
            status = self.end(process)
            next(hand, None)
            said = [s for s in self.read(folder, "err").splitlines() if not s.startswith("warning:")]
            assert status in (0, expected), f"{folder} ended with status {status}: {said}"
            one = len(said) == 1 and said[0].startswith("main_cssl.py: ")
            assert status <= 0 or one, f"{folder} did not say what happened in one line: {said}"
            damaged = struck and "last.pt" in name and "missing" not in name
            cost = self.repeat(folder, allowed, damaged)
            return struck and status == expected, cost
        finally:
            if disk:
                subprocess.run(["umount", "-l", folder], check=True)

    def read(self, folder, name):
        return Path(f"{folder}.{name}").read_text()

    def repeat(self, folder, allowed, damaged):
        """Checks what is left of a run, and what the same command makes of it; returns the steps lost."""
        log, kept = folder / "metrics.jsonl", counters(folder)
        steps = re.findall(r'"step": (\d+)', log.read_text()) if log.exists() else []
        cost = max(map(int, steps), default=0) - (kept["global_step"] if kept else 0)
        assert cost <= allowed, f"{folder} is {cost} steps behind, not {allowed}"
        status = self.end(self.start(folder))
        assert status == 0, f"{folder} ended again, with status {status}: {self.read(folder, 'err')}"
        place = "resumed at task {task}, epoch {epoch}, step {step}".format(**kept) if kept else ""
        assert place in self.read(folder, "out"), f"{folder} does not say that it {place}"
        assert "last.pt" in self.read(folder, "err") or not damaged, f"{folder} does not warn of its damage"
        assert same(outcome(folder), self.expected), f"{folder} ended elsewhere"
        return cost


def campaign(rounds, seed=0, faults=tuple(FAULTS)):
    """Lets every fault strike `rounds` times, two at a time; returns how often each struck, what was lost."""
    random.seed(seed)
    os.environ |= ENVIRONMENT
    FORKSERVER.set_forkserver_preload(
        ["torchvision", "sklearn.datasets", "torch.utils.tensorboard", "matplotlib.figure"]
    )
    root = Path(tempfile.mkdtemp(prefix="faults"))
    tree = trees.fill(root / "images", "train test", "a b c d", count=32)
    both = [Experiment(root / "digits", DIGITS), Experiment(root / "files", f"{FILES} --data_dir {tree}")]
    where = {name: both for name in faults} | {"worker killed": both[1:]}
    if "rank killed" in faults:
        where["rank killed"] = [Experiment(root / "pairs", DIGITS, TORCHRUN)]
    if not mount("--bind", tree, tree):
        where.pop("folder read-only")  # it cannot be tried
    else:
        subprocess.run(["umount", tree], check=True)
    tried, struck, costs, lost = Counter(), Counter(), Counter(), []

    def attempt(name):
        while True:  # until it comes before the run has ended
            tried[name] += 1
            try:
                hit, cost = random.choice(where[name]).disturb(name)
            except Exception as error:  # what could not be tried is lost, too
                return lost.append(f"{name}: {type(error).__name__} {error}")
            if hit:
                struck[name], costs[name] = struck[name] + 1, max(costs[name], cost)
                return print(name, "is survived", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, [*where] * rounds))
    print(f"\n{'fault':18s} tried  struck  most steps that it cost")
    for name in where:
        print(f"{name:18s} {tried[name]:5d} {struck[name]:7d} {costs[name]:7d}")
    print(f"{sum(struck.values())} faults struck, {len(lost)} runs were lost", *lost, sep="\n")
    if not lost:
        shutil.rmtree(root)
    return struck, lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often every fault strikes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    sys.exit(bool(campaign(args.rounds, args.seed)[1]))
