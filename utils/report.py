"""From run folders to the tables and figures of a paper: one page, and the tables as Markdown, CSV and LaTeX.

examples:
    python -m utils.report runs/* --out report       (report/index.html, tables.md, tables.csv, tables.tex)
    python -m utils.report runs/* --text             (a table on the terminal)

Runs that differ in more than method, regulariser and seed stand in groups of their own.
"""

import csv
import html
import json
import statistics
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from losses import METHODS, REGULARIZERS
from utils.arguments import Parser
from utils.metrics import SCORES

# arguments in which runs have to agree to be compared; a joint run has no tasks of its own
SETTING = """dataset scenario num_tasks epochs backbone width stem image_size batch_size domain_order
    val_split""".split()
OF_TASKS = ("scenario", "num_tasks", "domain_order")
# what changes no result, follows from the method, or is told by the protocol
ASIDE = set("""out_dir data_dir download cache cache_size device compile save_every log_every workers
    skip_corrupt reference init_from seed normalize method regularizer precision eval probe_lr probe_momentum
    probe_views probe_data_dir online_probe online_lr""".split())  # fmt: skip
COLUMNS = {"average_accuracy": "A_T", "forgetting": "S", "plasticity": "P", "forward_transfer": "FT"}
NAMES = {"moco": "MoCo v2+", "simclr": "SimCLR", "byol": "BYOL", "vicreg": "VICReg", "barlow": "Barlow Twins"}
NAMES |= {"falcon": "FALCON", "finetune": "fine-tuning", "cassle": "CaSSLe", "pnr": "PNR"}
# A_T in the papers, docs/METHODS.md, section 11: class-incremental, 5 tasks, CaSSLe's tables
PAPER = {
    "cifar100": {"byol": (52.7, 62.2), "barlow": (54.3, 60.4), "moco": (47.3, 59.5), "simclr": (48.9, 58.3)},
    "imagenet100": {
        "byol": (66.0, 66.4),
        "barlow": (63.1, 68.2),
        "moco": (62.0, 68.8),
        "simclr": (61.5, 68.0),
    },
}
PAPER["cifar100"]["vicreg"], PAPER["imagenet100"]["vicreg"] = (51.5, 53.6), (61.3, 64.8)
JOINT = {
    "barlow": 70.9,
    "byol": 70.5,
    "moco": 69.9,
    "vicreg": 68.5,
    "simclr": 65.8,
}  # CIFAR-100, solo-learn's table
ABOUT = """A_T: average accuracy on all tasks after the last. S: forgetting, lower is better. P: plasticity.
FT: forward transfer. Mean ± standard deviation over seeds. Runs that must not be compared stand in groups."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1em; color: #222 }
table { border-collapse: collapse; white-space: nowrap } h2 { margin-top: 2em } .note { color: #a40000 }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) { text-align: left }
.wide { overflow-x: auto; margin: 0 0 1.5em } img { max-width: 100%; height: auto }
.small { font-size: 13px; color: #555; margin: 1em 0 .3em }
"""


@dataclass
class Run:
    """A run folder that has been read. blocks: of results.json, by name; epochs: the lines of metrics.jsonl
    of that kind; cost: what TensorBoard's events say, by name."""

    folder: Path
    args: dict
    blocks: dict
    epochs: list = field(default_factory=list)
    cost: dict = field(default_factory=dict)

    @property
    def joint(self):
        return self.args["num_tasks"] == 1

    def setting(self):
        return {name: self.args.get(name) for name in SETTING if not (self.joint and name in OF_TASKS)}


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of main_cssl.py")
    parser.add_argument(
        "--out", metavar="DIR", help="where index.html, tables.md, tables.csv and tables.tex go"
    )
    parser.add_argument("--text", action="store_true", help="tables on the terminal, in at most 100 columns")
    args = parser.parse_args(argv)
    if not args.out and not args.text:
        parser.error("pass --out DIR, --text, or both")
    return args


