"""What scripts and users rely on: the flags, the run folder, and that one command gives one result."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import trees
from conftest import BASE, CPU, ROOT, TINY, arguments, crash, fails, outcome, run, same, settled, start, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_cssl
import main_linear
from losses import METHODS, REGULARIZERS
from utils import UserError, checkpoint
from utils.arguments import interval

FLAGS = """
--dataset --data_dir --download --probe_data_dir --domain_order --workers --cache --cache_size
--skip_corrupt --scenario --num_tasks --image_size --min_scale --blur_p --solarize_p --method --regularizer
--backbone --width --stem --init_from --epochs --batch_size --optimizer --lr --weight_decay --lr_schedule
--warmup_epochs --seed --device --precision --compile --eval --probe_lr --probe_views --probe_momentum
--online_probe --online_lr --out_dir --save_every --log_every --moco_hidden --moco_dim --moco_queue_size
--moco_tau --moco_tau_distill --moco_ema --predictor_hidden --teacher_bn --pnr_pseudo_negatives
""".split()
FINETUNE = f"{TINY} --num_tasks 2 --regularizer finetune"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished fine-tuning run of two tasks."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("runs") / "finetune"
    assert run(f"{FINETUNE} --out_dir {place}") == 0
    return place


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_flags_stay(capsys):
    """Removing or renaming a flag breaks somebody's script."""
    assert run("--help") == 0
    words = capsys.readouterr().out.replace("]", " ").split()
    assert [flag for flag in FLAGS if flag not in words] == []


def test_mistyped_flags(capsys):
    """The nearest one is named: of common flags before PyTorch is imported, of a method's own after it."""
    fails(capsys, "--epoch 3", "--epochs")
    fails(capsys, "--moco_taus 3", "--moco_tau")
    fails(capsys, "--run x --protocoll knn", "--protocol", script=main_linear)


@pytest.mark.parametrize("script", ["main_cssl.py", "main_linear.py", "data/check.py"])
def test_ctrl_c_while_starting(script):
    """One line, before and while PyTorch is imported."""
    flags = "--run nowhere" if "linear" in script else ""
    job = start(flags, "-m data.check" if "check" in script else script)
    while not handles_signals(job.pid):
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 130 and len(error.splitlines()) == 1 and "SIGINT" in error, error


@pytest.mark.parametrize("pause, saves", [(0, True), (1.2, False)])
def test_a_signal_that_comes_twice(pause, saves):
    """At once, from the terminal and from who hands it on, it does not keep the run from saving; a second
    one does."""
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    lines = f"with stop.deferred():\n {kill}\n time.sleep({pause})\n {kill}\n print('saved', flush=True)"
    code = f"import os, signal, time; from utils.stop import Stop; stop = Stop('run')\n{lines}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and done.stderr.count("SIGTERM") == 1, done.stderr
    assert ("saved" in done.stdout) == saves


@pytest.mark.parametrize("before, status", [("SIG_DFL", 128 + signal.SIGHUP), ("SIG_IGN", 0)])
def test_a_terminal_that_closes(before, status):
    """Ends a run, but not under nohup."""
    lines = f"signal.signal(signal.SIGHUP, signal.{before}); Stop('run'); os.kill(os.getpid(), signal.SIGHUP)"
    code = f"import os, signal; from utils.stop import Stop; {lines}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == status


def handles_signals(pid):
    """Whether the process has a handler of its own for SIGUSR1, as /proc says."""
    with open(f"/proc/{pid}/status") as status:
        caught = next(line for line in status if line.startswith("SigCgt"))
    return int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1


def test_run_folder(folder):
    names = {path.name.split(".out.")[0] for path in folder.iterdir() if path.name[0] != "."}
    assert names == set(
        "config.json metrics.jsonl speed.jsonl results.json accuracy_matrix.png accuracy_matrix.pdf task0.pt "
        "task1.pt last.pt last.prev.pt split.pt events".split()
    )
    config, found = json.loads((folder / "config.json").read_text()), results(folder)
    assert config["arguments"]["seed"] == 5 and None not in [
        config["arguments"][name] for name in ("lr", "optimizer", "image_size", "stem", "precision")
    ]
    assert {"torch", "torchvision", "numpy", "python"} <= config["versions"].keys()
    assert [len(row) for row in found["matrix"]] == [2, 2] and found["tasks"] == 2
    assert "k-NN" in found["protocol"] and found["average_accuracy"] == sum(found["matrix"][-1]) / 2 > 30
    assert found["plasticity"] is None and isinstance(found["forgetting"], float)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "epoch", "eval"}
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [(row["task"], row["epoch"]) for row in epochs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 < row["feature_std"] < 2 and row["loss"] == row["ssl"] > 0 for row in epochs)
    assert sorted(torch.cat(torch.load(folder / "split.pt")).tolist()) == list(range(1438))


