"""Linear probe and k-NN on frozen features, the accuracy matrix a[k][t], and what is read off it."""

import torch
import torch.nn.functional as F
from torch import nn

from utils import RunError
from utils.distributed import Process

ALONE = Process(torch.device("cpu"))
PROBE_EPOCHS, PROBE_BATCH, PROBE_DROPS = 100, 256, (60, 80)
KNN_K, KNN_TEMPERATURE, KNN_CHUNK = 200, 0.07, 512


@torch.no_grad()
def extract(backbone, batches, autocast_dtype=None):
    """Features float32 [N, F] of all batches (images [n, 3, S, S]), with running statistics; N may be 0.

    The backbone's mode is restored. Raises AssertionError if one of its tensors changed, running statistics
    included.
    """
    before, training = {k: v.clone() for k, v in backbone.state_dict().items()}, backbone.training
    backbone.eval()
    features = []
    for images in batches:
        with torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            features.append(backbone(images).float())
    backbone.train(training)
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items()), (
        "evaluation changed the backbone"
    )
    return torch.cat(features) if features else next(backbone.parameters()).new_zeros(0, backbone.feature_dim)


class SoftmaxRegression:
    """A linear classifier that starts from zero, in float64: SGD with momentum and without weight decay, lr x
    0.1 at 60 % and 80 % of the epochs. Each rank gives its own share of the features; a batch is drawn from
    all shares, its gradient summed over ranks.
    """

    def __init__(self, dim, num_classes, lr, momentum, seed, epochs, process, device):
        # at the papers' rates training amplifies rounding to a point of accuracy; in float64 the sums' order
        # does not show
        self.linear = nn.Linear(dim, num_classes, device=device, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)
        self.optimizer = torch.optim.SGD(self.linear.parameters(), lr=lr, momentum=momentum, fused=True)
        milestones = [epochs * drop // PROBE_EPOCHS for drop in PROBE_DROPS]
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, gamma=0.1)
        self.rng, self.process = torch.Generator().manual_seed(seed), process

    def train_one_epoch(self, x, y):
        """x: features [n, F], y: labels int64 [n], of this rank."""
        counts = self.process.counts(len(x))
        first, total = sum(counts[: self.process.rank]), sum(counts)
        order = torch.randperm(total, generator=self.rng) - first
        own = (order >= 0) & (order < len(x))
        sizes = [int(part.sum()) for part in own.split(PROBE_BATCH)]
        for step, rows in enumerate(order[own].to(x.device).split(sizes)):
            self.optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.linear(x[rows].double()), y[rows], reduction="sum")
            (loss / min(PROBE_BATCH, total - step * PROBE_BATCH)).backward()
            self.process.sum(*(p.grad for p in self.linear.parameters()))
            self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def predict(self, x):
        """int64 [M] of features [M, F]. Raises RunError if the training diverged."""
        logits = self.linear(x.double())
        if not logits.isfinite().all():
            lr, momentum = (self.optimizer.defaults[name] for name in ("lr", "momentum"))
            raise RunError(
                f"the linear probe diverged at --probe_lr {lr:g} with --probe_momentum {momentum:g}: lower "
                "them"
            )
        return logits.argmax(dim=1)


def linear_probe(features, labels, parts, test_x, num_classes, lr, momentum, seed, epochs, process=ALONE):
    """Predictions int64 [M] for test_x by one SoftmaxRegression over all classes for each of the parts, in a
    list.

    features: of an epoch (0, 1, ...), a function that returns float [N, F]; labels: int64 [N]; parts: bool
    [N], the rows that a classifier learns from. All are this rank's share, of which the predictions are, too.
    """
    device = labels.device
    probes = [
        SoftmaxRegression(test_x.shape[1], num_classes, lr, momentum, seed, epochs, process, device)
        for _ in parts
    ]
    rows = [slice(None) if part.all() else part for part in parts]
    for epoch in range(epochs):
        x = features(epoch)
        for probe, part in zip(probes, rows):
            probe.train_one_epoch(x[part], labels[part])
    return [probe.predict(test_x) for probe in probes]


@torch.no_grad()
def knn(
    train_x,
    train_y,
    test_x,
    num_classes,
    k=KNN_K,
    temperature=KNN_TEMPERATURE,
    chunk=KNN_CHUNK,
    process=ALONE,
):
    """Predictions int64 [M] of the weighted nearest neighbours: the k of largest cosine vote with e^(cosine /
    temperature).

    Each rank gives its own share of the training and of the test features; the training features are
    gathered.
    """
    bank, train_y = F.normalize(process.gather(train_x), dim=1), process.gather(train_y)
    predictions = []
    for queries in F.normalize(test_x, dim=1).split(chunk):
        cosine, index = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # chunk x k
        # relative to the nearest one, so that nothing overflows
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), num_classes, device=bank.device, dtype=bank.dtype)
        predictions.append(votes.scatter_add_(1, train_y[index], weight).argmax(dim=1))
    return torch.cat(predictions)


def protocol_name(args, name=""):
    """The words that stand beside every number. name: of what is reported beside the numbers of --eval, if it
    is that."""
    if name.startswith("online"):
        modes = {"clean": "in eval mode", "released": "in training mode, as in the papers' tables"}
        return (
            f"online linear probe ({args.online_probe}): learns beside the network, lr {args.online_lr:g}, "
            "on all labelled images in view 2's augmentation, which pass through the network "
            f"{modes[args.online_probe]}; one classifier over all classes"
        )
    if args.eval == "knn":
        setting = f"cosine, k {KNN_K} or all if fewer, temperature {KNN_TEMPERATURE}"
        return f"k-NN: {setting}; all classes, frozen features"
    crops = "random resized crop (0.08-1) and flip anew each epoch"
    views = crops if args.probe_views == "augmented" else "no augmentation"
    kind, whose = "offline linear probe", "one classifier over all classes"
    if name == "linear_per_domain":
        kind += ", per domain"
        whose += " for each domain, which learns from that domain's images"
    return (
        f"{kind}: SGD in float64, lr {args.probe_lr:g}, momentum {args.probe_momentum:g}, "
        f"{PROBE_EPOCHS} epochs, batch {PROBE_BATCH}, lr x 0.1 at epochs 60 and 80; {whose}; frozen network, "
        f"{views}"
    )


