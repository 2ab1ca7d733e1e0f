"""Features of a frozen network, linear probe and k-NN on them, the accuracy matrix a[k][t], and what is read
off it."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from data.loader import evaluation_batches
from models.learner import DTYPES
from utils import UserError
from utils.distributed import Process
from utils.metrics import reference_row, summary

ALONE = Process(torch.device("cpu"))
PROBE_EPOCHS, PROBE_BATCH, PROBE_DROPS = 100, 256, (60, 80)
# --probe_lr sweep: rates, and the epochs that tell them apart
SWEEP, SWEEP_EPOCHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), 60
SMALL_STEP = 2**26  # multiplications
KNN_K, KNN_TEMPERATURE, KNN_CHUNK = 200, 0.07, 512


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


@contextmanager
def threads_that_pay(work):
    """On the CPU one thread for small steps: several wait for each other, and where another program is at
    work that takes many times as long. work: multiplications of a step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if work < SMALL_STEP else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class SoftmaxRegression:
    """Linear classifiers that start from zero, one for each of R rates, on the same batches: SGD with
    momentum and without weight decay, lr x 0.1 at 60 % and 80 % of the epochs. Each rank gives its own share
    of the features; a batch is drawn from all shares, its gradient summed over ranks."""

    def __init__(self, dim, num_classes, rates, momentum, seed, epochs, process, dtype=torch.float64):
        # at the papers' rates training amplifies rounding to a point of accuracy; in float64 the sums' order
        # does not show
        self.count, self.classes, device = len(rates), num_classes, process.device
        self.weight = torch.zeros(len(rates) * num_classes, dim, device=device, dtype=dtype)
        self.bias, self.momentum = torch.zeros_like(self.weight[:, 0]), momentum
        self.velocities = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.lr = torch.tensor(rates, device=device, dtype=dtype).repeat_interleave(num_classes)
        self.rng, self.process, self.epoch = torch.Generator().manual_seed(seed), process, 0
        self.drops = [epochs * drop // PROBE_EPOCHS for drop in PROBE_DROPS]

    def logits(self, x):
        """[n, R, C] of features [n, F]."""
        x = x.to(self.weight.dtype)
        return torch.addmm(self.bias, x, self.weight.T).view(-1, self.count, self.classes)

    @torch.no_grad()
    def train_one_epoch(self, x, y):
        """x: features [n, F], y: labels int64 [n], of this rank."""
        counts = self.process.collect(len(x))
        first, total = sum(counts[: self.process.rank]), sum(counts)
        order = torch.randperm(total, generator=self.rng) - first
        own = (order >= 0) & (order < len(x))
        sizes = [int(part.sum()) for part in own.split(PROBE_BATCH)]
        lr = self.lr * 0.1 ** sum(self.epoch >= drop for drop in self.drops)
        with threads_that_pay(PROBE_BATCH * self.weight.numel()):
            self.train_batches(x, y, order[own].to(x.device).split(sizes), lr, total)
        self.epoch += 1

    def train_batches(self, x, y, batches, lr, total):
        """batches: rows of x; total: their number on all ranks."""
        for step, rows in enumerate(batches):
            batch, size = x[rows].to(self.weight.dtype), min(PROBE_BATCH, total - step * PROBE_BATCH)
            # the gradient of cross-entropy with respect to the logits: softmax less one-hot
            error = self.logits(batch).softmax(dim=2)
            where = y[rows].view(-1, 1, 1).expand(-1, self.count, 1)
            error = error.scatter_add_(2, where, -torch.ones_like(error[..., :1])).flatten(1).div_(size)
            error = F.hardshrink(error, 1e-20)  # a CPU is slow with denormal numbers
            gradients = error.T @ batch, error.sum(dim=0)
            self.process.sum(*gradients)
            for velocity, gradient in zip(self.velocities, gradients):
                velocity.mul_(self.momentum).add_(gradient)
            self.weight.addcmul_(lr.unsqueeze(1), self.velocities[0], value=-1)
            self.bias.addcmul_(lr, self.velocities[1], value=-1)


def linear_probe(features, parts, test_x, num_classes, lr, momentum, seed, epochs, process=ALONE):
    """Probabilities float64 [M, C] for test_x by one SoftmaxRegression over all classes for each of the
    parts, in a list. features: of an epoch (0, 1, ...), a function that returns float [N, F] and labels int64
    [N]; parts: bool [N], the rows that a classifier learns from. All are this rank's share, of which the
    probabilities are, too. Raises UserError if the training diverges."""
    settings = test_x.shape[1], num_classes, [lr], momentum, seed, epochs, process
    probes = [SoftmaxRegression(*settings) for _ in parts]
    rows = [slice(None) if part.all() else part for part in parts]
    for epoch in range(epochs):
        x, y = features(epoch)
        for probe, part in zip(probes, rows):
            probe.train_one_epoch(x[part], y[part])
    logits = [probe.logits(test_x)[:, 0] for probe in probes]
    if process.any_rank(not all(x.isfinite().all() for x in logits)):
        rates = f"--probe_lr {lr:g} with --probe_momentum {momentum:g}"
        raise UserError(f"the linear probe diverged at {rates}: lower them")
    return [x.softmax(dim=1) for x in logits]


def choose_lr(features, part, num_classes, momentum, seed, process=ALONE):
    """Of SWEEP the rate whose classifier is best on a tenth of the training data that it did not learn from.
    All rates are tried at once, in float32, for SWEEP_EPOCHS. features, part: as in `linear_probe`."""
    counts = process.collect(len(part))
    held_out = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)) % 10 == 0
    held_out = held_out[sum(counts[: process.rank]) :][: len(part)].to(part.device)
    settings = num_classes, SWEEP, momentum, seed, SWEEP_EPOCHS, process, torch.float32
    probes = SoftmaxRegression(features(0)[0].shape[1], *settings)
    for epoch in range(SWEEP_EPOCHS):
        x, y = features(epoch)
        probes.train_one_epoch(x[part & ~held_out], y[part & ~held_out])
    x, y = (values[part & held_out] for values in features(0))
    logits = probes.logits(x)
    finite = logits.isfinite().all(dim=2).all(dim=0)
    correct = torch.where(finite, (logits.argmax(dim=2) == y.unsqueeze(1)).sum(dim=0), -(2**31))
    process.sum(correct)
    return SWEEP[int(correct.argmax())]


