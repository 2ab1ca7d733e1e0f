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
from dataclasses import dataclass
from pathlib import Path

from losses import METHODS, REGULARIZERS
from utils.arguments import Parser
from utils.metrics import SCORES

# arguments in which runs have to agree to be compared; a joint run has no tasks of its own
SETTING = "dataset scenario num_tasks epochs backbone width stem image_size batch_size domain_order".split()
SETTING += ["val_split", "class_order", "task_sizes"]
OF_TASKS = ("scenario", "num_tasks", "domain_order", "class_order", "task_sizes")
# what changes no result, follows from the method, or is told by the protocol
ASIDE = "out_dir data_dir download cache cache_size device compile save_every log_every workers skip_corrupt"
ASIDE += " reference init_from embedding seed normalize method regularizer precision eval probe_lr"
ASIDE += " probe_momentum probe_views probe_data_dir online_probe online_lr"
COLUMNS = {"average_accuracy": "A_T", "forgetting": "S", "plasticity": "P", "forward_transfer": "FT"}
NAMES = {"moco": "MoCo v2+", "simclr": "SimCLR", "byol": "BYOL", "vicreg": "VICReg", "barlow": "Barlow Twins"}
NAMES |= {"falcon": "FALCON", "finetune": "fine-tuning", "cassle": "CaSSLe", "pnr": "PNR"}
# A_T in CaSSLe's tables of fine-tuning and CaSSLe, class-incremental, 5 tasks (docs/METHODS.md, section 11)
CIFAR = {"byol": (52.7, 62.2), "barlow": (54.3, 60.4), "moco": (47.3, 59.5), "simclr": (48.9, 58.3)}
IMAGENET = {"byol": (66.0, 66.4), "barlow": (63.1, 68.2), "moco": (62.0, 68.8), "simclr": (61.5, 68.0)}
PAPER = {"cifar100": CIFAR | {"vicreg": (51.5, 53.6)}, "imagenet100": IMAGENET | {"vicreg": (61.3, 64.8)}}
JOINT = {"barlow": 70.9, "byol": 70.5, "moco": 69.9, "vicreg": 68.5, "simclr": 65.8}  # CIFAR-100, solo-learn
ABOUT = """A_T: average accuracy on all tasks after the last. S: forgetting, lower is better. P: plasticity.
FT: forward transfer. Mean ± standard deviation over seeds. Runs that must not be compared stand in groups."""
COST = "Cost: medians and largest memory over epochs; minutes of training, with all evaluations but the last"
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
    """A run folder that has been read. blocks: of results.json, by name."""

    folder: Path
    args: dict
    blocks: dict

    @property
    def joint(self):
        return self.args["num_tasks"] == 1

    @property
    def kind(self):
        alone = "single tasks" if self.args.get("single_tasks") else self.args["regularizer"]
        return "joint" if self.joint else alone

    def setting(self):
        return {name: self.args.get(name) for name in SETTING if not (self.joint and name in OF_TASKS)}

    def lines(self, name):
        """Of an epoch each, in metrics.jsonl or speed.jsonl, as far as they can be read."""
        try:
            lines = [json.loads(line) for line in (self.folder / name).read_text().splitlines()]
            return [line for line in lines if line["kind"] == "epoch"]
        except (OSError, ValueError, LookupError, TypeError):
            return []


@dataclass
class Group:
    """Runs of one setting. grid: {(method, label): runs}; tables: of each protocol its words and rows of
    cells, the header first."""

    setting: dict
    grid: dict
    tables: list

    @property
    def title(self):
        s, tasks = self.setting, []
        if "scenario" in s:
            tasks = [f"{s['scenario']}-incremental, {s['num_tasks']} tasks"]
        network = f"{s['backbone']} (width {s['width']}, {s['stem']} stem, {s['image_size']} px)"
        return ", ".join(
            [s["dataset"], *tasks, f"{s['epochs']} epochs a task", network, f"batch {s['batch_size']}"]
        )

    def difference(self, other):
        """By what its setting differs from another group's, in words."""
        own, others = self.setting, other.setting
        names = [name for name in SETTING if own.get(name) != others.get(name)]
        both = [[textwrap.shorten(str(x.get(name)), 60) for x in (own, others)] for name in names]
        return ", ".join(f"{name} {a} instead of {b}" for name, (a, b) in zip(names, both))


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of main_cssl.py")
    add("--out", metavar="DIR", help="where index.html, tables.md, tables.csv and tables.tex go")
    add("--text", action="store_true", help="tables on the terminal, in at most 100 columns")
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
        found = {"": results, **{name: b for name, b in results.items() if isinstance(b, dict)}}
        blocks = {name: b for name, b in found.items() if "matrix" in b or "rows" in b}
        finished = max((len(b.get("matrix") or b["rows"]) for b in blocks.values()), default=0)
        assert all(block["protocol"] for block in blocks.values())
    except FileNotFoundError as error:
        raise ValueError("not evaluated yet") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError("its results.json is damaged") from error
    if finished < args["num_tasks"]:
        raise ValueError(f"not finished: {finished} of {args['num_tasks']} tasks")
    return Run(folder, args, blocks)


