"""From run folders to the tables and figures of a paper: one page, and the tables as Markdown, CSV and LaTeX.

examples:
    python -m utils.report runs/* --out report       (report/index.html, tables.md, tables.csv, tables.tex)
    python -m utils.report runs/* --text             (a table on the terminal)

Runs that differ in more than method, regulariser and seed stand in groups of their own.
"""

import base64
import csv
import html
import json
import re
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from data import OF_TASKS
from losses import METHODS, REGULARIZERS
from utils.arguments import Parser
from utils.metrics import SCORES, kind_of

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
ABOUT = """A_T: average accuracy on all tasks after the last. S: forgetting, lower is better. P: plasticity.
FT: forward transfer. Mean ± standard deviation over seeds. Runs that must not be compared stand in groups."""
COST = "Cost: medians and largest memory over epochs; minutes of training, with all evaluations but the last"
OWN_TASK, RATE = re.compile(r"(task\d+\.pt|/)$"), re.compile(r"lr [\d.e+-]+(?=,)")
EACH = "lr of each method"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1em; color: #222 }
table { border-collapse: collapse; white-space: nowrap } h2 { margin-top: 2em } .note { color: #a40000 }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) { text-align: left }
.wide { overflow-x: auto; margin: 0 0 1.5em } img { max-width: max(100%, 640px); height: auto }
.small { font-size: 13px; color: #555; margin: 1em 0 .3em }
"""


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
        """What it has to agree in with others; of a folder its place, of a sequence its sets."""
        left_out = {*OF_TASKS, "epochs"} if self.joint else {"sequence"}
        found = {name: self.args.get(name) for name in SETTING if name not in left_out}
        places = {"folder": [self.args.get("data_dir")], "sequence": self.args.get("sequence")}
        sets = [place.partition(":")[0] for place in places.get(found["dataset"]) or ()]
        return found | {"dataset": " ".join([found["dataset"], *sets])}

    def differs(self, name):
        """What else may set it apart from runs of its setting, as text. To start from another run's first
        task does not."""
        value = str(self.args.get(name))
        return "None" if name == "init_from" and OWN_TASK.search(value) else value

    def protocols(self):
        """{caption: block}: what was evaluated, of each protocol the block that says most. The rate of the
        probe that a run was evaluated with is its method's, and stands behind the others."""
        found = {}
        own = [block["protocol"] for name, block in self.blocks.items() if "settings" not in block]
        for block in self.blocks.values():
            words, settings = block["protocol"], block.get("settings", {})
            if words in own:
                words = RATE.sub(EACH, words)
            more = {name: value for name, value in settings.items() if name not in IN_WORDS}
            more |= {"dataset": settings["dataset"]} if "rows" in block else {}
            more |= (
                {"size": size}
                if (size := settings.get("size")) not in (None, self.args["image_size"])
                else {}
            )
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
        epochs = [f"epochs a task: {s['epochs']}"] if "epochs" in s else []
        return ", ".join([s["dataset"], *tasks, *epochs, network])

    @property
    def difference(self):
        """By what its setting differs from the first group's, in words; none for that itself."""
        both = {name: (self.setting[name], self.first[name]) for name in self.setting if name in self.first}
        words = [f"{name} {a} instead of {b}" for name, (a, b) in both.items() if a != b]
        return f"Differs from the first group: {textwrap.shorten(', '.join(words), 300)}." if words else ""


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of main_cssl.py")
    add("--out", metavar="DIR", help="where index.html, its figures, tables.md, tables.csv and tables.tex go")
    add("--text", action="store_true", help="tables on the terminal, in at most 100 columns")
    args = parser.parse_args(argv)
    if not args.out and not args.text:
        parser.error("pass --out DIR, --text, or both")
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out {args.out} is no folder")
    return args


def read(folder):
    """The Run in a folder; raises ValueError that says why there is none to show."""
    folder = Path(folder)
    try:
        args = json.loads((folder / "config.json").read_text())["arguments"]
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
                    run.partial.append(
                        f"{name or 'its own evaluation'} ({len(matrix)} of {len(tasks)} tasks)"
                    )
                    continue
                [[float(x) for x in row] for row in matrix], block["protocol"].strip()
                if "matrix" in block and {len(row) for row in matrix} != {len(tasks)}:
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
    """Of each protocol: its caption, and rows of cells as text, the header first. Where a seed was run more
    than once, that is told."""
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
            means = [
                b | {"average_accuracy": statistics.mean((b.get("matrix") or b["rows"])[-1])} for b in blocks
            ]
            scores = (spread([b[name] for b in means if b.get(name) is not None]) for name in COLUMNS)
            body.append([*key, *scores, count, known.get(key, "")])
        shown.append(
            (exact(caption, [block for pairs in rows.values() for _, block in pairs]), [header, *body])
        )
    return shown


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


def as_text(groups):
    """The tables for a terminal, in at most 100 columns; long labels go on in the next lines."""
    out = []
    for each in groups:
        out += [*textwrap.wrap(each.title, 100), *textwrap.wrap(each.difference, 100), ""]
        for words, table in each.tables:
            columns = [column for column in zip(*(line[2:] for line in table)) if any(column[1:])]
            widths = [max(map(len, column)) for column in columns]
            width = max(12, min(40, 100 - sum(widths) - 2 * len(widths)))
            out += textwrap.wrap(words, 100)
            for line, values in zip(table, zip(*columns)):
                first, *more = textwrap.wrap(", ".join(line[:2]), width)
                cells = (cell.rjust(w) for cell, w in zip(values, widths))
                out += ["  ".join([first.ljust(width), *cells]), *(f"  {text}" for text in more)]
            out.append("")
    return "\n".join(out)


def as_markdown(groups):
    out = []
    for each in groups:
        out += [f"## {each.title}", "", *[each.difference, ""] * bool(each.difference)]
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
            out += [
                r"\begin{table}",
                rf"\caption{{{f'{each.title}. {each.difference} {words}.'.translate(escape)}}}",
            ]
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

    found, shown, runs = [], {}, {}
    for key, own in grid.items():
        for run in own:
            runs[f"{', '.join(key)}, seed {run.args['seed']}"] = run
            alone = kind_of(run.args) in ("joint", "single tasks")
            for caption, block in run.protocols().items() if not alone else ():
                if "matrix" in block:
                    shown.setdefault(caption, {}).setdefault(", ".join(key), []).append(block)
    if shown:  # of the protocol that most runs have
        caption, cells = max(shown.items(), key=lambda item: sum(map(len, item[1].values())))
        caption = exact(caption, [block for blocks in cells.values() for block in blocks])
        means = {name: plots.mean_matrix([b["matrix"] for b in blocks]) for name, blocks in cells.items()}
        found.append((f"Accuracy matrices, mean over seeds. {caption}", plots.plot_matrices(means)))
        names = next((run.args["sequence"] for run in runs.values() if run.args.get("sequence")), ())
        names = [name.partition(":")[0] for name in names]
        found.append((f"Accuracy on each task. {caption}", plots.plot_tasks(means, names)))
        seen = {name: [statistics.mean(row[: t + 1]) for t, row in enumerate(m)] for name, m in means.items()}
        curves = {name: (range(len(row)), row) for name, row in seen.items()}
        labels = "after training task", "mean accuracy on the tasks so far (%)"
        found.append((f"Accuracy over tasks. {caption}", plots.plot_curves(curves, *labels)))
        scores = {
            name: [(b.get("forgetting"), b.get("plasticity")) for b in own] for name, own in cells.items()
        }
        points = {name: [pair for pair in own if None not in pair] for name, own in scores.items()}
        if points := {name: pairs for name, pairs in points.items() if pairs}:
            found.append(
                (f"Forgetting S against plasticity P. {caption}", plots.plot_points(points, "S", "P"))
            )
    for name, what in {
        "loss": "Loss, mean of an epoch",
        "feature_std": "Standard deviation of projections",
    }.items():
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


def as_html(groups, failures, out):
    """The page, pictures inside, which are also written to the folder `out`."""

    def picture(figure):
        name = f"figure{len([*out.glob('figure*.pdf')]) + 1}"
        figure.savefig(out / f"{name}.pdf")
        figure.savefig(out / f"{name}.png")
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        return f'<div class=wide><img alt="" src="data:image/png;base64,{data}"></div>'

    def tag(name, *words, escape=html.escape):
        return f"<{name}>{''.join(map(escape, words))}</{name.split()[0]}>"

    def table(words, lines):
        head, *body = [tag("tr", *(tag(kind, cell) for cell in line), escape=str)
                       for kind, line in zip(["th", *["td"] * len(lines)], lines)]  # fmt: skip
        return tag("p class=small", words) + f"<div class=wide><table>{head}{''.join(body)}</table></div>"

    for old in out.glob("figure*.p[dn][fg]"):
        old.unlink()
    page = [tag("h1", "Continual self-supervised learning: runs compared")]
    page += [tag("p class=note", f"Not shown: {line}") for line in failures]
    page.append(tag("p", ABOUT))
    for each in groups:
        page += [tag("h2", each.title), tag("p", each.difference)]
        page += [table(*shown) for shown in each.tables]
        for words, figure in figures(each.grid):
            page += [tag("p class=small", words), picture(figure)]
        page += [table(COST, cost)] if len(cost := costs(each.grid)) > 1 else []
    head = '<!doctype html><html lang="en"><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width">'
    return f"{head}<title>Runs compared</title><style>{STYLE}</style>{''.join(page)}</html>\n"


def main(args):
    from utils import UserError

    runs, failures = [], []
    for folder in args.runs:
        try:
            runs.append(read(folder))
            failures += [f"{folder}: {name}" for name in runs[-1].partial]
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
        (out / "index.html").write_text(as_html(groups, failures, out))
        (out / "tables.md").write_text(as_markdown(groups))
        (out / "tables.tex").write_text(as_latex(groups))
        write_csv(out / "tables.csv", groups)
        print(f"{len(runs)} run(s) in {len(groups)} group(s): {out / 'index.html'}")


if __name__ == "__main__":
    arguments = parse_arguments()
    from utils.distributed import report_errors

    sys.exit(report_errors(lambda: main(arguments), "report"))
