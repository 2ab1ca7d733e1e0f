"""From run folders to tables: what is compared, and what is said of folders that cannot be shown."""

import csv
import json
import statistics

import pytest
from conftest import fails

from utils import compare, report

WORDS = "offline linear probe: SGD"


def make(folder, matrix=((50.0, 0.0), (40.0, 60.0)), words=WORDS, **changes):
    """A finished run folder as main_cssl.py leaves it."""
    args = dict(method="moco", regularizer="pnr", dataset="cifar100", scenario="class", num_tasks=2, seed=5)
    args |= dict(epochs=2, backbone="resnet18", width=64, stem="cifar", image_size=32, batch_size=256, lr=0.6)
    args |= changes
    last = matrix[-1]
    block = {
        "matrix": matrix,
        "average_accuracy": sum(last) / len(last),
        "protocol": words,
        "plasticity": None,
    }
    block |= {"forgetting": matrix[0][0] - last[0] if len(matrix) > 1 else None, "forward_transfer": None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"arguments": args}))
    (folder / "results.json").write_text(json.dumps(block))
    epoch = {"kind": "epoch", "step": 3, "loss": 1.0, "feature_std": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(epoch) + "\n")
    speed = {"kind": "epoch", "images_per_second": 900.0, "seconds": 90.0}
    (folder / "speed.jsonl").write_text((json.dumps(speed) + "\n") * 2)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of PNR, one of CaSSLe, a joint run; one of other epochs; one that differs in the rate."""
    root = tmp_path / "runs"
    found = [make(root / "a"), make(root / "b", ((50.0, 0.0), (50.0, 70.0)), seed=6)]
    found += [
        make(root / "c", regularizer="cassle"),
        make(root / "j", ((80.0,),), regularizer="finetune", num_tasks=1),
    ]
    return [*found, make(root / "e", epochs=500), make(root / "l", regularizer="cassle", lr=0.3)]


def call(*words):
    return report.main(report.parse_arguments([str(word) for word in words]))


def test_tables(runs, tmp_path, capsys):
    call(*runs, "--text", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 + len(str(tmp_path))
    groups = compare.group([compare.read(run) for run in runs])
    assert [each.setting["epochs"] for each in groups] == [2, 500]
    grid = groups[0].grid
    assert [*grid] == [("MoCo v2+", name) for name in ("CaSSLe, lr 0.6", "CaSSLe, lr 0.3", "PNR", "joint")]
    (words, (_, *rows)), (each, (head, *lines)) = groups[0].tables
    spread, forgotten = f"55.00 ± {statistics.stdev([50, 60]):.2f}", f"5.00 ± {statistics.stdev([10, 0]):.2f}"
    assert words == WORDS and rows[2] == ["MoCo v2+", "PNR", spread, forgotten, "2"]
    fifty = f"50.00 ± 0.00 → 45.00 ± {statistics.stdev([40, 50]):.2f}"
    assert each.endswith(WORDS) and head[2:] == ["task 0", "task 1"]
    assert len(lines) == 3  # none of the joint run, which was not tested on each task
    assert [len(axes.containers) for axes in panels(grid)] == [3, 3]
    assert lines[2] == ["MoCo v2+", "PNR", fifty, f"65.00 ± {statistics.stdev([60, 70]):.2f}"]
    assert compare.costs(grid)[1] == ["MoCo v2+", "CaSSLe, lr 0.6", "5", "900", "3", ""]
    texts = [(tmp_path / "out" / name).read_text() for name in ("index.html", "tables.md", "tables.tex")]
    assert spread in out and spread in texts[0] and spread in texts[1] and r"55.00 $\pm$ 7.07" in texts[2]
    assert "epochs 500 instead of 2" in texts[0] and texts[0].count("data:image/png") >= 6
    assert "http" not in texts[0]  # nothing is fetched
    with open(tmp_path / "out" / "tables.csv") as file:
        lines = [*csv.DictReader(file)]
    assert len(lines) == len(runs) and {line["average_accuracy"] for line in lines} == {
        "50.0",
        "60.0",
        "80.0",
    }


def panels(grid):
    """Of the figure of the accuracy on each task."""
    return dict((title.split(".")[0], figure) for title, figure in compare.figures(grid))[
        "Accuracy on each task"
    ].axes


def test_each_task(tmp_path, capsys):
    """A row of panels for each method that was tested on each task; nothing is lost of a task where every
    network is trained on one alone; a table too wide for a terminal is told."""
    row = [10.0, 20.0, 30.0, 40.0, 50.0]
    runs = [
        make(tmp_path / f"{m}{s}", [row] * 5, num_tasks=5, method=m, seed=s)
        for m in ("moco", "byol")
        for s in (5, 6)
    ]
    runs.append(make(tmp_path / "joint", [[30.0]], method="simclr", regularizer="finetune", num_tasks=1))
    alone = {"num_tasks": 5, "regularizer": "finetune", "single_tasks": True}
    runs.append(make(tmp_path / "alone", [row] * 5, **alone))
    (group,) = compare.group([compare.read(run) for run in runs])
    (_, scores), (_, (_, *lines)) = group.tables
    assert len(scores) == 5 and [line[:2] for line in lines] == [["MoCo v2+", "PNR"], ["BYOL", "PNR"]]
    assert lines[0][2] == "10.00 ± 0.00 → 10.00 ± 0.00" and lines[0][-1] == "50.00 ± 0.00"
    assert [axes.get_title() for axes in panels(group.grid)[::5]] == ["MoCo v2+: task 0", "BYOL: task 0"]
    call(*runs, "--text")
    out = capsys.readouterr().out
    assert "too wide" in out and max(map(len, out.splitlines())) <= 100


def test_probed_afterwards(tmp_path):
    """By main_linear.py, each method at its own rate: one table, and the figure, whose titles name a random
    network's accuracy; at another rate a table of its own."""
    runs = []
    for method, lr in ("moco", 3.0), ("simclr", 1.0):
        runs.append(make(tmp_path / method, words="k-NN", method=method, probe_lr=lr))
        results = json.loads((runs[-1] / "results.json").read_text())
        for rate in {lr, 3.0}:
            block = {name: results[name] for name in ("matrix", "average_accuracy", "forgetting")}
            block |= {"protocol": f"{WORDS}, lr {rate}, 100 epochs", "random_backbone": [10.0 * rate, 5.0]}
            results[f"linear lr={rate}"] = block | {"settings": {"lr": rate}}
        (runs[-1] / "results.json").write_text(json.dumps(results))
    (group,) = compare.group([compare.read(run) for run in runs])
    scores = {words: [line[0] for line in table[1:]] for words, table in group.tables[::2]}
    both = ["SimCLR", "MoCo v2+"]
    expected = {"k-NN": both, f"{WORDS}, lr of each method, 100 epochs": both}
    assert scores == expected | {f"{WORDS}, lr 3.0, 100 epochs": ["SimCLR"]}
    random = [axes.get_title().partition("\n")[2] for axes in panels(group.grid)]
    assert random == [f"random network: {x}" for x in (10.0, 5.0, 30.0, 5.0)]


