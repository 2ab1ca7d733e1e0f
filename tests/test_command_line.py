"""What scripts and users rely on: the flags, the run folder, and that one command gives one result."""

import gc
import json
import shutil

import pytest
import torch
from conftest import TINY, arguments, run, tiny

import main_cssl
import main_linear
from losses import METHODS, REGULARIZERS
from utils import RunError
from utils.arguments import interval
from utils.compare import compare
from utils.run import Run

FLAGS = """
--dataset --data_dir --download --probe_data_dir --domain_order --workers --cache --cache_size --cache_dir
--skip_corrupt --scenario --num_tasks --image_size --min_scale --blur_p --solarize_p --method --regularizer
--backbone --width --stem --init_from --epochs --batch_size --optimizer --lr --weight_decay --lr_schedule
--warmup_epochs --seed --device --precision --compile --eval --probe_lr --probe_momentum --online_probe
--online_lr --out_dir --save_every --log_every --moco_hidden --moco_dim --moco_queue_size --moco_tau
--moco_tau_distill --moco_ema --predictor_hidden --teacher_bn --pnr_pseudo_negatives
""".split()


def networks_equal(a, b):
    a, b = torch.load(a), torch.load(b)
    return all(torch.equal(a[part][k], b[part][k]) for part in ("backbone", "heads") for k in a[part])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished fine-tuning run of two tasks."""
    place = tmp_path_factory.mktemp("runs") / "finetune"
    assert run(f"{TINY} --num_tasks 2 --regularizer finetune --out_dir {place}") == 0
    return place


def test_flags_stay(capsys):
    """Removing or renaming a flag breaks somebody's script."""
    with pytest.raises(SystemExit) as ended:
        main_cssl.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert [
        flag
        for flag in FLAGS
        if f"{flag} " not in text and f"{flag}]" not in text and f"{flag}\n" not in text
    ] == []


def test_run_folder(folder):
    names = {path.name.split(".out.")[0] for path in folder.iterdir()} - {".lock"}
    assert names == {"config.json", "metrics.jsonl", "results.json", "accuracy_matrix.png", "task0.pt",
                     "task1.pt", "last.pt",
                     "last.prev.pt", "split.pt", "events"}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["arguments"]["seed"] == 5
        and {"torch", "torchvision", "numpy", "python"} <= config["versions"].keys()
    )
    results = json.loads((folder / "results.json").read_text())
    assert (
        [len(row) for row in results["matrix"]] == [2, 2]
        and results["tasks"] == 2
        and "k-NN" in results["protocol"]
    )
    assert results["average_accuracy"] == sum(results["matrix"][-1]) / 2 > 30
    assert (
        results["plasticity"] is None
        and isinstance(results["forgetting"], float)
        and isinstance(results["forward_transfer"], float)
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "epoch", "eval"}
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [(line["task"], line["epoch"]) for line in epochs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 < line["feature_std"] < 2 and line["loss"] == line["ssl"] > 0 for line in epochs)


def test_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {f"train/{name}" for name in ("loss", "ssl", "lr", "ema_tau", "feature_std")}
    assert wanted | {"speed/images_per_second", "speed/data_wait_share", "eval/average_accuracy"} <= set(
        tags["scalars"]
    )
    assert {"views", "accuracy_matrix"} <= set(tags["images"])


class Crash(Exception):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination(method, regularizer, tmp_path, monkeypatch):
    """Two tasks train, and a run that crashes in the middle of the second one ends with the same bits as one
    that does not."""
    flags = f"{tiny(method)} --num_tasks 2 --regularizer {regularizer} --epochs 1 --batch_size 64 --eval none"
    flags += " --save_every 2"
    assert run(f"{flags} --out_dir {tmp_path / 'a'}") == 0

    def save_and_crash(self, **parts):
        save(self, **parts)
        if self.task == 1:
            raise Crash

    save = Run.save
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Run, "save", save_and_crash)
        run(f"{flags} --out_dir {tmp_path / 'b'}")
    gc.collect()  # the crashed run's lock
    saved = torch.load(tmp_path / "b" / "last.pt")["counters"]
    assert saved["task"] == 1 and 0 < saved["step"] < saved["global_step"]
    assert run(f"{flags} --out_dir {tmp_path / 'b'}") == 0
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()
    assert networks_equal(tmp_path / "a" / "task1.pt", tmp_path / "b" / "task1.pt")


def test_seed_changes_the_run(folder, tmp_path):
    assert run(f"{TINY} --num_tasks 2 --regularizer finetune --seed 6 --out_dir {tmp_path}") == 0
    assert not networks_equal(folder / "task0.pt", tmp_path / "task0.pt")


def test_init_from_goes_on_like_the_run_itself(folder, tmp_path):
    """From its own task0.pt a run repeats the rest of itself, bit for bit."""
    assert (
        run(
            f"{TINY} --num_tasks 2 --regularizer finetune --init_from {folder / 'task0.pt'} --out_dir "
            f"{tmp_path}"
        )
        == 0
    )
    assert networks_equal(folder / "task1.pt", tmp_path / "task1.pt")
    assert (folder / "results.json").read_text() == (tmp_path / "results.json").read_text()


@pytest.mark.parametrize("case", ["main", "reg", "none"])
def test_pseudo_negatives_change_the_loss(folder, tmp_path, case):
    losses = []
    for flag in ("both", case):
        out = tmp_path / flag
        start = f"{TINY} --num_tasks 2 --epochs 1 --init_from {folder / 'task0.pt'} --eval none --log_every 1"
        assert run(f"{start} --pnr_pseudo_negatives {flag} --out_dir {out}") == 0
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        losses.append((first["ssl"], first["align"]))
    (ssl, align), (other_ssl, other_align) = losses
    # more negatives, larger loss
    assert (other_ssl < ssl) == (case in ("reg", "none")) and (other_align < align) == (
        case in ("main", "none")
    )


def test_main_linear(folder, capsys):
    """The training run's protocol gives the training run's numbers; another one stands under its own name
    beside them."""
    before = json.loads((folder / "results.json").read_text())
    assert run(f"--run {folder} --protocol knn", script=main_linear) == 0
    assert run(f"--run {folder} --protocol linear --probe_lr 0.5", script=main_linear) == 0
    assert run(f"--run {folder} --protocol knn --label_fraction 0.1", script=main_linear) == 0
    after = json.loads((folder / "results.json").read_text())
    assert after["knn"] == before
    assert {k: after[k] for k in before} == before
    assert "lr 0.5" in after["linear"]["protocol"] and "10 % of the labels" in after["knn_0.1"]["protocol"]
    assert after["knn_0.1"]["matrix"] != after["knn"]["matrix"] != after["linear"]["matrix"]
    capsys.readouterr()
    assert run(f"--checkpoint {folder / 'task1.pt'} --protocol knn", script=main_linear) == 0
    assert ", ".join(f"{a:.2f}" for a in before["matrix"][1]) in capsys.readouterr().out


def test_compare(folder):
    text = compare([folder, folder])
    results = json.loads((folder / "results.json").read_text())
    blocks = 1 + sum(isinstance(block, dict) for block in results.values())  # those that main_linear.py added
    assert text.count("finetune") == 2 and text.count("A_T") == 2 * blocks
    assert f"A_T {results['average_accuracy']:.2f}" in text


def test_bf16_trains(tmp_path):
    assert run(f"{TINY} --num_tasks 2 --epochs 1 --precision bf16 --out_dir {tmp_path}") == 0
    assert torch.load(tmp_path / "task1.pt")["backbone"]["conv1.weight"].dtype == torch.float32


def test_teacher_bn():
    """auto is settled when the flags are read, so that config.json holds what is used."""
    used = {}
    for regularizer in ("cassle", "pnr"):
        for dataset in ("cifar100", "imagenet100", "imagenet", "domainnet"):
            used[regularizer, dataset] = arguments(
                f"--regularizer {regularizer} --dataset {dataset}"
            ).teacher_bn
    assert {key for key, bn in used.items() if bn == "eval"} == {
        ("pnr", d) for d in ("imagenet100", "imagenet", "domainnet")
    }
    assert set(used.values()) == {"eval", "batch"}
    assert arguments("--regularizer pnr --dataset domainnet --teacher_bn batch").teacher_bn == "batch"


