"""What the tests share: tiny settings, and the command line run in this process or in others."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import main_cssl
import main_linear
from losses import find
from utils import checkpoint, distributed
from utils.distributed import Process
from utils.stop import SIGNALS, Stop

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
CPU = Process(torch.device("cpu"))
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}  # pytest's
BASE = "--backbone resnet10 --width 8 --image_size 8 --batch_size 32 --epochs 2 --log_every 3 --eval knn"
BASE += " --device cpu"
mp.get_context("forkserver").set_forkserver_preload(["main_cssl"])  # imported once for all


def tiny(method):
    """Flags of a tiny run on digits with that method; under LARS at a rate at which none collapses."""
    rate = "--lr 0.2" if find(method).optimizer == "lars" else ""
    return f"{BASE} --method {method} {find(method).small} {rate}"


TINY = tiny("moco")


def arguments(extra="", method="moco"):
    """Parsed flags of a tiny run on digits, and whatever `extra` adds or overrides."""
    return main_cssl.parse_arguments(f"{tiny(method)} {extra}".split())


def settled(extra="", method="moco", process=CPU):
    """The same with all that they leave open settled; and (train, probe, test, tasks)."""
    args = arguments(extra, method)
    train, probe, test, tasks = main_cssl.build_data(args, process)
    main_cssl.resolve(args, process, train, test, tasks)
    return args, (train, probe, test, tasks)


def run(flags, script=main_cssl):
    """Runs the script's main in this process, and leaves it its own handlers of signals; its exit status.
    Flags are one string."""
    words = ["--device", "cpu"] * (script is main_linear) + flags.split()
    try:
        args = script.parse_arguments(words)
        other = words if script is main_linear else Stop("program")
        return distributed.report_errors(lambda: script.main(args, other), "program")
    except SystemExit as ended:
        return ended.code
    finally:
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)


def fails(capsys, flags, *names, script=main_cssl):
    """Bad input: status 2, and one line that names the flags or files that are wrong."""
    capsys.readouterr()
    assert run(flags, script) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(error) == 1 and all(name in error[0] for name in names), error


def start(flags, script="main_cssl.py", launcher="", **options):
    """A script of the project in a process of its own, perhaps under torchrun with the launcher's flags."""
    torchrun = f"-m torch.distributed.run --monitor-interval 0.1 {launcher} --" if launcher else ""
    path = script if script.startswith("-m") else ROOT / script
    call = [sys.executable, *f"{torchrun} {path} {flags}".split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(call, cwd=ROOT, env=ENVIRONMENT, **pipes, **options)


def start_ranks(function, world, *args):
    """Calls function(rank, world, *args) in `world` processes and waits for them; raises where one of them
    does."""
    mp.start_processes(function, (world, *args), nprocs=world, start_method="forkserver")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ranks_of(job):
    """{rank: process id} of a torchrun's children that train."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as status, open(f"/proc/{pid}/environ", "rb") as environment:
                parent = int(status.read().rpartition(")")[2].split()[1])
                variables = dict(line.partition(b"=")[::2] for line in environment.read().split(b"\0"))
        except OSError:  # it has ended
            continue
        if parent == job.pid and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(pid)
    return found


def outcome(folder):
    """What two equal runs have in common, to be compared with `same`: logs and results, byte for byte, and
    all weights."""
    networks = {path.name: torch.load(path) for path in folder.glob("task*.pt")}
    parts = ("backbone", "heads", "online")
    weights = {name: {p: net[p] for p in parts if p in net} for name, net in networks.items()}
    logs = [folder / name for name in ("metrics.jsonl", "results.json")]
    return weights | {path.name: path.read_bytes() for path in logs if path.exists()}


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def counters(folder):
    """What the newest readable checkpoint says, or None."""
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        try:
            return checkpoint.load(folder / name)["counters"]
        except Exception:  # not there yet, or being replaced
            continue
    return None


class Crash(BaseException):
    """Stands for a process that ends at once."""


def crash(monkeypatch, flags, when):
    """Runs with a crash right after the first checkpoint of which when(its Run) is true."""
    save = main_cssl.Run.save

    def save_and_crash(self):
        save(self)
        if when(self):
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(main_cssl.Run, "save", save_and_crash)
        run(flags)


@pytest.fixture(autouse=True)
def _as_found():
    """One thread, here and in ENVIRONMENT, so that all processes of a test compute the same bits; and no
    handler of a run's signals, which pools of processes that a test makes would inherit and never end."""
    torch.set_num_threads(1)
    assert HANDLERS == {number: signal.getsignal(number) for number in SIGNALS}
