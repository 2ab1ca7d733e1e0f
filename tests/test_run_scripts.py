"""The run scripts hold the papers' settings, and reach the end with nothing pasted by hand."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import trees
from conftest import ENVIRONMENT, ROOT

import main_cssl
from losses import METHODS

SMALL = "--probe_views cached --device cpu --backbone resnet10 --width 4 --image_size 8"
SMALL += " --epochs 1 --batch_size 4 --moco_queue_size 16 --moco_hidden 16"


def script(name, *arguments, cwd=ROOT, **environment):
    call = ["bash", str(ROOT / name), *arguments]
    return subprocess.run(
        call, cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=240
    )


def settings(name, *arguments, **environment):
    """What main_cssl.py makes of the script's flags."""
    done = script(name, *arguments, PYTHON="echo", **environment)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    return main_cssl.parse_arguments(words[words.index("main_cssl.py") + 1 :])


OTHER = {"lr": {"moco": 0.6, "simclr": 0.4, "barlow": 0.4, "byol": 0.6, "vicreg": 0.4, "falcon": 1e-3}}
OTHER["probe_lr"] = {"moco": 3, "simclr": 1, "barlow": 0.1, "byol": 3, "vicreg": 0.3, "falcon": 0.1}
CIFAR = {
    **OTHER,
    "lr": {"moco": 0.6, "simclr": 0.6, "barlow": 0.4, "byol": 1.0, "vicreg": 0.3, "falcon": 1e-3},
}
LAMBDA_NEG = {  # of barlow, byol, vicreg
    ("run_cifar100.sh", "class"): (1, 0.5, 23),
    ("run_imagenet100.sh", "class"): (1, 1, 23),
    ("run_imagenet100.sh", "data"): (0.1, 0.1, 5),
    ("run_domainnet.sh", "domain"): (1, 1, 8),
}
EPOCHS = {"run_cifar100.sh": 500, "run_imagenet100.sh": 400, "run_domainnet.sh": 200}


@pytest.mark.parametrize("name, scenario", LAMBDA_NEG)
@pytest.mark.parametrize("method", METHODS)
def test_settings(name, scenario, method):
    args = settings(name, method, "pnr", SCENARIO=scenario)
    cifar = name == "run_cifar100.sh"
    assert (
        args.scenario == scenario
        and args.epochs == EPOCHS[name]
        and args.backbone == "resnet18"
        and args.width == 64
    )
    assert args.dataset in name.replace("run_", "") and args.method == method and args.regularizer == "pnr"
    assert args.batch_size == (64 if method == "falcon" else 256) and args.eval == "linear"
    assert (args.probe_views, args.online_probe) == (
        ("cached", "released") if cifar else ("augmented", "off")
    )
    assert args.weight_decay == (1e-5 if method == "byol" else 1e-4)
    for flag, values in (CIFAR if cifar else OTHER).items():
        assert getattr(args, flag) == values[method], flag
    views = (0.2, [0.0, 0.0] if cifar else [0.5, 0.5], [0.1, 0.1])
    if method != "vicreg":
        views = (0.08, [0.0, 0.0] if cifar else [1.0, 0.1], [0.0, 0.2])
    assert (args.min_scale, args.blur_p, args.solarize_p) == views
    for other, value in zip(("barlow", "byol", "vicreg"), LAMBDA_NEG[name, scenario]):
        if method == other:
            assert getattr(args, f"{other}_lambda_neg") == value
    rates = {"moco": 0.3, "simclr": 0.1, "barlow": 0.1, "byol": 0.1, "vicreg": 0.3, "falcon": 1e-3}
    assert args.online_lr == (0.3 if method in ("simclr", "barlow") and not cifar else rates[method])
    if method == "byol":
        assert args.byol_predictor_hidden == (4096 if cifar else 8192)


def test_choices(tmp_path):
    args = settings(
        "run_imagenet100.sh", "simclr", "cassle", "--epochs", "3", TASKS="10", SCENARIO="data", DATA="/d"
    )
    assert (args.num_tasks, args.scenario, args.data_dir, args.epochs) == (10, "data", "/d", 3)
    assert args.out_dir == "runs/imagenet100-data-10-simclr-cassle"
    assert (
        settings("run_domainnet.sh").out_dir == "runs/domainnet-moco-pnr"
        and settings("run_domainnet.sh").num_tasks is None
    )
    for name, words, variables in (
        ("run_imagenet100.sh", "SCENARIO=domain", {"SCENARIO": "domain"}),
        ("run_domainnet.sh", "GPUS=two", {"GPUS": "two"}),
    ):
        done = script(name, PYTHON="echo", **variables)
        assert done.returncode == 2 and done.stderr.startswith(f"{name}: error:") and words in done.stderr
    done = script("run_domainnet.sh", "dino", PYTHON=sys.executable)
    assert done.returncode == 2 and "dino" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["run_imagenet100.sh", "run_domainnet.sh"])
