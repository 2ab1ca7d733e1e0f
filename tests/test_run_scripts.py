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
from losses import METHODS, find

SMALL = "--probe_views cached --device cpu --backbone resnet10 --width 8 --image_size 8"
SMALL += " --epochs 1 --batch_size 4 --moco_queue_size 16 --moco_hidden 16"


def script(name, *arguments, cwd=ROOT, **environment):
    call, pipes = ["bash", str(ROOT / name), *arguments], {"capture_output": True, "text": True}
    return subprocess.run(call, cwd=cwd, env={**ENVIRONMENT, **environment}, timeout=240, **pipes)


def settings(name, *arguments, **environment):
    """What main_cssl.py makes of the script's flags."""
    done = script(name, *arguments, PYTHON="echo", **environment)
    assert done.returncode == 0, done.stderr
    return main_cssl.parse_arguments(done.stdout.partition("main_cssl.py")[2].split())


# by script and scenario: epochs, and lambda_neg of barlow, byol, vicreg
TABLES = {
    ("run_cifar100.sh", "class"): (500, {"barlow": 1, "byol": 0.5, "vicreg": 23}),
    ("run_imagenet100.sh", "class"): (400, {"barlow": 1, "byol": 1, "vicreg": 23}),
    ("run_imagenet100.sh", "data"): (400, {"barlow": 0.1, "byol": 0.1, "vicreg": 5}),
    ("run_domainnet.sh", "domain"): (200, {"barlow": 1, "byol": 1, "vicreg": 8}),
}
# by method: lr for CIFAR and for the others; probe_lr for the others; online_lr for both
RATES = {
    "moco": (0.6, 0.6, 3, 0.3, 0.3),
    "simclr": (0.6, 0.4, 1, 0.1, 0.3),
    "barlow": (0.4, 0.4, 0.1, 0.1, 0.3),
    "byol": (1.0, 0.6, 3, 0.1, 0.1),
    "vicreg": (0.3, 0.4, 0.3, 0.3, 0.3),
    "falcon": (1e-3, 1e-3, 0.1, 1e-3, 1e-3),
}


@pytest.mark.parametrize("name, scenario", TABLES)
@pytest.mark.parametrize("method", METHODS)
def test_settings(name, scenario, method):
    args, cifar = settings(name, method, "pnr", SCENARIO=scenario), name == "run_cifar100.sh"
    for flag in ("lr", "weight_decay", "probe_lr", "online_lr"):  # what the script leaves to the method
        setattr(
            args, flag, getattr(find(method), flag) if getattr(args, flag) is None else getattr(args, flag)
        )
    epochs, lambda_neg = TABLES[name, scenario]
    assert (args.scenario, args.epochs, args.backbone, args.width) == (scenario, epochs, "resnet18", 64)
    assert (args.dataset, args.method, args.regularizer) == (name[4:-3], method, "pnr")
    assert args.batch_size == (64 if method == "falcon" else 256) and args.eval == "linear"
    assert (args.probe_views, args.online_probe) == (
        ("cached", "released") if cifar else ("augmented", "off")
    )
    assert args.weight_decay == (1e-5 if method == "byol" else 1e-4)
    lr, other_lr, probe_lr, online_lr, other_online_lr = RATES[method]
    assert args.lr == (lr if cifar else other_lr) and (cifar or args.probe_lr == probe_lr)
    assert args.online_lr == (online_lr if cifar else other_online_lr)
    views = (0.2, [0.0, 0.0] if cifar else [0.5, 0.5], [0.1, 0.1])
    if method != "vicreg":
        views = (0.08, [0.0, 0.0] if cifar else [1.0, 0.1], [0.0, 0.2])
    assert (args.min_scale, args.blur_p, args.solarize_p) == views
    if method in lambda_neg:
        assert getattr(args, f"{method}_lambda_neg") == lambda_neg[method]
    if method == "byol":
        assert args.byol_predictor_hidden == (4096 if cifar else 8192)


