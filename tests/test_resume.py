"""A run folder belongs to one run and one process, and what is saved in it is whole. tests/fault_campaign.py
disturbs runs."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, outcome, run, same

from utils import RunError, checkpoint

RUN = f"{TINY} --num_tasks 2 --regularizer pnr --epochs 1 --save_every 2"


def start(folder):
    call = [sys.executable, str(ROOT / "main_cssl.py"), *RUN.split(), "--out_dir", str(folder)]
    return subprocess.Popen(
        call, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_until(process, reached):
    """Returns as soon as reached() is true; fails if the process ends first."""
    for _ in range(60000):
        if reached():
            return
        assert process.poll() is None, f"the run ended too early: {process.stderr.read()}"
        time.sleep(0.002)
    raise AssertionError("the run hangs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    assert run(f"{RUN} --out_dir {folder}") == 0
    return outcome(folder)


def test_folder_belongs_to_one_process_and_one_experiment(undisturbed, tmp_path, capsys):
    """A second process is refused while the first holds the folder; another experiment in the folder is
    refused by name."""
    process = start(tmp_path)
    wait_until(process, lambda: (tmp_path / "last.pt").exists())
    assert run(f"{RUN} --out_dir {tmp_path}") == 2
    error = capsys.readouterr().err
    assert "another process" in error and len(error.splitlines()) == 1
    assert process.wait() == 0
    assert run(f"{RUN} --out_dir {tmp_path} --moco_tau 0.3") == 2
    error = capsys.readouterr().err
    assert "--moco_tau 0.2" in error and len(error.splitlines()) == 1
    before = {path: path.read_bytes() for path in tmp_path.glob("task*.pt")}
    assert run(f"{RUN} --out_dir {tmp_path} --save_every 3") == 0
    assert before == {path: path.read_bytes() for path in tmp_path.glob("task*.pt")}
    assert same(outcome(tmp_path), undisturbed)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows if row["kind"] == "eval"] == [0, 1]


def test_save_is_all_or_nothing(tmp_path):
    """A file-size limit stands for a full disk: one line, and the checkpoint before it still loads."""
    script = (
        "import resource, sys, torch; from utils import RunError, checkpoint\n"
        "path = sys.argv[1]; checkpoint.save(path, {'x': torch.ones(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save(path, {'x': torch.ones(1_000_000)}, path + '.prev')\n"
        "except RunError as error: print(error); sys.exit(2)\n"
    )
    path = tmp_path / "last.pt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is intact" in done.stdout and "File too large" in done.stdout, done
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(10))
    assert sorted(os.listdir(tmp_path)) == ["last.pt"]


def test_no_object_is_unpickled(tmp_path):
    """A checkpoint that would run code when unpickled is refused, and the code does not run."""

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "evil.pt"
    torch.save({"backbone": Malicious(), "heads": {}}, path)
    with pytest.raises(RunError, match="objects"):
        checkpoint.read_network(path)
    assert not (tmp_path / "owned").exists()
