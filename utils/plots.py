"""The figures of a run."""

from matplotlib.figure import Figure


def plot_matrix(matrix, title, names=None):
    """The accuracy matrix as a matplotlib figure: annotated cells; bold: the task just trained, italic: tasks
    still to come; names: of the tasks, where they have any."""
    tasks, rows = len(matrix[0]), len(matrix)
    figure = Figure(figsize=(2.2 + 0.75 * tasks, 1.9 + 0.6 * rows), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap="viridis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for t, row in enumerate(matrix):
        for k, value in enumerate(row):
            style = {"fontweight": "bold"} if k == t else {"fontstyle": "italic"} if k > t else {}
            style |= {"ha": "center", "va": "center", "color": "black" if value > middle else "white"}
            axes.text(k, t, f"{value:.1f}", **style)
    axes.set(xticks=range(tasks), yticks=range(rows))
    axes.set(xlabel="accuracy on task (%)", ylabel="after training task")
    if names:
        axes.set_xticks(range(tasks), names, rotation=30, ha="right")
        axes.set_yticks(range(rows), names[:rows])
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure


def plot_spectrum(values):
    """The log singular-value spectrum as a matplotlib figure; a cliff is a dimensional collapse."""
    figure = Figure(figsize=(5, 3), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(values.clamp(min=1e-12).log10().tolist())
    axes.set(xlabel="index", ylabel="log10 singular value of the features")
    return figure