def test_where_a_run_began(tmp_path):
    """Seeds that continue first tasks of their own, wherever they lie, are one row; other weights are not."""
    starts = "runs/first-seed5", "runs/first-seed6/task0.pt", "runs/first-seed7/"
    found = [make(tmp_path / str(seed), seed=seed, init_from=x) for seed, x in enumerate(starts, 5)]
    found.append(make(tmp_path / "weights", seed=8, init_from="resnet18.pth"))
    (group,) = compare.group([compare.read(run) for run in found])
    assert [*map(len, group.grid.values())] == [3, 1] and "± 0.00" in group.tables[0][1][1][2]


def test_the_papers_figure(tmp_path):
    """Stands only beside numbers of its own benchmark and protocol."""
    row = [[0.0] * 5] * 5
    online = "online linear probe (released): learns"
    cases = {"on": (5, online, "59.5"), "off": (5, WORDS, ""), "two": (2, online, "")}
    for name, (tasks, words, expected) in cases.items():
        matrix = [line[:tasks] for line in row[:tasks]]
        run = compare.read(make(tmp_path / name, matrix, words, num_tasks=tasks, regularizer="cassle"))
        (group,) = compare.group([run])
        head, (*_, last) = group.tables[0][1]
        assert (head[-1], last) == (("paper", expected) if expected else ("seeds", "1"))