def group(runs):
    """The Groups; joint runs stand in every one that they agree with."""
    groups = {}
    for run in sorted(runs, key=lambda run: run.joint):
        own = run.setting().items()
        fitting = [key for key in groups if run.joint and own <= json.loads(key).items()]
        for key in fitting or [json.dumps(run.setting())]:
            groups.setdefault(key, []).append(run)
    grids = {key: cells(members) for key, members in groups.items()}
    return [Group(s := json.loads(key), grid, tables(s, grid)) for key, grid in grids.items()]


def cells(runs):
    """{(method, label): runs}: a label is the regulariser, and by what else runs of it differ, but for the
    seed."""
    kinds, found = {}, {}
    for run in runs:
        kinds.setdefault((run.args["method"], run.kind), []).append(run)
    order = [*METHODS], [*REGULARIZERS]
    place = lambda names, name: names.index(name) if name in names else len(names)  # noqa: E731
    for method, kind in sorted(kinds, key=lambda key: [*map(place, order, key), key]):
        members = kinds[method, kind]
        names = sorted({name for run in members for name in run.args} - {*ASIDE.split(), *SETTING})
        differing = [name for name in names if len({str(run.args.get(name)) for run in members}) > 1]
        for run in members:
            others = (f"{name} {run.args.get(name)}" for name in differing)
            label = ", ".join([NAMES.get(kind, kind), *others])
            found.setdefault((NAMES.get(method, method), label), []).append(run)
    return found


def tables(setting, grid):
    """Of each protocol: its words, and rows of cells as text, the header first. Where a seed was run more
    than once, that is told."""
    found = {}
    for key, runs in grid.items():
        for run in runs:
            blocks = {block["protocol"]: block for block in reversed(run.blocks.values())}  # one of a kind
            for words, block in reversed(blocks.items()):
                found.setdefault(words, {}).setdefault(key, []).append((run.args["seed"], block))
    header, shown = ["method", "regulariser", *COLUMNS.values(), "seeds", "paper's A_T"], []
    for words, rows in found.items():
        known, body = paper(setting, words), []
        for key, pairs in rows.items():
            seeds, blocks = zip(*pairs)
            count = f"{len(set(seeds))}" + f" ({len(seeds)} runs)" * (len(set(seeds)) < len(seeds))
            means = [
                b if "matrix" in b else {"average_accuracy": statistics.mean(b["rows"][-1])} for b in blocks
            ]
            scores = (spread([b[name] for b in means if b.get(name) is not None]) for name in COLUMNS)
            body.append([*key, *scores, count, known.get(key, "")])
        shown.append((words, [header, *body]))
    return shown


def paper(setting, words):
    """{(method, label): A_T in the papers} for a setting and protocol of theirs."""
    online = words.startswith("online linear probe (released)")
    known = PAPER.get(setting["dataset"]) if online == (setting["dataset"] == "cifar100") else None
    if known is None or not (online or words.startswith("offline linear probe:")):
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


def as_text(groups):
    """The tables for a terminal."""
    out = []
    for each in groups:
        out += [*textwrap.wrap(each.title, 100), ""]
        for words, table in each.tables:
            limits = [16, 36, *[16] * len(table[0])]
            widths = [min(limit, max(map(len, column))) for limit, column in zip(limits, zip(*table))]
            lines = ("  ".join(cell[:w].ljust(w) for cell, w in zip(line, widths)) for line in table)
            out += [*textwrap.wrap(words, 100), *(line[:100].rstrip() for line in lines), ""]
    return "\n".join(out)


def as_markdown(groups):
    out = []
    for each in groups:
        out += [f"## {each.title}", ""]
        for words, table in each.tables:
            head, *body = [f"| {' | '.join(line)} |" for line in table]
            out += [words, "", head, "|---|---|" + "---:|" * (len(table[0]) - 2), *body, ""]
    return "\n".join(out)


