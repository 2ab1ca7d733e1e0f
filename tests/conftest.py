"""What the tests share: tiny settings, and the command line run in this process or in one of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import main_cssl
from losses import METHODS
from utils import checkpoint
from utils.run import STOP_SIGNALS

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
BASE = "--backbone resnet10 --width 4 --image_size 8 --batch_size 32 --epochs 2 --log_every 3 --eval knn"
BASE += " --device cpu"


def tiny(method):
    """Flags of a tiny run on digits with that method."""
    return f"{BASE} --method {method} {METHODS[method].small}"


TINY = tiny("moco")


def arguments(extra="", method="moco"):
    """Parsed flags of a tiny run on digits, and whatever `extra` adds or overrides."""
    return main_cssl.parse_arguments(f"{tiny(method)} {extra}".split())


def command(script, flags, **options):
    """Runs a script of the project in a process of its own; flags is one string."""
    call = [sys.executable, *([script] if script == "-m" else [str(ROOT / script)]), *flags.split()]
    return subprocess.run(
        call, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, **options
    )


mp.get_context("forkserver").set_forkserver_preload(
    ["main_cssl"]
)  # imported once for all processes that the tests start


def start_ranks(function, world, *args):
    """Calls function(rank, world, *args) in `world` processes and waits for them; raises where one of them
    does."""
    mp.start_processes(function, (world, *args), nprocs=world, start_method="forkserver")


def run(flags, script=main_cssl):
    """Runs the script's main in this process; its exit status. Flags are one string."""
    return main_cssl.report_errors(lambda: script.main(script.parse_arguments(flags.split())), "program")


def outcome(folder):
    """What two equal runs have in common, to be compared with `same`: logs and results, byte for byte, and
    all weights."""
    networks = {path.name: torch.load(path) for path in folder.glob("task*.pt")}
    parts = {
        name: {part: network[part] for part in ("backbone", "heads")} for name, network in networks.items()
    }
    return parts | {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "results.json")}


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


@pytest.fixture(autouse=True)
def _as_found():
    """One thread, here and in ENVIRONMENT, so that all processes of a test compute the same bits; and
    pytest's signals back."""
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
