"""Prints the accuracy matrices and summaries of runs side by side: python -m utils.compare RUN [RUN ...]"""

import json
import sys
from pathlib import Path

from utils.evaluate import format_matrix, format_summary


def compare(folders):
    """The text for some run folders whose results.json has a matrix, and the protocols that it is of."""
    columns, protocols = [], {}
    for folder in map(Path, folders):
        block = json.loads((folder / "results.json").read_text())
        if "matrix" not in block:  # trained with --eval none: what main_linear.py added
            block = next(b for b in block.values() if "matrix" in b)
        protocols[block["protocol"]] = None
        column = [
            folder.name,
            *format_matrix(block["matrix"]).split("\n"),
            *format_summary(block).split(", "),
        ]
        for name, other in block.items():  # the online probe's, and what main_linear.py added
            if isinstance(other, dict) and "matrix" in other:
                column += ["", name, *format_summary(other).split(", ")]
        columns.append(column)
    height = max(map(len, columns))
    widths = [max(map(len, column)) for column in columns]
    rows = [
        "   ".join(
            (column[i] if i < len(column) else "").ljust(width) for column, width in zip(columns, widths)
        )
        for i in range(height)
    ]
    return "\n".join([f"accuracy (%), {'; '.join(protocols)}", *(row.rstrip() for row in rows)])


if __name__ == "__main__":
    try:
        if not sys.argv[1:]:
            raise ValueError("name one or more")
        print(compare(sys.argv[1:]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        print(f"compare: error: not a run folder with results: {error}", file=sys.stderr)
        sys.exit(2)
