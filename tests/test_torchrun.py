"""What users of torchrun rely on: one run whatever the number of machines, and elastic restarts."""

import os
import signal
import time

import pytest
import torch
from conftest import TINY, counters, free_port, outcome, ranks_of, run, same, start

FLAGS = f"{TINY} --num_tasks 2 --lr 0.01 --epochs 1 --save_every 2 --batch_size 96 --moco_queue_size 96"
pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")


def finish(job):
    """Standard output and error of a job that must succeed."""
    out, error = job.communicate(timeout=240)
    assert job.returncode == 0, error
    return out, error


def kill_in_second_task(job, rank, folder):
    while not ((c := counters(folder)) and c["task"] == 1 and c["step"] >= 2):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    os.kill(ranks_of(job)[rank], signal.SIGKILL)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished run of one torchrun with two processes."""
    folder = tmp_path_factory.mktemp("torchrun") / "two"
    finish(start(f"{FLAGS} --out_dir {folder}", launcher="--standalone --nproc-per-node 2"))
    return folder


def test_equals_one_process(two, tmp_path):
    """But for rounding in float32: tests/test_ranks.py compares closely."""
    assert run(f"{FLAGS} --out_dir {tmp_path}") == 0
    one, many = (torch.load(folder / "task1.pt")["backbone"] for folder in (tmp_path, two))
    for key, value in one.items():
        torch.testing.assert_close(many[key], value, rtol=1e-2, atol=1e-3)


def test_two_machines(two, tmp_path):
    """Two torchruns that meet over the network end where one with two processes does, bit for bit, although a
    process of the second is killed in the middle of PNR's task: both start their process again, and of these
    at most one says that the other has gone."""
    meet = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()}"
    meet += " --rdzv-id x --max-restarts 2 --local-addr localhost"
    jobs = [start(f"{FLAGS} --out_dir {tmp_path}", launcher=meet) for _ in range(2)]
    while not any(1 in ranks_of(job) for job in jobs):
        assert all(job.poll() is None for job in jobs)
        time.sleep(0.1)
    kill_in_second_task(next(job for job in jobs if 1 in ranks_of(job)), 1, tmp_path)
    (out, error), (other_out, other_error) = map(finish, jobs)
    assert "resumed at task 1, epoch 0, step" in out + other_out and "exitcode: -9" in error + other_error
    assert sum(line.startswith("main_cssl.py:") for line in (error + other_error).splitlines()) <= 1, error
    assert same(outcome(tmp_path), outcome(two))
