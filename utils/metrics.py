"""What is read off an accuracy matrix: matrix[t][k] is the accuracy a[k][t], in percent, on task k after
training task t, of T tasks."""

import json
from pathlib import Path

from data import same_value
from utils import UserError

SAME = "dataset scenario num_tasks seed domain_order class_order task_sizes method backbone width stem"
SAME = [*SAME.split(), "sequence", "image_size", "epochs", "batch_size"]

SCORES = {  # what results.json holds of a matrix, and what it is called in a line of text
    "average_accuracy": "A_T",
    "average_incremental_accuracy": "average incremental",
    "learning_accuracy": "learning accuracy",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer",
    "knowledge_gain": "knowledge gain",
    "plasticity": "plasticity",
    "consolidation": "consolidation",
}


def average_accuracy(matrix):
    """A_T = mean over k of a[k][T]. Source: Lopez-Paz and Ranzato (NeurIPS 2017)."""
    return sum(matrix[-1]) / len(matrix[-1])


def average_incremental_accuracy(matrix):
    """1/T sum over t of the mean over k <= t of a[k][t]. Source: Rebuffi et al., iCaRL (CVPR 2017)."""
    return sum(sum(row[: t + 1]) / (t + 1) for t, row in enumerate(matrix)) / len(matrix)


def learning_accuracy(matrix):
    """1/T sum over t of a[t][t]. Source: Riemer et al. (ICLR 2019)."""
    return sum(row[t] for t, row in enumerate(matrix)) / len(matrix)


def forgetting(matrix):
    """1/(T-1) sum over k < T of max over t of (a[k][t] - a[k][T]), PNR's stability S; None for one task.
    Source: Chaudhry et al. (ECCV 2018), as in CaSSLe (CVPR 2022)."""
    last = len(matrix) - 1
    return sum(max(row[k] for row in matrix) - matrix[-1][k] for k in range(last)) / last if last else None


def forward_transfer(matrix, random_row):
    """1/(T-1) sum over k >= 2 of (a[k][k-1] - R_k), R: a random backbone's row; None without it, or for one
    task. Source: Lopez-Paz and Ranzato (NeurIPS 2017), as in CaSSLe (CVPR 2022)."""
    last = len(matrix) - 1
    if not last or random_row is None:
        return None
    return sum(matrix[k - 1][k] - random_row[k] for k in range(1, last + 1)) / last


def knowledge_gain(matrix):
    """1/(T-1) sum over k >= 2 of (a[k][k] - a[k][k-1]); None for one task. Source: Zhang et al., Osiris
    (CoLLAs 2024)."""
    last = len(matrix) - 1
    return sum(matrix[k][k] - matrix[k - 1][k] for k in range(1, last + 1)) / last if last else None


def consolidation(matrix):
    """How often the last network finds the task of an image, argmax over t of p(t | x), mean over tasks.
    matrix: of these accuracies. Source: Zhang et al., Osiris (CoLLAs 2024)."""
    return average_accuracy(matrix)


def plasticity(matrix, single_task):
    """1/(T-1) sum over j < T of 1/(T-j) sum over k > j of (a[k][j] - G_k), G: accuracies of models trained
    on one task each; None without them, or for one task. Source: Cha et al., PNR (ICML 2024)."""
    count = len(matrix)
    if count < 2 or single_task is None:
        return None
    later = [[matrix[j][k] - single_task[k] for k in range(j + 1, count)] for j in range(count - 1)]
    return sum(sum(gaps) / len(gaps) for gaps in later) / (count - 1)


def kind_of(args):
    """The regulariser of a run's arguments (a dict), or what else it is."""
    alone = "single tasks" if args.get("single_tasks") else args["regularizer"]
    return "joint" if args["num_tasks"] == 1 else alone


def reference_row(folder, name, protocol, config):
    """G of plasticity: the accuracy on each task after training on it alone, from the results.json of a run
    of single tasks, block `name`. Raises UserError where there is none by this protocol, in words, or where
    its settings are others than config, a run's arguments."""
    folder = Path(folder)
    try:
        alone = json.loads((folder / "config.json").read_text())["arguments"]
        other = [x for x in SAME if not same_value(x, alone.get(x), config.get(x))]
        other += ["single_tasks"] * (not alone["single_tasks"])
        results = json.loads((folder / "results.json").read_text())
        block = results[name] if name else results
        row, words = [block["matrix"][k][k] for k in range(block["tasks"])], block["protocol"]
    except (OSError, ValueError, LookupError, TypeError):
        other, words = (), None
    if other:
        raise UserError(f"--reference {folder} differs in --{', --'.join(other)}")
    if words != protocol:
        need = f"is no finished run of main_cssl.py --single_tasks with numbers by this protocol: {protocol}"
        raise UserError(f"--reference {folder} {need}")
    return row


def summary(matrix, num_tasks, protocol, random_row=None, single_task=None, alone=False, part=""):
    """The block of results.json: averages are of the tasks seen so far, or of what joint training is tested
    on; what cannot be known yet is None.
    single_task: G of plasticity; alone: each row is of a network of its own, trained on one task, which
    forgets nothing; part: "task_level" if the matrix is that of consolidation."""
    seen = [row[: len(matrix)] for row in matrix] if num_tasks > 1 else [[average_accuracy(matrix)]]
    block = {
        "matrix": matrix,
        "average_accuracy": average_accuracy(seen),
        "average_incremental_accuracy": average_incremental_accuracy(seen),
        "learning_accuracy": learning_accuracy(seen),
        "forgetting": forgetting(seen),
        "forward_transfer": forward_transfer(seen, random_row),
        "knowledge_gain": knowledge_gain(seen),
        "plasticity": plasticity(seen, single_task),
        "consolidation": consolidation(seen) if part.endswith("task_level") else None,
        "random_backbone": random_row,
        "protocol": protocol,
        "tasks": num_tasks,
    }
    if alone:
        without = "average_incremental_accuracy forgetting forward_transfer knowledge_gain"
        block |= dict.fromkeys(without.split())
    return block


def format_matrix(matrix):
    """The accuracy matrix as text: rows t, columns k."""
    header = "after task | " + " ".join(f"task {k:<2d}" for k in range(len(matrix[0])))
    lines = [f"{t:>10d} | " + " ".join(f"{a:7.2f}" for a in row) for t, row in enumerate(matrix)]
    return "\n".join([header, "-" * len(header), *lines])


def format_row(name, row):
    """Accuracies in a line, with their mean."""
    return f"{name} {' '.join(f'{a:.2f}' for a in row)}, mean {sum(row) / len(row):.2f}"


def format_summary(block):
    """The numbers of results.json in a line; what is not known is left out."""
    known = ((short, block[name]) for name, short in SCORES.items() if block[name] is not None)
    return ", ".join(f"{short} {value:.2f}" for short, value in known)