@torch.no_grad()
def knn(train_x, train_y, test_x, num_classes, ks=(KNN_K,), temperature=KNN_TEMPERATURE, process=ALONE,
        groups=None):  # fmt: skip
    """For each k of ks the votes float [M, C] of the weighted nearest neighbours: the k of largest cosine
    vote with e^(cosine / temperature). Each rank gives its own share of the training and of the test
    features; the training features are gathered. groups: int64 [N] and [M], where neighbours are to be of the
    same group. Source: Wu et al. (CVPR 2018)."""
    bank, train_y = F.normalize(process.gather(train_x), dim=1), process.gather(train_y)
    owner = None if groups is None else process.gather(groups[0])
    votes = [test_x.new_zeros(len(test_x), num_classes) for _ in ks]
    for start in range(0, len(test_x), KNN_CHUNK):
        rows = slice(start, start + KNN_CHUNK)
        similarity = F.normalize(test_x[rows], dim=1) @ bank.T
        if groups is not None:
            similarity.masked_fill_(owner != groups[1][rows].unsqueeze(1), -torch.inf)
        cosine, index = similarity.topk(min(max(ks), len(bank)), dim=1)  # chunk x k
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest, lest it overflow
        for k, found in zip(ks, votes):
            found[rows].scatter_add_(1, train_y[index[:, :k]], weight[:, :k])
    return votes


def training_rows(args, process, probe, known, tasks):
    """For each linear classifier the rows, bool [N], that it learns from: all that are known, but in a
    sequence of data sets; and those of each domain. known: bool [N], of this rank's share of probe."""
    parts, domains = [] if args.sequence else [known], probe.domains
    if args.sequence or (args.scenario == "domain" and domains is not None and len(tasks.test) > 1):
        shares = process.collect(len(known))
        own = domains[sum(shares[: process.rank]) :][: len(known)].to(known.device)
        parts += [known & (own == domain) for domain in range(len(tasks.test))]
    return parts


