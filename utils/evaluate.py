"""Features of a frozen network, linear probe and k-NN on them, the accuracy matrix a[k][t], and what is read
off it."""

import torch
import torch.nn.functional as F
from torch import nn

from data.loader import evaluation_batches
from models.learner import DTYPES
from utils import UserError
from utils.distributed import Process

ALONE = Process(torch.device("cpu"))
PROBE_EPOCHS, PROBE_BATCH, PROBE_DROPS = 100, 256, (60, 80)
KNN_K, KNN_TEMPERATURE, KNN_CHUNK = 200, 0.07, 512
SCORES = {  # what results.json holds of a matrix, and what it is called in a line of text
    "average_accuracy": "A_T",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer",
    "plasticity": "plasticity",
}


@torch.no_grad()
def extract_features(backbone, batches, autocast_dtype=None):
    """Features float32 [N, F] of all batches (images [n, 3, S, S], labels [n]), with running statistics, and
    the labels int64 [N]; N may be 0. The backbone's mode is restored. Raises AssertionError if one of its
    tensors changed, running statistics included."""
    before, training = {k: v.clone() for k, v in backbone.state_dict().items()}, backbone.training
    empty = next(backbone.parameters()).new_zeros(0, backbone.feature_dim)
    backbone.eval()
    features, labels = [empty], [empty.new_zeros(0, dtype=torch.int64)]
    for images, y in batches:
        with torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            features.append(backbone(images).float())
        labels.append(y)
    backbone.train(training)
    unchanged = all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    assert unchanged, "evaluation changed the backbone"
    return torch.cat(features), torch.cat(labels)


def features_of(args, process, backbone):
    """A function of an ImageSet, and perhaps an epoch of augmented views: this rank's share of its features
    and labels."""

    def extract(*what):
        return extract_features(backbone, evaluation_batches(args, process, *what), DTYPES[args.precision])

    return extract


class SoftmaxRegression:
    """A linear classifier that starts from zero, in float64: SGD with momentum and without weight decay, lr x
    0.1 at 60 % and 80 % of the epochs. Each rank gives its own share of the features; a batch is drawn from
    all shares, its gradient summed over ranks."""

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
        counts = self.process.collect(len(x))
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
        """int64 [M] of features [M, F]. Raises UserError if the training diverged."""
        logits = self.linear(x.double())
        if not logits.isfinite().all():
            lr, momentum = (self.optimizer.defaults[name] for name in ("lr", "momentum"))
            rates = f"--probe_lr {lr:g} with --probe_momentum {momentum:g}"
            raise UserError(f"the linear probe diverged at {rates}: lower them")
        return logits.argmax(dim=1)


def linear_probe(features, parts, test_x, num_classes, lr, momentum, seed, epochs, process=ALONE):
    """Predictions int64 [M] for test_x by one SoftmaxRegression over all classes for each of the parts, in a
    list. features: of an epoch (0, 1, ...), a function that returns float [N, F] and labels int64 [N]; parts:
    bool [N], the rows that a classifier learns from. All are this rank's share, of which the predictions are,
    too."""
    settings = test_x.shape[1], num_classes, lr, momentum, seed, epochs, process, test_x.device
    probes = [SoftmaxRegression(*settings) for _ in parts]
    rows = [slice(None) if part.all() else part for part in parts]
    for epoch in range(epochs):
        x, y = features(epoch)
        for probe, part in zip(probes, rows):
            probe.train_one_epoch(x[part], y[part])
    return [probe.predict(test_x) for probe in probes]


@torch.no_grad()
def knn(train_x, train_y, test_x, num_classes, k=KNN_K, temperature=KNN_TEMPERATURE, process=ALONE):
    """Predictions int64 [M] of the weighted nearest neighbours: the k of largest cosine vote with e^(cosine /
    temperature). Each rank gives its own share of the training and of the test features; the training
    features are gathered."""
    bank, train_y = F.normalize(process.gather(train_x), dim=1), process.gather(train_y)
    predictions = [train_y[:0]]
    for queries in F.normalize(test_x, dim=1).split(KNN_CHUNK):
        cosine, index = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # chunk x k
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest, lest it overflow
        votes = torch.zeros(len(queries), num_classes, device=bank.device, dtype=bank.dtype)
        predictions.append(votes.scatter_add_(1, train_y[index], weight).argmax(dim=1))
    return torch.cat(predictions)


