"""What the tests share: tiny settings, and the command line run in this process or in one of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main_cssl

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--backbone resnet10 --width 4 --image_size 8 --batch_size 32 --epochs 2 --moco_queue_size 64 --moco_hidden 32 --moco_dim 16 "
    "--log_every 3 --eval knn --device cpu"
)


def arguments(extra="", tiny=TINY):
    """Parsed flags of a tiny run on digits, and whatever `extra` adds or overrides."""
    return main_cssl.parse_arguments(f"{tiny} {extra}".split())


def command(script, flags, **options):
    """Runs a script of the project in a process of its own; flags is one string."""
    call = [sys.executable, *([script] if script == "-m" else [str(ROOT / script)]), *flags.split()]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more threads only get in each other's way, and two test runs at once stay fast."""
    torch.set_num_threads(1)