def test_tensorboard_outlives_a_second_start(folder):
    def logged():
        events = EventAccumulator(str(folder), size_guidance={"images": 0})
        events.Reload()
        assert {"views", "accuracy_matrix", "collapse/spectrum"} <= set(events.Tags()["images"])
        assert [event.step for event in events.Scalars("accuracy/task0")] == [1, 2]
        names = ("train/loss", "train/lr", "epoch/ssl", "epoch/ema_tau", "epoch/feature_std")
        names += ("speed/images_per_second", "speed/data_wait_share", "eval/average_accuracy")
        return [[event.step for event in events.Scalars(name)] for name in names]

    before = logged()
    assert run(f"{FINETUNE} --out_dir {folder}") == 0 and logged() == before and len(before[-1]) == 2


def test_tensorboard_of_several_runs(folder, tmp_path, monkeypatch):
    """One that starts from another's first task lies over it; the table of runs begins with what they are;
    the projector has the class and the task of each test image."""
    trees.no_pictures(monkeypatch)
    call = f"{FINETUNE} --init_from {folder / 'task0.pt'} --embedding --out_dir {tmp_path / 'a'}"
    crash(monkeypatch, call, lambda state: state.finished == 1)
    assert run(call) == 0
    assert (tmp_path / "a" / "projector_config.pbtxt").read_text().count("tensor_path") == 2
    steps = []
    for path in (folder, tmp_path / "a"):
        events = EventAccumulator(str(path))
        events.Reload()
        steps.append([event.step for event in events.Scalars("epoch/loss")])
        assert {"collapse/feature_std", "accuracy/task1"} <= set(events.Tags()["scalars"])
    assert steps[1] == steps[0][2:] and len(steps[0]) == 4
    table = events.PluginTagToContent("hparams")["_hparams_/experiment"].decode(errors="replace")
    assert table.index("Method") < table.index("Seed") < table.index("lr") and "eval/forgetting" in table
    files = sorted((tmp_path / "a").glob("*/features/metadata.tsv"))
    assert len(files) == 2
    head, *rows = [line.split("\t") for line in files[0].read_text().splitlines()]
    tasks = settled("--num_tasks 2")[1][3]
    assert head == ["class", "task"] and len(rows) == sum(map(len, tasks.test))
    assert {(name, int(task)) for name, task in rows} == {
        (c, t) for t, own in enumerate(tasks.names) for c in own
    }


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination(method, regularizer, tmp_path, monkeypatch):
    """Two tasks train, and a run that crashes in the middle of the second one ends with the same bits as one
    that does not."""
    flags = f"{tiny(method)} --num_tasks 2 --regularizer {regularizer} --epochs 1 --batch_size 64 --eval none"
    flags += " --save_every 2"
    assert run(f"{flags} --out_dir {tmp_path / 'a'}") == 0
    crash(monkeypatch, f"{flags} --out_dir {tmp_path / 'b'}", lambda run: run.task == 1)
    saved = torch.load(tmp_path / "b" / "last.pt")["counters"]
    assert saved["task"] == 1 and 0 < saved["step"] < saved["global_step"]
    assert run(f"{flags} --out_dir {tmp_path / 'b'}") == 0
    assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))


def test_init_from_goes_on_like_the_run_itself(folder, tmp_path, capsys):
    """From its own task0.pt a run repeats the rest of itself, bit for bit; another seed gives another run,
    and neither the last task nor another split's first one is a beginning."""
    assert run(f"{FINETUNE} --init_from {folder / 'task0.pt'} --out_dir {tmp_path / 'a'}") == 0
    assert same(outcome(folder)["task1.pt"], outcome(tmp_path / "a")["task1.pt"])
    assert (folder / "results.json").read_text() == (tmp_path / "a" / "results.json").read_text()
    assert run(f"{FINETUNE} --seed 6 --epochs 1 --eval none --out_dir {tmp_path / 'b'}") == 0
    assert not same(outcome(folder)["task0.pt"], outcome(tmp_path / "b")["task0.pt"])
    fails(
        capsys,
        f"{FINETUNE} --seed 6 --init_from {folder / 'task0.pt'} --out_dir {tmp_path / 'c'}",
        "task0.pt",
    )
    fails(capsys, f"{FINETUNE} --init_from {folder / 'task1.pt'} --out_dir {tmp_path / 'c'}", "task1.pt")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("method, regularizer", [("moco", "pnr"), ("byol", "cassle")])
