"""From run folders to the tables and figures of a paper: one page, and the tables as Markdown, CSV and LaTeX.

examples:
    python -m utils.report runs/* --out report       (report/index.html, tables.md, tables.csv, tables.tex)
    python -m utils.report runs/* --text             (a table on the terminal)

Runs that differ in more than method, regulariser and seed stand in groups of their own.
"""

import base64
import csv
import html
import signal
import sys
import textwrap
from pathlib import Path

from utils.arguments import Parser
from utils.compare import SETTING, costs, figures, group, read
from utils.metrics import SCORES

ABOUT = """A_T: average accuracy on all tasks after the last. S: forgetting, lower is better. P: plasticity.
FT: forward transfer. Mean ± standard deviation over seeds. Runs that must not be compared stand in groups."""
COST = "Cost: medians and largest memory over epochs; minutes of training, with all evaluations but the last"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1em; color: #222 }
table { border-collapse: collapse; white-space: nowrap } h2 { margin-top: 2em } .note { color: #a40000 }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) { text-align: left }
.wide { overflow-x: auto; margin: 0 0 1.5em } img { max-width: max(100%, 640px); height: auto }
.small { font-size: 13px; color: #555; margin: 1em 0 .3em }
"""


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


def as_text(groups):
    """The tables for a terminal, in at most 100 columns; long labels go on in the next lines."""
    out = []
    for each in groups:
        out += [*textwrap.wrap(each.title, 100), *textwrap.wrap(each.difference, 100), ""]
        for words, table in each.tables:
            columns = [*zip(*(line[2:] for line in table))]
            widths = [max(map(len, column)) for column in columns]
            out += textwrap.wrap(words, 100)
            width = min(40, 100 - sum(widths) - 2 * len(widths))
            if width < 12:
                out += ["too wide for a terminal: see --out", ""]
                continue
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
    escape = str.maketrans({c: f"\\{c}" for c in "%_#&$"} | {"±": r"$\pm$", "→": r"$\to$"})
    out = []
    for each in groups:
        for words, table in each.tables:
            head, *body = [f"{' & '.join(line).translate(escape)} \\\\" for line in table]
            caption = f"{each.title}. {each.difference} {words}.".translate(escape)
            out += [r"\begin{table}", rf"\caption{{{caption}}}"]
            out += [rf"\begin{{tabular}}{{ll{'r' * (len(table[0]) - 2)}}}", r"\toprule"]
            out += [head.replace(r"A\_T", "$A_T$"), r"\midrule", *body, r"\bottomrule"]
            out += [r"\end{tabular}", r"\end{table}", ""]
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


def as_html(groups, failures, out):
    """The page, pictures inside, which are also written to the folder `out`."""

    from utils.plots import save

    def picture(figure):
        name = f"figure{len([*out.glob('figure*.pdf')]) + 1}"
        data = base64.b64encode(save(figure, out / name)).decode()
        return f'<div class=wide><img alt="" src="data:image/png;base64,{data}"></div>'

    def tag(name, *words, escape=html.escape):
        return f"<{name}>{''.join(map(escape, words))}</{name.split()[0]}>"

    def table(words, lines):
        head, *body = [tag("tr", *(tag(kind, cell) for cell in line), escape=str)
                       for kind, line in zip(["th", *["td"] * len(lines)], lines)]  # fmt: skip
        return tag("p class=small", words) + f"<div class=wide><table>{head}{''.join(body)}</table></div>"

    for old in out.glob("figure*.p[dn][fg]"):
        old.unlink(missing_ok=True)  # jobs that end together write the same report
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
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of "| head"
    arguments = parse_arguments()
    from utils.distributed import report_errors

    sys.exit(report_errors(lambda: main(arguments), "report"))
