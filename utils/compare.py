"""Prints the summaries of runs below each other: python -m utils.compare RUN [RUN ...]"""

import json
import sys
from pathlib import Path

from utils.metrics import format_summary


def compare(folders):
    """A line for each protocol of each run folder."""
    lines = []
    for folder in folders:
        results = json.loads((Path(folder) / "results.json").read_text())
        blocks = {"": results, **results}  # that of --eval, the others under their names
        for block in (block for block in blocks.values() if isinstance(block, dict) and "matrix" in block):
            lines.append(f"{folder}: {format_summary(block)} ({block['protocol'].split(':')[0]})")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(compare(sys.argv[1:] or ["."]))
    except (OSError, ValueError) as error:
        print(f"compare: error: not a run folder with results: {error}", file=sys.stderr)
        sys.exit(2)
