"""Which runs may be compared with which: run folders are read, put into groups, and made tables and figures
of."""

import json
import re
import statistics
import textwrap
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from data import OF_TASKS, set_names
from losses import METHODS, REGULARIZERS
from utils import LATER
from utils.metrics import kind_of

# arguments in which runs have to agree to be compared; a joint run has no tasks of its own
SETTING = ["dataset", *OF_TASKS, "epochs", "backbone", "width", "stem", "image_size", "val_split"]
# what changes no result, follows from the method, or is told by the protocol
ASIDE = "out_dir data_dir download cache device compile save_every log_every workers skip_corrupt reference"
ASIDE += " embedding start_task seed normalize method regularizer eval probe_lr probe_momentum probe_views"
ASIDE = {*f"{ASIDE} online_probe online_lr".split(), *SETTING}
IN_WORDS = "protocol dataset size normalize labels lr momentum views part reference network".split()
COLUMNS = {"average_accuracy": "A_T", "forgetting": "S", "plasticity": "P", "forward_transfer": "FT"}
NAMES = {"moco": "MoCo v2+", "simclr": "SimCLR", "byol": "BYOL", "vicreg": "VICReg", "barlow": "Barlow Twins"}
NAMES |= {"falcon": "FALCON", "finetune": "fine-tuning", "cassle": "CaSSLe", "pnr": "PNR"}
# A_T in CaSSLe's tables of fine-tuning and CaSSLe, class-incremental, 5 tasks (docs/METHODS.md, section 11);
# of PNR's own only second-hand figures are known
CIFAR = {"byol": (52.7, 62.2), "barlow": (54.3, 60.4), "moco": (47.3, 59.5), "simclr": (48.9, 58.3)}
IMAGENET = {"byol": (66.0, 66.4), "barlow": (63.1, 68.2), "moco": (62.0, 68.8), "simclr": (61.5, 68.0)}
PAPER = {"cifar100": CIFAR | {"vicreg": (51.5, 53.6)}, "imagenet100": IMAGENET | {"vicreg": (61.3, 64.8)}}
JOINT = {"barlow": 70.9, "byol": 70.5, "moco": 69.9, "vicreg": 68.5, "simclr": 65.8}  # CIFAR-100, solo-learn
OWN_TASK, RATE = re.compile(r"(task\d+\.pt|/)$"), re.compile(r"lr [\d.e+-]+(?=,)")
WEIGHTS = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors")
EACH = "lr of each method"


@dataclass
class Run:
    """A run folder that has been read. blocks: of results.json, by name, those of all tasks; partial: the
    names of others."""

    folder: Path
    args: dict
    blocks: dict
    partial: list

    @property
    def joint(self):
        return self.args["num_tasks"] == 1

    def setting(self):
        """What it has to agree in with others; of a folder its place, of a sequence its sets' names."""
        left_out = {*OF_TASKS, "epochs"} if self.joint else {"sequence"}
        found = {name: self.args.get(name) for name in SETTING if name not in left_out}
        sets = set_names(self.args.get("sequence"))
        sets += [self.args["data_dir"]] if found["dataset"] == "folder" else []
        return found | {"dataset": " ".join([found["dataset"], *sets])}

    def differs(self, name):
        """What else may set it apart from runs of its setting, as text. To start from another run's first
        task does not."""
        value = str(self.args.get(name))
        own = OWN_TASK.search(value) or not value.endswith(WEIGHTS)
        return "None" if name == "init_from" and own else value

    def protocols(self):
        """{caption: block}: what was evaluated, of each protocol the block that says most. The rate of the
        probe that a run was evaluated with is its method's, and stands behind the others."""
        found = {}
        own = [block["protocol"] for name, block in self.blocks.items() if "settings" not in block]
        for block in self.blocks.values():
            words, settings = block["protocol"], block.get("settings", {})
            if words in own or ("lr" in settings and settings["lr"] == self.args.get("probe_lr")):
                words = RATE.sub(EACH, words)
            more = {name: value for name, value in settings.items() if name not in IN_WORDS}
            more |= {"dataset": settings["dataset"]} if "rows" in block else {}
            size = settings.get("size", self.args["image_size"])
            more |= {"size": size} if size != self.args["image_size"] else {}
            caption = "; ".join([words, *(f"{name} {value}" for name, value in more.items())])
            known = lambda block: sum(block.get(name) is not None for name in COLUMNS)  # noqa: E731
            found[caption] = max(found.get(caption, block), block, key=known)
        return found

    def lines(self, name, *keys):
        """[(value of each key, ...)] of the epochs in metrics.jsonl or speed.jsonl, as far as they can be
        read."""
        try:
            lines, found = (self.folder / name).read_text().splitlines(), []
        except (OSError, UnicodeDecodeError):
            return []
        for line in lines:
            try:
                line = json.loads(line)
                if line["kind"] == "epoch":
                    found.append([float(line[key]) for key in keys])
            except (ValueError, LookupError, TypeError):
                continue
        return found