def accuracy_rows(args, process, extract, probe, tested, tasks):
    """Rows of a[k][t], the accuracy on each task, by the protocol args.eval: "" that of one classifier; where
    domains are probed linearly, "linear_per_domain" that of one for each domain, which learns from its own
    images. extract: of an ImageSet and perhaps an epoch of augmented views, a function that gives this rank's
    features and labels; probe: the ImageSet to learn from; tested: extract(test); tasks.test: for each task
    int64 indices."""
    linear, augmented, count = args.eval == "linear", args.probe_views == "augmented", len(probe.classes)
    x, y = extract(probe, 0) if linear and augmented else extract(probe)
    known, labels = y >= 0, process.gather(tested[1])
    if not process.any_rank(known.any()) or not all((labels[part] >= 0).any() for part in tasks.test):
        raise UserError("no image to evaluate a task with can be read: is the disk there?")
    parts = [known]
    if linear and args.scenario == "domain" and probe.domains is not None and len(tasks.test) > 1:
        shares = process.collect(len(known))
        own = probe.domains[sum(shares[: process.rank]) :][: len(known)].to(known.device)
        parts += [known & (own == domain) for domain in range(len(tasks.test))]
    if linear:
        sgd = args.probe_lr, args.probe_momentum, args.seed, PROBE_EPOCHS, process
        features = lambda epoch: extract(probe, epoch) if augmented and epoch else (x, y)  # noqa: E731
        found = linear_probe(features, parts, tested[0], count, *sgd)
    else:
        found = [knn(x[known], y[known], tested[0], count, process=process)]
    joint, *others = map(process.gather, found)
    rows = {"": accuracy_row(joint, labels, tasks.test)}
    if others:
        own = zip(others, tasks.test)
        rows["linear_per_domain"] = [accuracy_row(found, labels, [part])[0] for found, part in own]
    return rows


def protocol_name(args, name=""):
    """The words that stand beside every number. name: of what is reported beside the numbers of --eval."""
    joint = "one classifier over all classes"
    if name.startswith("online"):
        modes = {"clean": "eval mode", "released": "training mode, as in the papers' tables"}
        how = f"learns beside the network, lr {args.online_lr:g}, on all labelled images in view 2's "
        how += f"augmentation, which pass through the network in {modes[args.online_probe]}"
        return f"online linear probe ({args.online_probe}): {how}; {joint}"
    if args.eval == "knn":
        setting = f"cosine, k {KNN_K} or all if fewer, temperature {KNN_TEMPERATURE}"
        return f"k-NN: {setting}; all classes, frozen features"
    crops = "random resized crop (0.08-1) and flip anew each epoch"
    views = crops if args.probe_views == "augmented" else "no augmentation"
    kind = "offline linear probe"
    if name == "linear_per_domain":
        kind += ", per domain"
        joint += " for each domain, which learns from that domain's images"
    sgd = f"SGD in float64, lr {args.probe_lr:g}, momentum {args.probe_momentum:g}, {PROBE_EPOCHS} epochs, "
    sgd += f"batch {PROBE_BATCH}, lr x 0.1 at epochs 60 and 80"
    return f"{kind}: {sgd}; {joint}; frozen network, {views}"


def accuracy_row(predictions, labels, parts):
    """Accuracy in percent on each task: a list of floats, one row of the matrix. predictions, labels: int64
    [M], labels -1 for none, which do not count; parts: for each task the int64 indices that it is tested
    on."""
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
    later = [[matrix[j][k] - single_task[k] for k in range(j + 1, count)] for j in range(count - 1)]
    return sum(sum(gaps) / len(gaps) for gaps in later) / (count - 1)


def summary(matrix, num_tasks, protocol, random_row=None, single_task=None):
    """The block of results.json: averages are of the tasks seen so far; what cannot be known yet is None."""
    seen = [row[: len(matrix)] for row in matrix]
    return {
        "matrix": matrix,
        "average_accuracy": average_accuracy(seen),
        "forgetting": forgetting(seen),
        "plasticity": plasticity(seen, single_task),
        "forward_transfer": forward_transfer(seen, random_row),
        "random_backbone": random_row,
        "protocol": protocol,
        "tasks": num_tasks,
    }


def blocks(args, run):
    """What results.json says of the protocols that are evaluated while training, by name; "" is --eval's."""
    words, rows = {name: protocol_name(args, name) for name in run.matrices}, run.random_rows
    return {name: summary(run.matrices[name], args.num_tasks, words[name], rows.get(name)) for name in words}


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
