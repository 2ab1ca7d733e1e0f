"""What users of torchrun rely on: one run whatever the number of machines, and elastic restarts."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, counters, outcome, run, same
from test_ranks import free_port

FLAGS = f"{TINY} --num_tasks 2 --lr 0.01 --epochs 1 --save_every 3 --batch_size 64"
TORCHRUN = "-m torch.distributed.run --monitor-interval 0.1"


def start(options, flags):
    call = [sys.executable, *f"{TORCHRUN} {options} -- {ROOT / 'main_cssl.py'} {flags}".split()]
    return subprocess.Popen(
        call, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Standard output and error of a job that must succeed."""
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out, error


def kill_in_second_task(job, rank, folder):
    while not ((c := counters(folder)) and c["task"] == 1 and c["step"] >= 3):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    os.kill(ranks_of(job)[rank], signal.SIGKILL)


def spoken(error):
    """The lines of a job's standard error that are main_cssl.py's own."""
    return [line for line in error.splitlines() if line.startswith("main_cssl.py:")]


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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished run of one torchrun with two processes."""
    folder = tmp_path_factory.mktemp("torchrun") / "two"
    finish(start("--standalone --nproc-per-node 2", f"{FLAGS} --out_dir {folder}"))
    return folder


def test_equals_one_process(two, tmp_path):
    """But for rounding in float32: tests/test_ranks.py compares closely."""
    assert run(f"{FLAGS} --out_dir {tmp_path}") == 0
    one, many = (torch.load(folder / "task1.pt")["backbone"] for folder in (tmp_path, two))
    for key, value in one.items():
        torch.testing.assert_close(many[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")
def test_elastic_restart(two, tmp_path):
    """One of two ranks is killed in the middle of PNR's task: torchrun starts both again, and the run ends
    with the same bits."""
    job = start("--standalone --nproc-per-node 2 --max-restarts 2", f"{FLAGS} --out_dir {tmp_path}")
    kill_in_second_task(job, 1, tmp_path)
    out, error = finish(job)
    assert "exitcode: -9" in error and len(spoken(error)) <= 1, error
    assert "resumed at task 1, epoch 0, step" in out
    assert same(outcome(tmp_path), outcome(two))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")
def test_two_machines(two, tmp_path):
    """Two torchruns that meet over the network end where one with two processes does, although a process of
    the second is killed: the restart counts of the two then differ."""
    meet = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()}"
    meet += " --rdzv-id x --max-restarts 2"
    jobs = [start(f"{meet} --local-addr localhost", f"{FLAGS} --out_dir {tmp_path}") for _ in range(2)]
    rank = 1
    while not any(rank in ranks_of(job) for job in jobs):
        assert all(job.poll() is None for job in jobs)
        time.sleep(0.1)
    kill_in_second_task(next(job for job in jobs if rank in ranks_of(job)), rank, tmp_path)
    outputs = [finish(job)[0] for job in jobs]
    assert any("resumed at task 1, epoch 0, step" in out for out in outputs)
    assert same(outcome(tmp_path), outcome(two))