def accuracy_rows(args, process, extract, probe, tested, tasks, ks=(KNN_K,), task_masked=False):
    """Rows of a[k][t], the accuracy on each task, by the protocol args.eval: "" that of one classifier; where
    domains are probed linearly, "linear_per_domain" that of one for each domain, which learns from its own
    images; "k20" that of k-NN with another k than the first. extract: of an ImageSet and perhaps an epoch of
    augmented views, a function that gives this rank's features and labels; probe: the ImageSet to learn from;
    tested: extract(test); tasks.test: for each task int64 indices.

    task_masked, where each task has its own classes: beside each row two more, "task_masked", the accuracy
    among the task's own classes, and "task_level", how often the task itself is found, the classes' scores
    summed. With args.probe_lr "sweep" also "probe_lr", no row but the rate that was chosen."""
    linear, augmented, count = args.eval == "linear", args.probe_views == "augmented", len(probe.classes)
    x, y = extract(probe, 0) if linear and augmented else extract(probe)
    known, labels = y >= 0, process.gather(tested[1])
    if not process.any_rank(known.any()) or not all((labels[part] >= 0).any() for part in tasks.test):
        raise UserError("no image to evaluate a task with can be read: is the disk there?")
    separate = bool(args.sequence)
    if separate or task_masked:  # the task of each class, of what is learnt from, and of what is tested
        owner = owners(tasks, probe)
        groups = owner[y[known]], torch.where(tested[1] >= 0, owner[tested[1]], -1)
    if linear:
        features = lambda epoch: extract(probe, epoch) if augmented and epoch else (x, y)  # noqa: E731
        sgd, lr = (args.probe_momentum, args.seed), args.probe_lr
        lr = choose_lr(features, known, count, *sgd, process) if lr == "sweep" else lr
        parts = training_rows(args, process, probe, known, tasks)
        found = linear_probe(features, parts, tested[0], count, lr, *sgd, PROBE_EPOCHS, process)
        if separate:  # of each image the scores by its own set's classifier
            scores = torch.stack(found)[groups[1], torch.arange(len(groups[1]), device=y.device)]
            found = [scores.masked_fill(owner != groups[1].unsqueeze(1), 0)]
    else:
        learnt = x[known], y[known], tested[0], count, ks, KNN_TEMPERATURE, process
        found = knn(*learnt, groups if separate else None)
    joint, *others = map(process.gather, found)
    scores, rows = {"": joint} | ({} if linear else {f"k{k}": x for k, x in zip(ks[1:], others)}), {}
    masked = scores
    if task_masked and not linear:  # the neighbours, too, are of the task
        masked = dict(zip(scores, map(process.gather, knn(*learnt, groups))))
    for name, values in scores.items():
        rows[name] = accuracy_row(values.argmax(dim=1), labels, tasks.test)
        if task_masked:
            names = (f"{name} {kind}".strip() for kind in ("task_masked", "task_level"))
            rows |= zip(names, task_rows(values, labels, tasks.test, owner, masked[name]))
    if linear and others:
        own = zip(others, tasks.test)
        rows["linear_per_domain"] = [accuracy_row(x.argmax(dim=1), labels, [part])[0] for x, part in own]
    if linear and args.probe_lr == "sweep":
        rows["probe_lr"] = [lr]
    return rows


def owners(tasks, probe):
    """The task of each class: int64 [C]. probe: the ImageSet to learn from."""
    if isinstance(tasks.names[0], list):
        task_of = {name: task for task, names in enumerate(tasks.names) for name in names}
        return torch.tensor([task_of[name] for name in probe.classes], device=probe.labels.device)
    domains = probe.domains.to(probe.labels.device)  # of --sequence
    return torch.zeros_like(domains[: len(probe.classes)]).scatter(0, probe.labels, domains)


def task_rows(scores, labels, parts, owner, masked):
    """The rows of task-incremental and of task-level accuracy from scores [M, C] over all classes. parts: as
    in `accuracy_row`; owner: the task of each class, int64 [C]; masked: the scores from which the task's own
    classes are read for the first."""
    task_of = torch.where(labels >= 0, owner[labels], -1)
    found = masked.masked_fill(owner != task_of.unsqueeze(1), -torch.inf).argmax(dim=1)
    sums = scores.new_zeros(len(scores), len(parts)).index_add_(1, owner, scores)
    return accuracy_row(found, labels, parts), accuracy_row(sums.argmax(dim=1), task_of, parts)


