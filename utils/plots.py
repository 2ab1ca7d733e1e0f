"""The figures of a run, and of several."""

import io
import math
import statistics
import textwrap

from matplotlib.figure import Figure


def save(figure, stem):
    """stem.pdf and stem.png; returns what is in the latter. They are drawn in memory first, since matplotlib
    hides that a disk is full."""
    for suffix in ("pdf", "png"):
        content = io.BytesIO()
        figure.savefig(content, format=suffix)
        figure.set_layout_engine("none")  # stays as it is, since to find it takes longer than to draw
        stem.with_name(f"{stem.name}.{suffix}").write_bytes(content.getvalue())
    return content.getvalue()


def draw_matrix(axes, matrix, title, low, high, names=None):
    """The accuracy matrix in annotated cells: bold: the task just trained, italic: tasks still to come."""
    image = axes.imshow(matrix, cmap="viridis", aspect="auto", vmin=low, vmax=high)
    for t, row in enumerate(matrix):
        for k, value in enumerate(row):
            style = {"fontweight": "bold"} if k == t else {"fontstyle": "italic"} if k > t else {}
            color = "black" if value > (low + high) / 2 else "white"
            axes.text(k, t, f"{value:.1f}", fontsize=9, ha="center", va="center", color=color, **style)
    axes.set(xticks=range(len(matrix[0])), yticks=range(len(matrix)))
    axes.set(xlabel="accuracy on task (%)", ylabel="after training task")
    if names:
        axes.set_xticks(range(len(matrix[0])), names, rotation=30, ha="right")
        axes.set_yticks(range(len(matrix)), names[: len(matrix)])
    axes.set_title(title, fontsize=9)
    return image


def plot_matrix(matrix, title, names=None):
    """The accuracy matrix of one run as a matplotlib figure, its colours from 0 to 100 % as in every other
    run's; names: of the tasks, where they have any."""
    tasks, rows = len(matrix[0]), len(matrix)
    figure = Figure(figsize=(2.2 + 0.75 * tasks, 1.9 + 0.6 * rows), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(draw_matrix(axes, matrix, title, 0, 100, names), ax=axes)
    return figure


def plot_matrices(matrices, names=None):
    """Matrices by name, side by side, on one colour scale; names: of the tasks, where they have any."""
    columns = min(3, len(matrices))
    rows, tasks = math.ceil(len(matrices) / columns), max(len(m[0]) for m in matrices.values())
    size = (columns * (1.2 + 0.45 * tasks) + 1, rows * (1.2 + 0.35 * tasks))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    values = [value for matrix in matrices.values() for row in matrix for value in row]
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, matrix) in zip(every, matrices.items()):
        image = draw_matrix(axes, matrix, textwrap.fill(name, 30), min(values), max(values), names)
    for axes in every[len(matrices) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(every), shrink=0.8)
    return figure


def plot_curves(curves, x_label, y_label, points=False):
    """curves: {name: (x, y)}, x whole numbers; or points, anywhere."""
    figure = Figure(figsize=(8, max(4, 0.17 * len(curves))), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(curves.items()):
        style = "none" if points else ("-", "--", ":", "-.")[number // 10 % 4]
        marker = "o" if points or len(x) < 20 else None
        axes.plot(x, y, label=name, linestyle=style, marker=marker, markersize=3)
    axes.xaxis.get_major_locator().set_params(integer=not points)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_tasks(matrices, random, names=None):
    """Accuracy on each task while later ones are trained. matrices: {method: {label: those of its seeds}}, of
    which mean and standard deviation are shown; a dashed line is the mean of what was trained jointly and
    tested on each task. random: {method: row of a random network}, which stand in the titles, since a line
    would leave no room for the others; names: of the tasks, where they have any."""
    tasks = max(len(runs[0][0]) for found in matrices.values() for runs in found.values())
    labels, lines = dict.fromkeys(label for found in matrices.values() for label in found), {}
    colors = {label: f"C{place}" for place, label in enumerate(labels)}
    rows = math.ceil(tasks / 6)
    columns = math.ceil(tasks / rows)
    size = 1 + 3 * columns, 0.8 + 2.5 * rows * len(matrices)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    shared = "col" if rows == 1 else False  # a column is a task
    panels = figure.subplots(len(matrices) * rows, columns, squeeze=False, sharey=shared)
    for (method, found), own in zip(matrices.items(), panels.reshape(len(matrices), -1)):
        for axes in own[tasks:]:
            axes.set_axis_off()
        for number, axes in enumerate(own[:tasks]):
            for label, runs in found.items():
                values = [[row[number] for row in run] for run in runs if len(run[0]) == tasks]
                mean = [statistics.mean(cell) for cell in zip(*values)]
                deviation = [statistics.stdev(cell) for cell in zip(*values)] if len(values) > 1 else None
                style = {"color": colors[label], "label": label}
                if len(mean) == tasks:
                    style |= {"fmt": "o-", "markersize": 3, "capsize": 3}
                    lines[label] = axes.errorbar(range(tasks), mean, deviation, **style)
                elif mean:
                    lines[label] = axes.axhline(mean[0], linestyle="--", **style)
            title = f"{method}: {names[number] if names else f'task {number}'}"
            title += f"\nrandom network: {random[method][number]:.1f}" if method in random else ""
            axes.set_title(title, fontsize=10)
            axes.set(xlabel="after training task", ylabel="accuracy (%)")
            axes.set_xticks(range(tasks), names or range(tasks))
            if names and tasks > 3:
                axes.tick_params("x", rotation=30)
    shown = [textwrap.fill(label, 30) for label in lines]
    figure.legend(lines.values(), shown, loc="outside lower center", ncols=min(4, columns + 1), fontsize=8)
    return figure


def plot_spectrum(values):
    """The log singular-value spectrum as a matplotlib figure; a cliff is a dimensional collapse."""
    figure = Figure(figsize=(5, 3), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(values.clamp(min=1e-12).log10().tolist())
    axes.set(xlabel="index", ylabel="log10 singular value of the features")
    return figure