def read(folder):
    """The Run in a folder; raises ValueError that says why there is none to show."""
    folder = Path(folder)
    try:
        args = json.loads((folder / "config.json").read_text())["arguments"]
        assert all(name in args for name in ("method", "regularizer", "dataset", "num_tasks", "seed"))
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise ValueError("no run folder, or its config.json is damaged") from error
    try:
        results = json.loads((folder / "results.json").read_text())
        blocks = {"": results} if "matrix" in results else {}
        blocks |= {k: b for k, b in results.items() if isinstance(b, dict) and ("matrix" in b or "rows" in b)}
        finished = max(len(block.get("matrix") or block["rows"]) for block in blocks.values())
        assert all(block["protocol"] for block in blocks.values())
    except FileNotFoundError as error:
        raise ValueError("not evaluated yet") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError("its results.json is damaged") from error
    if finished < args["num_tasks"]:
        raise ValueError(f"not finished: {finished} of {args['num_tasks']} tasks")
    return Run(folder, args, blocks)


def read_curves(run):
    """Adds what metrics.jsonl and TensorBoard's events hold, as far as they can be read."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    try:
        lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        run.epochs = [line for line in lines if line["kind"] == "epoch"]
    except (OSError, ValueError, LookupError):
        run.epochs = []
    events = EventAccumulator(str(run.folder), {"scalars": 0, "images": 1, "tensors": 1}).Reload()
    tags = events.Tags()["scalars"]
    if "speed/images_per_second" in tags:
        speeds = events.Scalars("speed/images_per_second")
        run.cost["images/s"] = statistics.median(x.value for x in speeds)
        run.cost["minutes"] = (speeds[-1].wall_time - speeds[0].wall_time) / 60
    if "speed/gpu_memory_gib" in tags:
        run.cost["GPU GiB"] = max(x.value for x in events.Scalars("speed/gpu_memory_gib"))


def group(runs):
    """[(setting, {(method, label): runs})]: runs of one setting; joint runs stand in every group that they
    agree with."""
    groups = {}
    for run in runs:
        if not run.joint:
            groups.setdefault(json.dumps(run.setting()), []).append(run)
    for run in (run for run in runs if run.joint):
        own = run.setting().items()
        fitting = [key for key in groups if all(json.loads(key).get(name) == value for name, value in own)]
        for key in fitting or [json.dumps(run.setting())]:
            groups.setdefault(key, []).append(run)
    return [(json.loads(key), cells(members)) for key, members in groups.items()]


def cells(runs):
    """{(method, label): runs}: a label is the regulariser, and by what else runs of it differ, but for the
    seed."""
    kinds, found = {}, {}
    for run in runs:
        kind = (
            "joint"
            if run.joint
            else "single tasks"
            if run.args.get("single_tasks")
            else run.args["regularizer"]
        )
        kinds.setdefault((run.args["method"], kind), []).append(run)
    order = [*METHODS], [*REGULARIZERS]
    place = lambda names, name: names.index(name) if name in names else len(names)  # noqa: E731
    for method, kind in sorted(kinds, key=lambda key: [*map(place, order, key), key]):
        members = kinds[method, kind]
        names = sorted({name for run in members for name in run.args} - ASIDE - {*SETTING})
        differing = [name for name in names if len({str(run.args.get(name)) for run in members}) > 1]
        for run in members:
            label = ", ".join(
                [NAMES.get(kind, kind), *(f"{name} {run.args.get(name)}" for name in differing)]
            )
            found.setdefault((NAMES.get(method, method), label), []).append(run)
    return found


def tables(setting, grid):
    """For each protocol in words: (words, rows); a row: method, label, seeds, {column: values}, the paper's
    A_T."""
    found = {}
    for (method, label), runs in grid.items():
        for run in runs:
            blocks = {block["protocol"]: block for block in reversed(run.blocks.values())}  # one of a kind
            for words, block in reversed(blocks.items()):
                rows = found.setdefault(words, {})
                seeds, values = rows.setdefault((method, label), ([], {name: [] for name in COLUMNS}))
                seeds.append(run.args["seed"])
                scores = (
                    block if "matrix" in block else {"average_accuracy": statistics.mean(block["rows"][-1])}
                )
                for name in COLUMNS:
                    if scores.get(name) is not None:
                        values[name].append(scores[name])
    papers = {words: paper(setting, words) for words in found}
    return [
        (words, [(*key, seeds, values, papers[words].get(key)) for key, (seeds, values) in rows.items()])
        for words, rows in found.items()
    ]


def paper(setting, words):
    """{(method, label): A_T in the papers} for a setting and protocol of theirs."""
    online = words.startswith("online linear probe (released)")
    known = PAPER.get(setting["dataset"]) if online == (setting["dataset"] == "cifar100") else None
    if known is None or not (online or words.startswith("offline linear probe:")):
        return {}
    five = setting.get("scenario") == "class" and setting.get("num_tasks") == 5
    found = {(NAMES[m], "joint"): value for m, value in JOINT.items() if online}
    for method, values in known.items() if five else ():
        found |= {(NAMES[method], NAMES[r]): value for r, value in zip(("finetune", "cassle"), values)}
    return found


def spread(values):
    """Mean and, of several, the standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def lines_of(rows):
    """The cells of a table as text, its header first."""
    head = ["method", "regulariser", *COLUMNS.values(), "seeds", "paper's A_T"]
    body = [
        [
            method,
            label,
            *map(spread, values.values()),
            str(len(seeds)),
            "" if known is None else f"{known:.1f}",
        ]
        for method, label, seeds, values, known in rows
    ]
    return [head, *body]