def test_only_like_is_compared_with_like(tmp_path, capsys):
    """The rate of its probe is a method's own; another data set, other settings of the protocol or of the run
    are not pooled; numbers from the middle of a run are not its last."""
    rates = {"a": ("moco", "0.6"), "b": ("byol", "1.0"), "c": ("byol", "1.0")}
    runs = [
        make(tmp_path / n, method=m, words=f"linear: SGD, lr {lr}, 100 epochs")
        for n, (m, lr) in rates.items()
    ]
    settings = {"settings": {"dataset": "svhn", "size": 32, "transfer": True}}
    more = {"svhn": {"protocol": f"linear: SGD, lr {0.6}, 100 epochs", "rows": [[1.0], [2.0]], **settings}}
    more["half"] = {"protocol": "knn", "matrix": [[1.0, 2.0]], "settings": {}}
    results = json.loads((runs[0] / "results.json").read_text())
    (runs[0] / "results.json").write_text(json.dumps(results | more))
    config = json.loads((runs[2] / "config.json").read_text())
    config["arguments"] |= {"precision": "fp16", "init_from": "imagenet.pt"}
    (runs[2] / "config.json").write_text(json.dumps(config))
    call(*runs, "--text")
    said = capsys.readouterr()
    (group,) = compare.group([compare.read(run) for run in runs])
    assert [len(table) - 1 for _, table in group.tables] == [3, 3, 1]
    assert "lr 0.6, " in compare.group([compare.read(runs[0])])[0].tables[0][0]
    assert "lr of each method" in said.out and "transfer True; dataset svhn" in said.out
    assert "init_from imagenet.pt" in said.out and "precision fp16" in said.out and "2.00" in said.out
    assert max(map(len, said.out.splitlines())) <= 100 and "half (1 of 2 tasks)" in said.err


def test_damage(runs, tmp_path, capsys):
    """Of one run hides no other; of lines in a log it costs these lines."""
    damage = {
        "config.json": lambda text: text.replace('"num_tasks": 2', '"num_tasks": "2"'),
        "results.json": lambda text: text.replace("70.0", "null", 1),
    }
    for folder, (name, change) in zip(runs, damage.items()):
        text = (folder / name).read_text()
        (folder / name).write_text(change(text))
        assert (folder / name).read_text() != text
    ragged = json.loads((runs[2] / "results.json").read_text())
    ragged["matrix"][1].append(0.0)
    (runs[2] / "results.json").write_text(json.dumps(ragged))
    for name in ("metrics.jsonl", "speed.jsonl"):
        with open(runs[4] / name, "a") as file:
            file.write('{"kind": "epoch"}\n{"kind": "epo')
    call(*runs, "--out", tmp_path / "out")
    said = capsys.readouterr()
    assert all(f"{folder}: " in said.err for folder in runs[:3]) and "3 run(s) in 2 group(s)" in said.out
    assert len(compare.read(runs[4]).lines("metrics.jsonl", "loss")) == 1
    assert "900" in (tmp_path / "out" / "index.html").read_text()


def test_what_cannot_be_shown_is_named(runs, tmp_path, capsys):
    (runs[0] / "config.json").write_text("{")
    (runs[1] / "results.json").write_text("[]")
    (runs[2] / "results.json").unlink()
    unfinished = make(tmp_path / "half", ((50.0, 0.0),))
    call(*runs, unfinished, tmp_path / "nothing", "--out", tmp_path / "out")
    page, said = (tmp_path / "out" / "index.html").read_text(), capsys.readouterr().err
    for name in [*runs[:3], unfinished, tmp_path / "nothing"]:
        assert f"{name}: " in page and f"{name}: " in said
    assert "1 of 2 tasks" in said and "a group" not in said

    class Script:
        parse_arguments, main = (
            staticmethod(report.parse_arguments),
            staticmethod(lambda args, _: report.main(args)),
        )

    fails(capsys, f"{tmp_path / 'nothing'} --text", "nothing", script=Script)
    fails(capsys, f"{runs[3]}", "--out", script=Script)