def test_choices(tmp_path):
    """Variables and flags arrive; relative paths are the caller's; a run's name is left to main_cssl.py, and
    so holds the seed; what is wrong is told in a line."""
    flags = ("simclr", "cassle", "--epochs", "3")
    args = settings("run_imagenet100.sh", *flags, TASKS="10", SCENARIO="data", DATA="/d", OUT="o")
    assert (args.num_tasks, args.scenario, args.epochs, args.method) == (10, "data", 3, "simclr")
    assert (args.data_dir, args.out_dir) == ("/d", "o")
    args = settings("run_domainnet.sh", "--init_from", "x/task0.pt")
    assert (args.init_from, args.out_dir, args.num_tasks) == ("x/task0.pt", None, None)
    assert settings("run_cifar100.sh", "byol", "finetune", REFERENCE="1").single_tasks
    assert settings("run_cifar100.sh", SCENARIO="data").scenario == "data"
    assert not args.single_tasks
    for name, words, variables in (
        ("run_imagenet100.sh", "SCENARIO=domain", {"SCENARIO": "domain", "PYTHON": "echo"}),
        ("run_domainnet.sh", "GPUS=two", {"GPUS": "two", "PYTHON": "echo"}),
        ("run_cifar100.sh", "PYTHON=false", {"PYTHON": "false"}),
    ):
        done = script(name, **variables)
        assert done.returncode == 2 and done.stderr.startswith(f"{name}: error:") and words in done.stderr
    done = script("run_domainnet.sh", "dino", PYTHON=sys.executable)
    assert done.returncode == 2 and "dino" in done.stderr and len(done.stderr.splitlines()) == 1


def test_environments(tmp_path):
    """`python` is used where it has PyTorch, as in an active environment; else a script says what to do."""
    for has_torch in (True, False):
        (tmp_path / "python").write_text(
            f"#!/bin/sh\n[ $1 = -c ] && exit {int(not has_torch)} || echo active $@\n"
        )
        (tmp_path / "python").chmod(0o755)
        for path in (
            "run_cifar100.sh",
            "scripts/launch.sh",
            "scripts/python.sh",
        ):  # without .venv beside them
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text((ROOT / path).read_text())
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": ""}
        done = script(tmp_path / "run_cifar100.sh", **environment)
        assert ("active" in done.stdout and "main_cssl.py" in done.stdout) == has_torch
        assert done.returncode == (0 if has_torch else 2) and len(done.stderr.splitlines()) == (not has_torch)