def title(setting):
    """A setting in words."""
    words = [f"{setting['dataset']}", f"{setting['epochs']} epochs a task", f"{setting['backbone']}"]
    if "scenario" in setting:
        words.insert(1, f"{setting['scenario']}-incremental, {setting['num_tasks']} tasks")
    words[-1] += f" (width {setting['width']}, {setting['stem']} stem, {setting['image_size']} px)"
    return ", ".join([*words, f"batch {setting['batch_size']}"])


def differences(settings):
    """By what each setting differs from the first, in words."""
    first, *others = settings
    found = [""]
    for other in others:
        names = [name for name in SETTING if first.get(name) != other.get(name)]
        found.append(", ".join(f"{name} {other.get(name)} instead of {first.get(name)}" for name in names))
    return found


def as_text(groups, failures):
    """The tables for a terminal."""
    out = []
    for setting, grid in groups:
        out += [*textwrap.wrap(title(setting), 100), ""]
        for words, rows in tables(setting, grid):
            out += textwrap.wrap(words, 100)
            table = lines_of(rows)
            widths = [
                min(36 if i == 1 else 16, max(len(line[i]) for line in table)) for i in range(len(table[0]))
            ]
            out += [
                "  ".join(cell[:w].ljust(w) for cell, w in zip(line, widths)).rstrip()[:100] for line in table
            ]
            out.append("")
    return "\n".join([*out, *failures])


def as_markdown(groups, failures):
    out = []
    for setting, grid in groups:
        out.append(f"## {title(setting)}\n")
        for words, rows in tables(setting, grid):
            head, *body = [f"| {' | '.join(line)} |" for line in lines_of(rows)]
            out += [words, "", head, "|---|---|" + "---:|" * (len(COLUMNS) + 2), *body, ""]
    return "\n".join([*out, *failures]) + "\n"


def as_latex(groups, failures):
    """One tabular for each table, to be used with booktabs."""
    escape = str.maketrans({c: f"\\{c}" for c in "%_&#"} | {"±": r"$\pm$"})
    out = []
    for setting, grid in groups:
        for words, rows in tables(setting, grid):
            head, *body = [
                " & ".join(cell.translate(escape) for cell in line) + r" \\" for line in lines_of(rows)
            ]
            columns = "ll" + "r" * (len(COLUMNS) + 2)
            out += [r"\begin{table}", rf"\caption{{{f'{title(setting)}. {words}.'.translate(escape)}}}"]
            out += [
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                head.replace(r"A\_T", "$A_T$"),
                r"\midrule",
            ]
            out += [*body, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*out, *(f"% {line}" for line in failures)]) + "\n"