def test_collapse_is_told(tmp_path, capsys):
    """Under an absurd rate: when projections collapse, when features have, at the end, and when the command
    is repeated."""
    flags = f"{TINY} --num_tasks 2 --regularizer finetune --lr 1e6 --out_dir {tmp_path}"
    assert run(flags) == 1
    told = capsys.readouterr()
    warnings = [line for line in told.err.splitlines() if line.startswith("warning:")]
    assert "(feature_std) fell" in warnings[0] and warnings[0].count("task 0") == 1
    assert "collapsed in task 0:" in warnings[1] and "collapsed in task 0, 1:" in warnings[-1]
    assert "is complete" not in told.out and "ended in a collapse" in told.out
    assert run(flags) == 1 and "collapsed in task 0, 1:" in capsys.readouterr().err


def test_collapse_is_told_without_evaluation(tmp_path, capsys):
    """There are no labels to see it by: the projections say it."""
    flags = f"{TINY} --num_tasks 2 --regularizer finetune --lr 1e6 --eval none --out_dir {tmp_path}"
    assert run(flags) == 1
    told = capsys.readouterr()
    assert "collapsed in task 0, 1:" in told.err.splitlines()[-1] and "is complete" not in told.out


def test_rows_are_told(tmp_path, capsys):
    """After each task its row, the mean, and those of a random network."""
    assert run(f"{TINY} --num_tasks 2 --epochs 1 --out_dir {tmp_path}") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    for task, row in enumerate(results["matrix"]):
        (line,) = [line for line in lines if line.startswith(f"after task {task}: accuracy (%)")]
        for part, values in zip(line.split(";"), (row, results["random_backbone"])):
            assert part.endswith(f"{values[0]:.2f} {values[1]:.2f}, mean {sum(values) / 2:.2f}")


def test_interval():
    assert (
        interval("500") == (500, "steps")
        and interval("10m") == (600, "seconds")
        and interval("90s") == (90, "seconds")
    )


def test_rerun_keeps_tensorboard(tmp_path):
    """A second start of a finished run, and a resumed one, lose no point of what was logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps():
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return [
            [event.step for event in events.Scalars(tag)] for tag in ("eval/average_accuracy", "epoch/loss")
        ]

    flags = f"{TINY} --num_tasks 2 --epochs 1 --out_dir {tmp_path}"
    assert run(flags) == 0
    before = steps()
    assert len(before[0]) == 2 and run(flags) == 0 and steps() == before


def test_main_linear_refuses_what_is_not_the_runs(folder, tmp_path, capsys):
    assert run(f"--run {folder} --protocol knn --num_tasks 10", main_linear) == 2
    assert "--num_tasks 10" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "gap")
    (tmp_path / "gap" / "task0.pt").unlink()
    assert run(f"--run {tmp_path / 'gap'} --protocol knn", main_linear) == 2


def test_resume_needs_the_same_data_and_init_from_the_same_task(folder, tmp_path, capsys):
    assert run(f"{TINY} --num_tasks 2 --seed 6 --init_from {folder / 'task0.pt'} --out_dir {tmp_path}") == 2
    assert run(f"{TINY} --num_tasks 2 --init_from {folder / 'task1.pt'} --out_dir {tmp_path}") == 2
    assert capsys.readouterr().err.count("first task") == 2 and not any(tmp_path.iterdir())
    shutil.copytree(folder, tmp_path / "other")
    state = torch.load(tmp_path / "other" / "last.pt")
    state["data"]["digest"] += 1
    torch.save(state, tmp_path / "other" / "last.pt")
    assert run(f"{TINY} --num_tasks 2 --regularizer finetune --out_dir {tmp_path / 'other'}") == 2
    assert "other data" in capsys.readouterr().err
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / "other" / name).unlink()
    assert run(f"{TINY} --num_tasks 2 --regularizer finetune --out_dir {tmp_path / 'other'}") == 2
    assert "holds networks of a run but no last.pt" in capsys.readouterr().err


def test_a_diverged_probe_can_be_mended(tmp_path, capsys):
    """The protocol may change while the matrix is empty; the networks are not lost."""
    flags = f"{TINY} --num_tasks 1 --epochs 1 --eval linear --out_dir {tmp_path}"
    linear_probe = main_cssl.evaluate.linear_probe
    calls = []

    def diverges(*args, **options):
        calls.append(0)
        if len(calls) == 2:
            raise RunError("the linear probe diverged")
        return linear_probe(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_cssl.evaluate, "linear_probe", diverges)
        assert run(flags) == 2
    gc.collect()
    assert run(f"{flags} --probe_lr 0.1") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert "lr 0.1" in results["protocol"] and len(results["matrix"]) == 1
    assert run(f"{flags} --probe_lr 0.2") == 2