def test_a_run_that_is_continued(method, regularizer, tmp_path, capsys, monkeypatch):
    """Three tasks, and two more from their networks: ends as a run of five does, bit for bit, also where it
    crashes on the way."""
    trees.no_pictures(monkeypatch)
    (tmp_path / "order").write_text("\n".join("8305169274"))
    call = f"{tiny(method)} --regularizer {regularizer} --epochs 1 --class_order {tmp_path / 'order'}"
    call += " --task_sizes 1 2 4 2 1 --online_probe clean"
    assert run(f"{call} --out_dir {tmp_path / 'five'}") == 0
    three = tmp_path / "three"
    three.mkdir()
    for task in range(3):
        shutil.copy(tmp_path / "five" / f"task{task}.pt", three)
    for name, words in {"a": f"{three}", "b": f"{tmp_path / 'five' / 'task4.pt'} --start_task 3"}.items():
        flags = f"{call} --init_from {words} --out_dir {tmp_path / name}"
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # once task0.pt is there
            patch.setattr(main_cssl, "evaluate_task", lambda *_: 1 / 0)
            run(flags)
        crash(monkeypatch, flags, lambda state: state.task == (1 if name == "a" else 3))  # noqa: B023
        assert run(flags) == 0
        found, expected = (outcome(tmp_path / place) for place in (name, "five"))
        lines = [found.pop("metrics.jsonl").splitlines(), expected.pop("metrics.jsonl").splitlines()]
        assert same(found, expected)
        kept = (json.loads(line) for line in lines[1])
        kept = [x for x in kept if x["task"] >= 3 or x["kind"].startswith("eval")]
        assert [json.loads(line) for line in lines[0]] == kept
    flags = f"{call} --out_dir {tmp_path / 'c'} --init_from"
    fails(capsys, f"{flags} {three} --regularizer finetune", "--regularizer")
    fails(capsys, f"{flags} {three} --width 16", "--width")
    fails(capsys, f"{flags} {three} --seed 6", "--seed")
    fails(capsys, f"{flags} {three} --image_size 16 --start_task 2", "--image_size")
    fails(capsys, f"{flags} {three} --start_task 4", "task3.pt")
    shutil.copy(three / "task1.pt", three / "copy.pt")  # the file that is named, whatever it is called
    assert checkpoint.given(three / "copy.pt") == [three / "task0.pt", three / "copy.pt"]
    fails(capsys, f"{call} --out_dir {tmp_path / 'c'} --start_task 3", "--start_task")
    fails(capsys, f"{flags} {tmp_path}", "task0.pt")
    (tmp_path / "order").write_text("\n".join("8350169274"))
    fails(capsys, f"{flags} {three}", "task1.pt")
    (tmp_path / "order").write_text("8\n3")
    fails(capsys, f"{flags} {three}", "--class_order")
    assert not (tmp_path / "c").exists()


def test_pseudo_negatives_change_the_loss(folder, tmp_path):
    """More negatives, larger loss: of the main loss, of the regularisation, or of both."""
    first = {}
    for case in ("both", "main", "reg", "none"):
        flags = f"{TINY} --num_tasks 2 --epochs 1 --init_from {folder / 'task0.pt'} --eval none --log_every 1"
        assert run(f"{flags} --pnr_pseudo_negatives {case} --out_dir {tmp_path / case}") == 0
        row = json.loads((tmp_path / case / "metrics.jsonl").read_text().splitlines()[0])
        first[case] = row["ssl"], row["align"]
    (ssl, align), (no_ssl, no_align) = first["both"], first["none"]
    assert no_ssl < ssl and no_align < align
    assert first["main"] == (ssl, no_align) and first["reg"] == (no_ssl, align)


def test_products_are_in_full_precision_unless_told(tmp_path, monkeypatch):
    """In training only; and a run from before the flag goes on."""
    found, evaluate = [], main_cssl.evaluate_task
    note = lambda *words: found.append(torch.get_float32_matmul_precision())  # noqa: E731
    monkeypatch.setattr(main_cssl, "evaluate_task", lambda *words: note() or evaluate(*words))
    monkeypatch.setattr(main_cssl.Run, "end_epoch", lambda *_: note())
    call = f"{FINETUNE} --num_tasks 1 --epochs 1"
    assert run(f"{call} --out_dir {tmp_path / 'a'} --loss_precision bf16") == 0
    assert run(f"{call} --out_dir {tmp_path / 'b'}") == 0 and found == ["medium", *["highest"] * 3]
    state = torch.load(tmp_path / "b" / "last.pt")
    del state["arguments"]["loss_precision"]
    torch.save(state, tmp_path / "b" / "last.pt")
    assert run(f"{call} --out_dir {tmp_path / 'b'}") == 0