@dataclass
class Group:
    """Runs of one setting. grid: {(method, label): runs}; tables: of each protocol its caption and rows of
    cells, the header first; first: the setting of the first group."""

    setting: dict
    grid: dict
    tables: list
    first: dict

    @property
    def title(self):
        s, tasks = self.setting, []
        if "scenario" in s:
            tasks = [f"{s['scenario']}-incremental, {s['num_tasks']} tasks"]
        network = f"{s['backbone']} (width {s['width']}, {s['stem']} stem, {s['image_size']} px)"
        of = "of the last set" if s["dataset"].startswith("sequence") else "a task"
        epochs = [f"epochs {of}: {s['epochs']}"] if "epochs" in s else []
        return ", ".join([s["dataset"], *tasks, *epochs, network])

    @property
    def difference(self):
        """By what its setting differs from the first group's, in words; none for that itself."""
        both = {name: (self.setting[name], self.first[name]) for name in self.setting if name in self.first}
        words = [f"{name} {a} instead of {b}" for name, (a, b) in both.items() if a != b]
        return f"Differs from the first group: {textwrap.shorten(', '.join(words), 300)}." if words else ""


def read(folder):
    """The Run in a folder; raises ValueError that says why there is none to show."""
    folder = Path(folder)
    try:
        args = LATER | json.loads((folder / "config.json").read_text())["arguments"]
        tasks = range(args["num_tasks"])
        run = Run(folder, args, {}, [])
        run.setting(), [args[name] for name in ("method", "regularizer", "image_size", "seed")]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError("no run folder, or its config.json is damaged") from error
    try:
        results = json.loads((folder / "results.json").read_text())
        found = {"": results, **{name: b for name, b in results.items() if isinstance(b, dict)}}
        for name, block in found.items():
            if "matrix" in block or "rows" in block:
                matrix = block.get("matrix") or block["rows"]
                if len(matrix) < len(tasks):
                    what = name or "its own evaluation"
                    run.partial.append(f"{what} ({len(matrix)} of {len(tasks)} tasks)")
                    continue
                [[float(x) for x in row] for row in matrix], block["protocol"].strip()
                if "matrix" in block and not run.joint and {len(row) for row in matrix} != {len(tasks)}:
                    raise ValueError(name)
                run.blocks[name] = block
    except FileNotFoundError as error:
        raise ValueError("not evaluated yet") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("its results.json is damaged") from error
    if not run.blocks:
        raise ValueError(f"not finished: {', '.join(run.partial) or 'not evaluated yet'}")
    return run


def group(runs):
    """The Groups; joint runs stand in every one that they agree with, if there is none of as many epochs
    also in others."""
    groups = {}
    for run in sorted(runs, key=lambda run: run.joint):
        own = run.setting().items()
        fitting = [key for key in groups if run.joint and own <= json.loads(key).items()]
        equal = [key for key in fitting if json.loads(key)["epochs"] == run.args["epochs"]]
        for key in equal or fitting or [json.dumps(run.setting())]:
            groups.setdefault(key, []).append(run)
    settings = [*map(json.loads, groups)]
    grids = [cells(members, s.get("epochs")) for s, members in zip(settings, groups.values())]
    return [Group(s, grid, tables(s, grid), settings[0]) for s, grid in zip(settings, grids)]