def clustering(features, labels, num_clusters, seed, codes=None):
    """{"nmi", "ari", "accuracy"}, in percent, of k-means on features [N, F] against labels int64 [N], and
    "codes_nmi", ... of FALCON's codes int64 [N], where there are any. NMI: normalised mutual information;
    ARI: adjusted Rand index; accuracy: with the best one-to-one match of clusters and classes (Hungarian
    method)."""
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    from sklearn.cluster import KMeans

    known = (labels >= 0).cpu()
    x, y = features.cpu()[known].numpy(), labels.cpu()[known].numpy()
    clusters = {"": KMeans(num_clusters, n_init=5, random_state=seed).fit_predict(x)}
    if codes is not None:
        clusters["codes_"] = codes.cpu()[known].numpy()
    scores = {}
    for name, found in clusters.items():
        table = metrics.cluster.contingency_matrix(y, found)
        scores[f"{name}nmi"] = metrics.normalized_mutual_info_score(y, found)
        scores[f"{name}ari"] = metrics.adjusted_rand_score(y, found)
        scores[f"{name}accuracy"] = table[linear_sum_assignment(-table)].sum() / len(y)
    return {name: round(100 * float(score), 4) for name, score in scores.items()}


def protocol_name(args, name=""):
    """The words that stand beside every number. name: of what is reported beside the numbers of --eval."""
    joint = "one classifier over all classes"
    mean, std = (" ".join(f"{x:g}" for x in values) for values in args.normalize)
    images = f"images normalised by mean {mean}, deviation {std}"
    if name.startswith("online"):
        modes = {"clean": "eval mode", "released": "training mode, as in the papers' tables"}
        how = f"learns beside the network, lr {args.online_lr:g}, on all labelled images in view 2's "
        how += f"augmentation, which pass through the network in {modes[args.online_probe]}"
        return f"online linear probe ({args.online_probe}): {how}; {joint}; {images}"
    linear = args.eval == "linear"
    if args.sequence:
        joint = "a classifier for each data set, over its classes"
    k, kind = (name[1:].partition(" ")[::2]) if name.startswith("k") else (KNN_K, name)
    own = f"at test among the task's own classes of {joint}"
    own = own if linear else "neighbours of the task's own classes"
    name, joint = {
        "task_masked": (", task-masked", own),
        "task_level": (", task level", f"{joint}, whose scores are summed for each task"),
        "linear_per_domain": (", per domain", f"{joint} for each domain, which learns from its images"),
    }.get(kind, ("", joint))
    if args.eval == "clustering":
        how = "k-means, as many clusters as classes, on the test features (codes_: FALCON's codes instead)"
        return f"clustering: {how}; accuracy of the best match of clusters and classes; {images}"
    if args.eval == "knn":
        return f"k-NN{name}: cosine, k {k} or all if fewer, temperature {KNN_TEMPERATURE}; {joint}; {images}"
    crops = "random resized crop (0.08-1) and flip anew each epoch"
    views = crops if args.probe_views == "augmented" else "no augmentation"
    lr = f"lr {args.probe_lr}"
    if args.probe_lr == "sweep":
        lr = f"lr of {SWEEP} chosen for each network, all domains together, on a held-out tenth of the "
        lr += f"training data (in float32, {SWEEP_EPOCHS} epochs)"
    sgd = f"SGD in float64, {lr}, momentum {args.probe_momentum:g}, {PROBE_EPOCHS} epochs, "
    sgd += f"batch {PROBE_BATCH}, lr x 0.1 at epochs 60 and 80"
    return f"offline linear probe{name}: {sgd}; {joint}; frozen network, {views}; {images}"


def accuracy_row(predictions, labels, parts):
    """Accuracy in percent on each task: a list of floats, one row of the matrix. predictions, labels: int64
    [M], labels -1 for none, which do not count; parts: for each task the int64 indices that it is tested
    on."""
    correct, known = (predictions == labels).double().cpu(), (labels >= 0).cpu()
    return [round(100 * correct[part][known[part]].mean().item(), 4) for part in parts]


def blocks(args, run):
    """What results.json says of the protocols that are evaluated while training, by name; "" is --eval's."""
    found = {}
    for name, matrix in run.matrices.items():
        words, random_row = protocol_name(args, name), run.random_rows.get(name)
        single_task = args.reference and reference_row(args.reference, name, words, vars(args))
        found[name] = summary(matrix, args.num_tasks, words, random_row, single_task, args.single_tasks)
    return found