def as_latex(groups):
    """A table environment for each, to be used with booktabs."""
    escape = str.maketrans({c: f"\\{c}" for c in "%_#"} | {"±": r"$\pm$"})
    out = []
    for each in groups:
        for words, table in each.tables:
            head, *body = [f"{' & '.join(line).translate(escape)} \\\\" for line in table]
            out += [r"\begin{table}", rf"\caption{{{f'{each.title}. {words}.'.translate(escape)}}}"]
            out += [
                rf"\begin{{tabular}}{{ll{'r' * (len(table[0]) - 2)}}}",
                r"\toprule",
                head.replace(r"A\_T", "$A_T$"),
            ]
            out += [r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(out)


def write_csv(path, groups):
    """A line for each run and protocol, with all scores."""
    with open(path, "w", newline="") as file:
        write = csv.writer(file).writerow
        write(["run", *SETTING, "method", "label", "seed", "block", "protocol", *SCORES])
        found = ((key, run) for each in groups for key, runs in each.grid.items() for run in runs)
        for key, run in found:
            own = [run.folder, *(run.args.get(name) for name in SETTING), *key, run.args["seed"]]
            for name, block in run.blocks.items():
                write([*own, name, block["protocol"], *map(block.get, SCORES)])


def figures(grid):
    """(title, matplotlib figure) of a group: matrices, accuracy over tasks, S against P, loss and
    collapse."""
    from utils import plots

    blocks, words, found = {}, None, []
    for key, runs in grid.items():
        for run in (run for run in runs if not run.joint):
            fitting = (b for b in run.blocks.values() if "matrix" in b and words in (None, b["protocol"]))
            if block := next(fitting, None):
                words = block["protocol"]
                blocks.setdefault(", ".join(key), []).append(block)
    if blocks:
        means = {name: plots.mean_matrix([b["matrix"] for b in own]) for name, own in blocks.items()}
        found.append((f"Accuracy matrices, mean over seeds. {words}", plots.plot_matrices(means)))
        seen = {name: [statistics.mean(row[: t + 1]) for t, row in enumerate(m)] for name, m in means.items()}
        curves = {name: (range(len(row)), row) for name, row in seen.items()}
        labels = "after training task", "mean accuracy on the tasks so far (%)"
        found.append((f"Accuracy over tasks. {words}", plots.plot_curves(curves, *labels)))
        points = {name: [(b["forgetting"], b["plasticity"]) for b in own if b["plasticity"] is not None]
                  for name, own in blocks.items()}  # fmt: skip
        if any(points.values()):
            found.append((f"Forgetting S against plasticity P. {words}", plots.plot_points(points, "S", "P")))
    runs = {f"{', '.join(key)}, seed {run.args['seed']}": run for key, runs in grid.items() for run in runs}
    lines = {name: run.lines("metrics.jsonl") for name, run in runs.items()}
    for name, what in {
        "loss": "Loss, mean of an epoch",
        "feature_std": "Standard deviation of projections",
    }.items():
        pairs = {run: [(x["step"], x[name]) for x in own if name in x] for run, own in lines.items()}
        curves = {run: tuple(zip(*own)) for run, own in pairs.items() if own}
        if curves:
            found.append((what, plots.plot_curves(curves, "step", what)))
    return found


def costs(grid):
    """The table of what the runs cost, the header first; no rows where nothing was logged."""
    found = {}
    for key, runs in grid.items():
        for run in runs:
            if epochs := run.lines("speed.jsonl"):
                column = lambda name: [line[name] for line in epochs if name in line]  # noqa: E731
                values = [statistics.median(column("images_per_second")), sum(column("seconds")) / 60]
                values += [max(memory)] if (memory := column("gpu_memory_gib")) else []
                found[*key, str(run.args["seed"]), run.folder] = values
    rows = [[*key[:3], *(f"{value:.4g}" for value in values)] for key, values in found.items()]
    widest = max(map(len, rows), default=0)
    header = ["method", "regulariser", "seed", "images/s", "minutes", "GPU GiB"][:widest]
    return [header, *(row + [""] * (widest - len(row)) for row in rows)]


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
    for each in groups:
        out.append(tag("h2", each.title))
        if difference := each.difference(groups[0]):
            out.append(tag("p", f"Differs from the first group by {difference}."))
        out += [table(*shown) for shown in each.tables]
        for words, figure in figures(each.grid):
            out += [tag("p class=small", words), f'<img alt="" src="{as_png(figure)}">']
        out += [table(COST, cost)] if len(cost := costs(each.grid)) > 1 else []
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
        print(as_text(groups))
    for line in failures:
        print(f"warning: not shown: {line}", file=sys.stderr)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.html").write_text(as_html(groups, failures))
        (out / "tables.md").write_text(as_markdown(groups))
        (out / "tables.tex").write_text(as_latex(groups))
        write_csv(out / "tables.csv", groups)
        print(f"{len(runs)} runs in {len(groups)} groups: {out / 'index.html'}")


if __name__ == "__main__":
    arguments = parse_arguments()
    from utils.distributed import report_errors

    sys.exit(report_errors(lambda: main(arguments), "report"))