def cells(runs, epochs):
    """{(method, label): runs}: a label is the regulariser, and by what else runs of it differ, but for the
    seed. epochs: of the group, of which those of a joint run may differ."""
    kinds, found = {}, {}
    for run in runs:
        kinds.setdefault((run.args["method"], kind_of(run.args)), []).append(run)
    order = [*METHODS], [*REGULARIZERS]
    place = lambda names, name: names.index(name) if name in names else len(names)  # noqa: E731
    for method, kind in sorted(kinds, key=lambda key: [*map(place, order, key), key]):
        members = kinds[method, kind]
        names = sorted({name for run in members for name in run.args} - ASIDE)
        differing = [name for name in names if len({run.differs(name) for run in members}) > 1]
        for run in members:
            others = [f"{name} {run.differs(name)}" for name in differing]
            others += [f"epochs {run.args['epochs']}"] if run.args["epochs"] != epochs else []
            label = ", ".join([NAMES.get(kind, kind), *others])
            found.setdefault((NAMES.get(method, method), label), []).append(run)
    return found


def tables(setting, grid):
    """Of each protocol: its caption, and rows of cells as text, the header first, without columns that are
    empty. Where a seed was run more than once, that is told."""
    found = {}
    for key, runs in grid.items():
        for run in runs:
            for caption, block in run.protocols().items():
                found.setdefault(caption, {}).setdefault(key, []).append((run.args["seed"], block))
    header, shown = ["method", "regulariser", *COLUMNS.values(), "seeds", "paper"], []
    for caption, rows in found.items():
        known, body = paper(setting, caption), []
        for key, pairs in rows.items():
            seeds, blocks = zip(*pairs)
            count = f"{len(set(seeds))}" + f" ({len(seeds)} runs)" * (len(set(seeds)) < len(seeds))
            final = ((b.get("matrix") or b["rows"])[-1] for b in blocks)
            means = [b | {"average_accuracy": statistics.mean(row)} for b, row in zip(blocks, final)]
            scores = (spread([b[name] for b in means if b.get(name) is not None]) for name in COLUMNS)
            body.append([*key, *scores, count, known.get(key, "")])
        words = exact(caption, [block for pairs in rows.values() for _, block in pairs])
        filled = [any(column) for column in zip(*body)]
        shown.append((words, [[*compress(line, filled)] for line in (header, *body)]))
        if table := each_task(rows, grid):
            what = "Accuracy (%) on each task: after training on it → after the last task. "
            shown.append((what + words, table))
    return shown


def each_task(rows, grid):
    """Rows of cells, the header first: what was reached on each task, and what is left of it at the end; of
    joint runs only the latter, where they were tested on each task. None for one task. rows: (seed, block) of
    each key of grid."""
    found = {key: [b["matrix"] for _, b in pairs if "matrix" in b] for key, pairs in rows.items()}
    tasks, body = max((len(m[0]) for matrices in found.values() for m in matrices), default=1), []
    for key, matrices in found.items():
        matrices = [m for m in matrices if len(m[0]) == tasks]
        if tasks > 1 and matrices and kind_of(grid[key][0].args) != "single tasks":
            own = ([m[k][k] for m in matrices if k < len(m) - 1] for k in range(tasks))
            end = ([m[-1][k] for m in matrices] for k in range(tasks))
            body.append([*key, *(" → ".join(filter(None, map(spread, pair))) for pair in zip(own, end))])
    names = set_names(next(iter(grid.values()))[0].args.get("sequence"))
    header = ["method", "regulariser", *(names or [f"task {k}" for k in range(tasks)])]
    return [header, *body] if body else None


def exact(caption, blocks):
    """A caption with the probe's rate in it, if that is one for all blocks."""
    words = {block["protocol"] for block in blocks}
    return caption.replace(RATE.sub(EACH, one := words.pop()), one) if len(words) == 1 else caption


def paper(setting, words):
    """{(method, label): A_T in the papers} for a setting and protocol of theirs."""
    online = words.startswith("online linear probe (released)")
    known = PAPER.get(setting["dataset"]) if online == (setting["dataset"] == "cifar100") else None
    theirs = known is not None and (setting["backbone"], setting["width"]) == ("resnet18", 64)
    if not theirs or not (online or words.startswith("offline linear probe:")):
        return {}
    five = setting.get("scenario") == "class" and setting.get("num_tasks") == 5
    found = {(NAMES[m], "joint"): f"{value:.1f}" for m, value in JOINT.items() if online}
    for method, values in known.items() if five else ():
        found |= {(NAMES[method], NAMES[r]): f"{x:.1f}" for r, x in zip(("finetune", "cassle"), values)}
    return found