def classify(args, process, features, labels, parts, test_x, num_classes):
    """Predictions int64 [M] for test_x by the protocol that args.eval names, as args say, a list with one for
    each of the parts; for the arguments see linear_probe."""
    if args.eval == "linear":
        sgd = args.probe_lr, args.probe_momentum, args.seed
        return linear_probe(features, labels, parts, test_x, num_classes, *sgd, PROBE_EPOCHS, process)
    return [knn(features(0)[part], labels[part], test_x, num_classes, process=process) for part in parts]


def accuracy_row(predictions, labels, parts):
    """Accuracy in percent on each task: a list of floats, one row of the matrix.

    predictions, labels: int64 [M], labels -1 for none, which do not count; parts: for each task the int64
    indices that it is tested on.
    """
    correct, known = (predictions == labels).double().cpu(), (labels >= 0).cpu()
    return [round(100 * correct[part][known[part]].mean().item(), 4) for part in parts]


def average_accuracy(matrix):
    """A_T = mean over k of a[k][T]; matrix[t][k]: accuracy on task k after training task t."""
    return sum(matrix[-1]) / len(matrix[-1])


def forgetting(matrix):
    """1/(T-1) sum over k < T of max over t of (a[k][t] - a[k][T]); None for one task."""
    last = len(matrix) - 1
    return sum(max(row[k] for row in matrix) - matrix[-1][k] for k in range(last)) / last if last else None


def forward_transfer(matrix, random_row):
    """1/(T-1) sum over k >= 2 of (a[k][k-1] - R_k), R: a random backbone's row; None without it, or for one
    task."""
    last = len(matrix) - 1
    if not last or random_row is None:
        return None
    return sum(matrix[k - 1][k] - random_row[k] for k in range(1, last + 1)) / last


def plasticity(matrix, single_task):
    """1/(T-1) sum over j < T of 1/(T-j) sum over k > j of (a[k][j] - FT_k), FT: accuracies of models trained
    on one task each; None without them, or for one task."""
    count = len(matrix)
    if count < 2 or single_task is None:
        return None
    gaps = [
        sum(matrix[j][k] - single_task[k] for k in range(j + 1, count)) / (count - 1 - j)
        for j in range(count - 1)
    ]
    return sum(gaps) / (count - 1)


def summary(matrix, num_tasks, protocol, random_row=None, single_task=None):
    """The block of results.json: averages are of the tasks seen so far; what cannot be known yet is None."""
    seen = [row[: len(matrix)] for row in matrix]
    return {
        "matrix": matrix,
        "average_accuracy": average_accuracy(seen) if matrix else None,
        "forgetting": forgetting(seen) if matrix else None,
        "plasticity": plasticity(seen, single_task) if matrix else None,
        "forward_transfer": forward_transfer(seen, random_row) if matrix else None,
        "random_backbone": random_row,
        "protocol": protocol,
        "tasks": num_tasks,
    }


def format_matrix(matrix):
    """The accuracy matrix as text: rows t, columns k."""
    header = "after task | " + " ".join(f"task {k:<2d}" for k in range(len(matrix[0])))
    lines = [f"{t:>10d} | " + " ".join(f"{a:7.2f}" for a in row) for t, row in enumerate(matrix)]
    return "\n".join([header, "-" * len(header), *lines])


def format_row(task, block):
    """The accuracies after a task, and those of a random backbone where they are known, in a line."""
    protocol = block["protocol"].split(":")[0]
    rows = {
        f"after task {task}: accuracy (%), {protocol}": block["matrix"][-1],
        "random network": block["random_backbone"],
    }
    return "; ".join(
        f"{name} {' '.join(f'{a:.2f}' for a in r)}, mean {sum(r) / len(r):.2f}"
        for name, r in rows.items()
        if r
    )


def format_summary(block):
    """The numbers of results.json in a line; what is not known is left out."""
    names = {
        "average_accuracy": "A_T",
        "forgetting": "forgetting",
        "forward_transfer": "forward transfer",
        "plasticity": "plasticity",
    }
    return ", ".join(f"{short} {block[name]:.2f}" for name, short in names.items() if block[name] is not None)


def plot_matrix(matrix, title, names=None):
    """The accuracy matrix as a matplotlib figure: annotated cells; bold: the task just trained, italic: tasks
    still to come; names: of the tasks, where they have any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks, rows = len(matrix[0]), len(matrix)
    figure = Figure(figsize=(2.2 + 0.75 * tasks, 1.9 + 0.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap="viridis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for t, row in enumerate(matrix):
        for k, value in enumerate(row):
            style = {"fontweight": "bold"} if k == t else {"fontstyle": "italic"} if k > t else {}
            axes.text(
                k,
                t,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="black" if value > middle else "white",
                **style,
            )
    axes.set(
        xticks=range(tasks), yticks=range(rows), xlabel="accuracy on task (%)", ylabel="after training task"
    )
    if names:
        axes.set_xticks(range(tasks), names, rotation=30, ha="right")
        axes.set_yticks(range(rows), names[:rows])
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure
