"""Where the wall time of commands that train goes, as a stacked bar each.

    python -m benchmarks.wall docs/wall.png "quickstart: OUT=runs/q bash run_quickstart.sh"

The commands run one after the other, with a PYTHON of their own that notes what its main_cssl.py does when;
one that runs main_cssl.py by itself calls it "$PYTHON" main_cssl.py. They run one process at a time, in run
folders that are new. What no part accounts for, the shell's share too, is start-up.
"""

import importlib
import json
import operator
import os
import runpy
import shlex
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

PARTS = "start-up, data, training, evaluation, saving, pictures and report".split(", ")
WATCHED = {  # functions of main_cssl.py and of the modules that it imports
    "build_data": "data",
    "train_one_epoch": "training",
    "evaluate_task": "evaluation",
    "evaluate.accuracy_rows": "evaluation",
    "Run.save": "saving",
    "Run.save_network": "saving",
    "Run.publish": "pictures and report",
}


class Clock:
    """Seconds by part; each moment counts for the innermost part only."""

    def __init__(self):
        self.spent, self.parts, self.last = Counter(), ["start-up"], time.perf_counter()

    def turn(self):
        now = time.perf_counter()
        self.spent[self.parts[-1]] += now - self.last
        self.last = now

    @contextmanager
    def timed(self, part):
        """For a with statement, or as a decorator."""
        self.turn()
        self.parts.append(part)
        try:
            yield
        finally:
            self.turn()
            self.parts.pop()


def inside(words):
    """Main program or module of the project as `python words` runs it, its parts timed and appended to $WALL;
    others as they are."""
    if words[0] != "-m" and Path(words[0]).name != "main_cssl.py":
        os.execv(sys.executable, [sys.executable, *words])
    clock, sys.argv = Clock(), words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            with clock.timed("pictures and report"):
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            return 0
        program = importlib.import_module(Path(words[0]).stem)
        for name, part in WATCHED.items():
            path, _, last = name.rpartition(".")
            owner = operator.attrgetter(path)(program) if path else program
            setattr(owner, last, clock.timed(part)(getattr(owner, last)))
        args, stop = program.parse_arguments(), program.Stop(words[0])
        return program.distributed.report_errors(lambda: program.main(args, stop), words[0])
    finally:
        clock.turn()
        with open(os.environ["WALL"], "a") as file:
            print(json.dumps(clock.spent), file=file)


def measure(command, folder):
    """{part: seconds} of a bash command."""
    python, notes = Path(folder) / "python", Path(folder) / "notes"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m benchmarks.wall --inside "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    notes.write_text("")
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHON": str(python), "WALL": str(notes), "PYTHONPATH": root}
    start = time.perf_counter()
    status = subprocess.run(["bash", "-c", command], cwd=root, env=environment).returncode
    if status:
        sys.exit(f"benchmarks.wall: status {status} of {command}")
    total, spent = time.perf_counter() - start, Counter()
    for line in notes.read_text().splitlines():
        spent.update(json.loads(line))
    spent["start-up"] += total - spent.total()
    return {part: spent[part] for part in PARTS}


def main(picture="", *jobs):
    if not jobs or not all(": " in job for job in jobs) or not Path(picture).resolve().parent.is_dir():
        sys.exit(
            'python -m benchmarks.wall PICTURE "LABEL: COMMAND" ...; the folder of PICTURE has to be there'
        )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, _, command in (job.partition(": ") for job in jobs):
            found[label] = spent = measure(command, folder)
            total = sum(spent.values())
            parts = ", ".join(f"{part} {s:.1f} s ({100 * s / total:.0f} %)" for part, s in spent.items())
            print(f"{label}: {total:.1f} s: {parts}", flush=True)
            draw(found).savefig(picture)


def draw(found):
    """{command: {part: seconds}} as bars of 100 %."""
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(found)), dpi=110, layout="constrained")
    axes, left = figure.add_subplot(), dict.fromkeys(found, 0.0)
    names = {label: f"{label}\n{sum(spent.values()) / 60:.1f} min" for label, spent in found.items()}
    for part in PARTS:
        share = {label: 100 * spent[part] / sum(spent.values()) for label, spent in found.items()}
        axes.barh(list(names.values()), list(share.values()), left=list(left.values()), label=part)
        for row, (label, width) in enumerate(share.items()):
            if width >= 4:
                axes.text(left[label] + width / 2, row, f"{width:.0f}", ha="center", va="center")
            left[label] += width
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the wall time (%)")
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(sys.argv[2:]))
    main(*sys.argv[1:])