def spread(values):
    """Mean and, of several, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}" if values else ""


def figures(grid):
    """(title, matplotlib figure) of a group: matrices, accuracy over tasks, S against P, loss and
    collapse."""
    from utils import plots

    found, shown, joint, runs = [], {}, {}, {}
    for key, own in grid.items():
        for run in own:
            runs[f"{', '.join(key)}, seed {run.args['seed']}"] = run
            for caption, block in run.protocols().items() if kind_of(run.args) != "single tasks" else ():
                if "matrix" in block:
                    matrices = joint if run.joint else shown
                    matrices.setdefault(caption, {}).setdefault(", ".join(key), []).append(block)
    if shown:  # of the protocol that most runs have; of two, the linear probe
        count = lambda item: (sum(map(len, item[1].values())), "linear" in item[0])  # noqa: E731
        caption, cells = max(shown.items(), key=count)
        both = cells | joint.get(caption, {})
        seeds = {name: [block["matrix"] for block in blocks] for name, blocks in both.items()}
        caption = exact(caption, [block for blocks in cells.values() for block in blocks])
        means = {name: np.mean(seeds[name], axis=0).tolist() for name in cells}
        names = set_names(next(iter(runs.values())).args.get("sequence"))
        found.append((f"Accuracy matrices, mean over seeds. {caption}", plots.plot_matrices(means, names)))
        methods, random, tasks = {}, {}, max(len(matrix[0]) for matrix in means.values())
        for method, label in grid:  # a joint run may have been tested on all tasks as one
            if tasks in (len(matrix[0]) for matrix in seeds.get(f"{method}, {label}", ())):
                methods.setdefault(method, {})[label] = seeds[f"{method}, {label}"]
        for method, of_label in methods.items():
            blocks = [block for label in of_label for block in both[f"{method}, {label}"]]
            rows = [block.get("random_backbone") or () for block in blocks]
            if rows := [row for row in rows if len(row) == tasks]:
                random[method] = np.mean(rows, axis=0)
        found.append((f"Accuracy on each task. {caption}", plots.plot_tasks(methods, random, names)))
        seen = {name: [statistics.mean(row[: t + 1]) for t, row in enumerate(m)] for name, m in means.items()}
        curves = {name: (range(len(row)), row) for name, row in seen.items()}
        labels = "after training task", "mean accuracy on the tasks so far (%)"
        found.append((f"Accuracy over tasks. {caption}", plots.plot_curves(curves, *labels)))
        scores = {name: [(b.get("forgetting"), b.get("plasticity")) for b in cells[name]] for name in cells}
        points = {name: [pair for pair in own if None not in pair] for name, own in scores.items()}
        if points := {name: tuple(zip(*pairs)) for name, pairs in points.items() if pairs}:
            what = f"Forgetting S against plasticity P. {caption}"
            found.append((what, plots.plot_curves(points, "S", "P", points=True)))
    watched = {"loss": "Loss, mean of an epoch", "feature_std": "Standard deviation of projections"}
    for name, what in watched.items():
        curves = {label: run.lines("metrics.jsonl", "step", name) for label, run in runs.items()}
        if curves := {label: tuple(zip(*pairs)) for label, pairs in curves.items() if pairs}:
            found.append((what, plots.plot_curves(curves, "step", what)))
    return found


def costs(grid):
    """The table of what the runs cost, the header first; no rows where nothing was logged."""
    rows = [["method", "regulariser", "seed", "images/s", "minutes", "GPU GiB"]]
    for key, runs in grid.items():
        for run in runs:
            if epochs := run.lines("speed.jsonl", "images_per_second", "seconds"):
                speeds, seconds = zip(*epochs)
                memory = max(run.lines("speed.jsonl", "gpu_memory_gib"), default=[])
                values = statistics.median(speeds), sum(seconds) / 60, *memory
                rows.append([*key, str(run.args["seed"]), *(f"{value:.4g}" for value in values)])
    return [row + [""] * (6 - len(row)) for row in rows]