@pytest.mark.parametrize("name", ["run_imagenet100.sh", "run_domainnet.sh"])
def test_to_the_end(name, tmp_path):
    """From made-up files to the offline linear probe's matrix, with paths relative to where the caller is."""
    if "imagenet" in name:
        trees.fill(tmp_path / "data", "train val", trees.IMAGENET100, count=1)
    else:
        trees.domainnet(tmp_path / "data")
    variables = {"PYTHON": sys.executable, "DATA": "data", "OUT": "run"}
    done = script(name, "moco", "finetune", *SMALL.split(), cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "offline linear probe" in results["protocol"]
    assert len(results["matrix"]) == (5 if "imagenet" in name else 6)


@pytest.fixture
def cluster(tmp_path):
    """Starts a job of slurm/cssl.sbatch with stand-ins for SLURM's commands and for Python, which waits for
    SIGTERM."""
    stand_ins = {
        # like SLURM's own it hands SIGUSR1 on, and at SIGTERM kills
        "srun": "while [[ $1 == -* ]]; do shift; done; trap 'kill -USR1 $job' USR1; "
        "trap 'kill -KILL $job' TERM\n"
        '"$@" & job=$!\nwait $job; wait $job',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" > {tmp_path}/requeued',
        "python": '[ "$1" != -c ] || exit 0; '
        'trap "sleep 0.2; echo saved; exit 138" USR1 TERM; '  # before it says that it is there
        f'echo $$ > {tmp_path}/pid; echo "$@" > {tmp_path}/calls; '
        "while sleep 0.05; do :; done",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def submit(index, *arguments, **environment):
        job = {"SLURM_JOB_ID": "70007", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2"}
        job |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_ARRAY_TASK_ID": str(index), "PYTHON": "python"}
        job["PATH"] = f"{tmp_path}:{ENVIRONMENT['PATH']}"
        call = ["bash", str(ROOT / "slurm" / "cssl.sbatch"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(call, cwd=ROOT, env={**ENVIRONMENT, **job, **environment}, **pipes)

    return submit


def test_slurm_saves_and_requeues(cluster, tmp_path):
    """Each run of the array has its own folder, method, regulariser and seed; when time is up it saves and is
    queued again. SIGTERM comes to all processes, and it is SLURM that queues the job again."""
    for number, index in ((signal.SIGUSR1, 0), (signal.SIGTERM, 11)):
        job = cluster(index, "--epochs", "3", SEEDS="5 6", METHODS="moco byol")
        while not (tmp_path / "calls").exists():
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.01)
        job.send_signal(number)
        if number == signal.SIGTERM:
            os.kill(int((tmp_path / "pid").read_text()), number)
        out, error = job.communicate(timeout=60)
        assert job.returncode == 138 and "saved" in out, (job.returncode, error)
        launcher, _, flags = (tmp_path / "calls").read_text().partition("main_cssl.py")
        (tmp_path / "calls").unlink()
        for words in ("--nnodes 2", "localhost:50007", "--nproc_per_node 4"):
            assert words in launcher
        args = main_cssl.parse_arguments(flags.split())
        wanted = ("moco", "finetune", 5) if index == 0 else ("byol", "pnr", 6)
        assert (args.method, args.regularizer, args.seed, args.epochs) == (*wanted, 3)
        assert args.out_dir.endswith("runs/cifar100-{}-{}-seed{}".format(*wanted))
        if number == signal.SIGUSR1:
            assert (tmp_path / "requeued").read_text().split() == ["requeue", "70007"]
            (tmp_path / "requeued").unlink()
    assert not (tmp_path / "requeued").exists()
    job = cluster(2, "--epochs", "3", TABLE="ablation", SEEDS="5 6", METHODS="moco byol", RUNS=str(tmp_path))
    while not (tmp_path / "calls").exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    out, error = job.communicate(timeout=60)
    assert job.returncode == 138 and "== finetune-byol-seed5\nsaved" in out, (out, error)
    assert "--epochs 3" in (tmp_path / "calls").read_text() and (tmp_path / "requeued").exists()
    for index in (18, -1):
        _, error = (job := cluster(index)).communicate(timeout=60)
        assert job.returncode == 2 and "--array=0-17" in error


def test_table(tmp_path):
    """What is missing is run, from the fine-tuned first task; a cell that fails, or that the system kills, is
    named and the rest goes on; a cell of other settings, or without a reference, is not taken for one of
    these; the report ends it."""
    killer = (
        rf'case "$*" in *out_dir\ table/finetune-moco*) kill -9 $$ ;; *) exec {sys.executable} "$@" ;; esac'
    )
    (tmp_path / "python").write_text(f"#!/usr/bin/env bash\n{killer}\n")
    (tmp_path / "python").chmod(0o755)

    def table(python, **variables):
        common = {"PYTHON": python, "SMOKE": "1", "TASKS": "2", "RUNS": "table", "REGULARIZERS": "pnr"}
        return script("run_table.sh", "cifar100", "6", cwd=tmp_path, **common, **variables)

    done = table(tmp_path / "python", METHODS="moco byol")
    assert done.returncode == 1 and "failed: finetune-moco-seed6 (status 137)" in done.stderr
    assert "failed: pnr-moco-seed6 (status 2)" in done.stderr and "2 run(s) in 1 group(s)" in done.stdout
    config = json.loads((tmp_path / "table" / "pnr-byol-seed6" / "config.json").read_text())["arguments"]
    assert config["init_from"] == "table/finetune-byol-seed6/task0.pt" and config["seed"] == 6
    (tmp_path / "table" / "single-byol-seed6").mkdir()
    lines = [
        table("echo", METHODS="byol", **more).stdout for more in ({}, {"FLAGS": "--x"}, {"REFERENCE": "1"})
    ]
    assert [line.count("main_cssl.py") for line in lines] == [0, 2, 3]
    assert (
        lines[2].count("--single_tasks") == 1 and lines[2].count("--reference table/single-byol-seed6") == 2
    )
    for size in ("64", "128"):
        (tmp_path / "queue" / f"pnr-queue{size}-moco-seed6").mkdir(parents=True)
    variables = {"PYTHON": "echo", "SMOKE": "1", "RUNS": "queue", "SIZES": "64 128", "REFERENCE": "1"}
    queue = script("run_table.sh", "queue", "6", cwd=tmp_path, **variables).stdout
    assert queue.count("main_cssl.py") == 2 and "--single_tasks" not in queue  # which nothing would use
    for words in (("cifar",), ("cifar100", "five")):
        done = script("run_table.sh", *words, PYTHON=sys.executable)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_sequence(tmp_path):
    """A sequence that grows set by set, and the report with the sets' names."""
    trees.small(tmp_path / "data", classes=4, count=16)
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").touch()  # the caller's own
    flags = f"--width 8 --image_size 8 --batch_size 64 --device cpu {find('moco').small}"
    variables = {"PYTHON": sys.executable, "DATA": "data", "RUNS": "runs", "EPOCHS": "1 1", "JOINT": "1"}
    variables |= {"REGULARIZERS": "pnr", "FLAGS": flags}
    done = script("run_sequence.sh", "6", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert [len(row) for row in trees.results(tmp_path / "runs" / "pnr-2sets-seed6")["matrix"]] == [2, 2]
    assert "sequence cifar100 digits, domain-incremental, 2 tasks" in done.stdout
    assert "1 run(s) in 1 group(s)" in done.stdout