def test_to_the_end(name, tmp_path):
    """From made-up files to the offline linear probe's matrix."""
    if "imagenet" in name:
        wanted = (ROOT / "data" / "imagenet100_classes.txt").read_text().split()
        trees.imagenet(tmp_path / "data", wanted, train=1)
    else:
        trees.domainnet(tmp_path / "data")
    done = script(
        name, "moco", "finetune", *SMALL.split(), cwd=tmp_path, PYTHON=sys.executable, DATA="data", OUT="run"
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "offline linear probe" in results["protocol"] and len(results["matrix"]) == (
        5 if "imagenet" in name else 6
    )


@pytest.fixture
def cluster(tmp_path):
    """Starts a job of slurm/cssl.sbatch with stand-ins for SLURM's commands and for Python, which waits for
    SIGTERM."""
    stand_ins = {
        # like SLURM's own it hands SIGUSR1 on, and at SIGTERM kills
        "srun": 'while [[ $1 == -* ]]; do shift; done; "$@" & trap "kill -USR1 $!" USR1; '
        'trap "kill -KILL $!" TERM\n'
        "wait $!; wait $!",
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" > {tmp_path}/requeued',
        "python": f'echo $$ > {tmp_path}/pid; echo "$@" > {tmp_path}/calls; '
        'trap "sleep 0.2; echo saved; exit 138" USR1 TERM; '
        "while sleep 0.05; do :; done",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def submit(index, *arguments, **environment):
        job = {
            "SLURM_JOB_ID": "70007",
            "SLURM_JOB_NODELIST": "x",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        }
        job |= {
            "SLURM_ARRAY_TASK_ID": str(index),
            "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}",
            "PYTHON": "python",
        }
        call = ["bash", str(ROOT / "slurm" / "cssl.sbatch"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(call, cwd=ROOT, env={**ENVIRONMENT, **job, **environment}, **pipes)

    return submit


def test_slurm_saves_and_requeues(cluster, tmp_path):
    """Every run of the array has its own folder, method, regulariser and seed; when time is up it saves and
    is queued again. SIGTERM comes to all processes, and it is SLURM that queues the job again."""
    for number, index in ((signal.SIGUSR1, 0), (signal.SIGTERM, 11)):
        job = cluster(index, "--epochs", "3", SEEDS="5 6", METHODS="moco byol")
        while not (tmp_path / "calls").exists():
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.01)
        time.sleep(0.3)  # until Python's stand-in is ready for signals
        job.send_signal(number)
        if number == signal.SIGTERM:
            os.kill(int((tmp_path / "pid").read_text()), number)
        out, error = job.communicate(timeout=60)
        assert job.returncode == 138 and "saved" in out, (job.returncode, error)
        words = (tmp_path / "calls").read_text().split()
        (tmp_path / "calls").unlink()
        launcher, flags = words[: words.index("main_cssl.py")], words[words.index("main_cssl.py") + 1 :]
        assert (
            "--nnodes 2" in " ".join(launcher)
            and "localhost:50007" in launcher
            and launcher[launcher.index("--nproc_per_node") + 1] == "4"
        )
        args = main_cssl.parse_arguments(flags)
        wanted = ("moco", "finetune", 5) if index == 0 else ("byol", "pnr", 6)
        assert (args.method, args.regularizer, args.seed, args.epochs) == (*wanted, 3)
        assert args.out_dir.endswith("runs/cifar100-{}-{}-seed{}".format(*wanted))
        if number == signal.SIGUSR1:
            assert (tmp_path / "requeued").read_text().split() == ["requeue", "70007"]
            (tmp_path / "requeued").unlink()
    assert not (tmp_path / "requeued").exists()
    for index in (18, -1):
        job = cluster(index)
        _, error = job.communicate(timeout=60)
        assert job.returncode == 2 and "--array=0-17" in error