def test_settings_are_settled_once():
    """By method, regulariser, length and data, where the flags leave them open."""
    args = main_cssl.parse_arguments(f"{BASE} --method byol --epochs 60".split())
    train, _, test, tasks = main_cssl.build_data(args, CPU)
    main_cssl.resolve(args, CPU, train, test, tasks)
    assert (args.lr, args.weight_decay, args.optimizer, args.warmup_epochs) == (1.0, 1e-5, "lars", 10)
    assert (args.lr_schedule, args.image_size, args.stem, args.precision) == ("epoch", 8, "cifar", "fp32")
    assert args.num_tasks == 5 and args.out_dir == "runs/digits-class5-byol-pnr-seed5"
    args, _ = settled("--epochs 6 --lr 0.3 --seed 6")
    assert (args.lr, args.lr_schedule, args.warmup_epochs) == (0.3, "step", 2) and "seed6" in args.out_dir
    used = {}
    for regularizer in ("cassle", "pnr"):
        for dataset in ("cifar100", "imagenet100", "imagenet", "domainnet"):
            args = arguments(f"--regularizer {regularizer} --dataset {dataset}")
            main_cssl.find(regularizer).resolve(args)
            used[regularizer, dataset] = args.teacher_bn
    on_large = {("pnr", d) for d in ("imagenet100", "imagenet", "domainnet")}
    assert {key for key, bn in used.items() if bn == "eval"} == on_large and set(used.values()) == {
        "eval",
        "batch",
    }
    assert interval("500") == (500, "steps") and interval("10m") == (600, "seconds") == interval("600s")


def test_bf16_trains(tmp_path):
    assert run(f"{TINY} --num_tasks 2 --epochs 1 --precision bf16 --out_dir {tmp_path}") == 0
    assert torch.load(tmp_path / "task1.pt")["backbone"]["conv1.weight"].dtype == torch.float32


@pytest.mark.parametrize("flags", ["", "--eval none"])
def test_collapse_is_told(flags, tmp_path, capsys):
    """Under an absurd rate: when projections collapse, when features have, at the end, and when the command
    is repeated; by the projections alone where nothing is evaluated."""
    flags = f"{FINETUNE} --lr 1e6 {flags} --out_dir {tmp_path}"
    assert run(flags) == 1
    told = capsys.readouterr()
    warnings = [line for line in told.err.splitlines() if line.startswith("warning:")]
    assert "feature_std" in warnings[0] and "collapsed in task 0:" in warnings[1]
    assert "collapsed in task 0, 1:" in warnings[-1] and "is complete" not in told.out
    assert run(flags) == 1 and "collapsed in task 0, 1:" in capsys.readouterr().err


def test_resume_needs_the_same_data(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "other")
    state = torch.load(tmp_path / "other" / "last.pt")
    state["data"]["digest"] += 1
    torch.save(state, tmp_path / "other" / "last.pt")
    fails(capsys, f"{FINETUNE} --out_dir {tmp_path / 'other'}", "other")
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / "other" / name).unlink()
    fails(capsys, f"{FINETUNE} --out_dir {tmp_path / 'other'}", "last.pt")


def test_a_diverged_probe_can_be_mended(tmp_path, capsys, monkeypatch):
    """The protocol may change while the matrix is empty; the networks are not lost."""
    flags = f"{TINY} --num_tasks 1 --epochs 1 --eval linear --out_dir {tmp_path}"
    probe, calls = main_cssl.evaluate.linear_probe, []

    def diverges(*args, **options):
        calls.append(0)
        if len(calls) == 2:
            raise UserError("the linear probe diverged at --probe_lr")
        return probe(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(main_cssl.evaluate, "linear_probe", diverges)
        fails(capsys, flags, "--probe_lr")
    assert run(f"{flags} --probe_lr 0.1") == 0
    assert "lr 0.1" in results(tmp_path)["protocol"] and len(results(tmp_path)["matrix"]) == 1
    fails(capsys, f"{flags} --probe_lr 0.2", "--probe_lr")
