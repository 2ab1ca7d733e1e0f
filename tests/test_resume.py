"""A run folder belongs to one run and one process, and what is saved in it is whole. tests/fault_campaign.py
disturbs runs."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, fails, outcome, run, same, start

from utils import UserError, checkpoint

RUN = f"{TINY} --num_tasks 2 --regularizer pnr --epochs 1 --save_every 2"


def test_folder_belongs_to_one_process_and_one_experiment(tmp_path, capsys):
    """A second process is refused while the first holds the folder, another experiment by the flag that
    differs; flags that change nothing may change, and a finished run is left as it is."""
    job, folder = start(f"{RUN} --out_dir {tmp_path / 'a'}"), tmp_path / "a"
    while not (folder / "last.pt").exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    job.send_signal(signal.SIGSTOP)  # lest it ends before the second begins
    try:
        fails(capsys, f"{RUN} --out_dir {folder}", str(folder))
    finally:
        job.send_signal(signal.SIGCONT)
    assert job.wait() == 0
    fails(capsys, f"{RUN} --out_dir {folder} --moco_tau 0.3", "--moco_tau")
    before = outcome(folder)
    assert run(f"{RUN} --out_dir {folder} --save_every 3") == 0 and same(outcome(folder), before)
    assert run(f"{RUN} --out_dir {tmp_path / 'b'}") == 0 and same(outcome(tmp_path / "b"), before)


def test_save_is_all_or_nothing(tmp_path):
    """A file-size limit stands for a full disk: one line, and the checkpoint before it still loads."""
    script = (
        "import resource, sys, torch; from utils import UserError, checkpoint\n"
        "path = sys.argv[1]; checkpoint.save(path, {'x': torch.ones(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save(path, {'x': torch.ones(1_000_000)}, path + '.prev')\n"
        "except UserError as error: print(error); sys.exit(2)\n"
    )
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stdout, done
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(10)) and os.listdir(tmp_path) == ["last.pt"]


def test_no_object_is_unpickled(tmp_path):
    """A checkpoint that would run code when unpickled is refused, and the code does not run."""

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"backbone": Malicious(), "heads": {}}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"io\.open.*weights_only=False"):
        checkpoint.read_network(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