def write_csv(path, groups):
    """A line for each run and protocol, with all scores."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        scores = [*SCORES]
        writer.writerow(["run", *SETTING, "method", "label", "seed", "block", "protocol", *scores])
        for _, grid in groups:
            for (method, label), runs in grid.items():
                for run in runs:
                    own = [
                        run.folder,
                        *(run.args.get(name) for name in SETTING),
                        method,
                        label,
                        run.args["seed"],
                    ]
                    for name, block in run.blocks.items():
                        writer.writerow(
                            [*own, name, block["protocol"], *(block.get(score) for score in scores)]
                        )


def figures(grid):
    """(title, matplotlib figure) of a group: matrices, accuracy over tasks, S against P, loss and
    collapse."""
    from utils import plots

    matrices, words = {}, None
    for (method, label), runs in grid.items():
        for run in runs:
            block = next(
                (b for b in run.blocks.values() if "matrix" in b and words in (None, b["protocol"])), None
            )
            if block is not None and not run.joint:
                words = block["protocol"]
                matrices.setdefault(f"{method}, {label}", []).append(block)
    found = []
    if matrices:
        mean = {name: plots.mean_matrix([b["matrix"] for b in blocks]) for name, blocks in matrices.items()}
        seen = {name: [statistics.mean(row[: t + 1]) for t, row in enumerate(m)] for name, m in mean.items()}
        found.append((f"Accuracy matrices, mean over seeds. {words}", plots.plot_matrices(mean)))
        curves = {name: (range(len(row)), row) for name, row in seen.items()}
        labels = "after training task", "mean accuracy on the tasks so far (%)"
        found.append((f"Accuracy over tasks. {words}", plots.plot_curves(curves, *labels)))
        points = {
            name: [(b["forgetting"], b["plasticity"]) for b in blocks if b["plasticity"] is not None]
            for name, blocks in matrices.items()
        }
        if any(points.values()):
            found.append((f"Forgetting S against plasticity P. {words}", plots.plot_points(points, "S", "P")))
    for name, what in (
        ("loss", "loss, mean of an epoch"),
        ("feature_std", "standard deviation of projections"),
    ):
        curves = {
            f"{method}, {label}, seed {run.args['seed']}": (
                [line["step"] for line in run.epochs if name in line],
                [line[name] for line in run.epochs if name in line],
            )
            for (method, label), runs in grid.items()
            for run in runs
        }
        if any(x for x, _ in curves.values()):
            found.append((what[0].upper() + what[1:], plots.plot_curves(curves, "step", what)))
    return found


def as_html(groups, failures):
    """The page, pictures inside."""
    from utils.plots import as_png

    def tag(name, *words, escape=html.escape):
        return f"<{name}>{''.join(map(escape, words))}</{name.split()[0]}>"

    def table(words, lines):
        head, *body = [tag("tr", *(tag(kind, cell) for cell in line), escape=str)
                       for kind, line in zip(["th", *["td"] * len(lines)], lines)]  # fmt: skip
        return tag("p class=small", words) + f"<div class=wide><table>{head}{''.join(body)}</table></div>"

    out = [tag("h1", "Continual self-supervised learning: runs compared")]
    out += [tag("p class=note", f"Not shown: {line}") for line in failures]
    out.append(tag("p", ABOUT))
    for (setting, grid), difference in zip(groups, differences([setting for setting, _ in groups])):
        out.append(tag("h2", title(setting)))
        out.append(tag("p", f"Differs from the first group by {difference}.") if difference else "")
        out += [table(words, lines_of(rows)) for words, rows in tables(setting, grid)]
        for words, figure in figures(grid):
            out += [tag("p class=small", words), f'<img alt="" src="{as_png(figure)}">']
        costs = [(*key, run) for key, runs in grid.items() for run in runs if run.cost]
        names = sorted({name for *_, run in costs for name in run.cost})
        lines = [["method", "regulariser", "seed", *names]]
        for method, label, run in costs:
            values = (f"{run.cost[name]:.4g}" if name in run.cost else "" for name in names)
            lines.append([method, label, str(run.args["seed"]), *values])
        out += [table("Cost; minutes are those from the first line logged to the last", lines)] * bool(costs)
    head = '<!doctype html><html lang="en"><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width">'
    return f"{head}<title>Runs compared</title><style>{STYLE}</style>{''.join(out)}</html>\n"


def main(args):
    from utils import UserError

    runs, failures = [], []
    for folder in args.runs:
        try:
            runs.append(read(folder))
        except ValueError as error:
            failures.append(f"{folder}: {error}")
    if not runs:
        raise UserError(f"no finished run: {'; '.join(failures)}")
    groups = group(runs)
    if args.text:
        print(as_text(groups, failures))
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for run in runs:
            read_curves(run)
        for name, write in (("index.html", as_html), ("tables.md", as_markdown), ("tables.tex", as_latex)):
            (out / name).write_text(write(groups, failures))
        write_csv(out / "tables.csv", groups)
        for line in failures:
            print(f"warning: not shown: {line}", file=sys.stderr)
        print(f"{len(runs)} runs in {len(groups)} groups: {out / 'index.html'}")


if __name__ == "__main__":
    arguments = parse_arguments()
    from utils.distributed import report_errors

    sys.exit(report_errors(lambda: main(arguments), "report"))
