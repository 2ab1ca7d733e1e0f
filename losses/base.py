"""What an SSL method and a regulariser are, and the module that holds both."""

from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from models.parallel import full_precision, gather, sync_batch_norms, world_size
from models.twins import ema_tau, ema_update, frozen_copy


@dataclass
class Outputs:
    """What one network says of a batch; each field is a list with one [N, .] tensor per view, or None.

    z: projections (of the student, or of the teacher, where the equations write f); k: projections of the EMA
    twin; q: what BYOL's own predictor makes of z; queue: [2, K, D] unit rows of earlier batches, one set for
    each view.
    """

    z: list
    k: list | None = None
    q: list | None = None
    queue: torch.Tensor | None = None

    def of_all_ranks(self):
        """The outputs for the global batch, in full precision: losses are computed in float32, or in float64
        if so given."""
        lists = {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), list)
        }
        return replace(
            self, **{name: [gather(full_precision(x)) for x in views] for name, views in lists.items()}
        )


class MethodError(ValueError):
    """Arguments of a method or regulariser that do not fit; the message says which and what to do."""


class Method(nn.Module):
    """An SSL method: a backbone, its heads and its losses.

    A subclass builds self.projector (and what else it needs) in __init__, gives the losses below, and
    declares flags of its own, each beginning with its name. All losses take Outputs of the global batch and
    return a scalar.
    """

    lr, weight_decay, probe_lr = 0.6, 1e-4, 1.0  # the defaults of --lr, --weight_decay and --probe_lr
    online_lr = 0.1  # the default of --online_lr
    optimizer = "lars"  # the default of --optimizer
    lr_schedule, warmup_start_lr = (
        "epoch",
        0.003,
    )  # the default of --lr_schedule, and where the warm-up begins
    exclude_bias_n_norm = True  # 1-D parameters skip LARS and weight decay
    dim = None  # D, the projector's output dimension
    ema = None  # (base, final) of the EMA twin's tau; None: no twin
    ema_tau = None  # of the last step

    @staticmethod
    def add_arguments(parser):
        """Declares the method's flags on an argparse group; for types by name see utils/arguments.py."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def build_twin(self):
        """Call at the end of __init__ where ema is set."""
        self.twin = nn.ModuleDict(
            {"backbone": frozen_copy(self.backbone), "projector": frozen_copy(self.projector)}
        )

    def forward(self, views):
        """[view 1, view 2], images [N, 3, S, S] each -> Outputs."""
        z = [self.projector(self.backbone(view)) for view in views]
        return Outputs(z=z, k=self.momentum_outputs(views))

    @torch.no_grad()
    def momentum_outputs(self, views):
        if self.ema is None:
            return None
        return [self.twin["projector"](self.twin["backbone"](view)) for view in views]

    def predictor_input(self, z):
        """What the regulariser's predictor g gets to see."""
        return z

    def codes(self, h):
        """(int64 [N], number of codes) of backbone features [N, F], for the collapse monitors; None where
        there are no codes."""

    def ssl(self, out, negatives=None):
        """The SSL loss. Contrastive methods put the pseudo-negatives of `negatives`, the teacher's Outputs,
        in its denominator."""
        raise NotImplementedError

    def distill(self, pred, teacher):
        """CaSSLe's term: draws p = g(z) in pred.z to the teacher's f in teacher.z, both Outputs."""
        raise NotImplementedError

    def align(self, pred, teacher, negatives=None):
        """PNR's term: like distill, away from the pseudo-negatives of `negatives`, the student's Outputs."""
        raise NotImplementedError

    def after_step(self, out, progress):
        """After the optimiser's step; progress: the share of the task's steps done, 0 to 1. Moves the EMA
        twin."""
        if self.ema is not None:
            self.ema_tau = ema_tau(progress, *self.ema)
            ema_update(self.twin["backbone"], self.backbone, self.ema_tau)
            ema_update(self.twin["projector"], self.projector, self.ema_tau)


class NonContrastive(Method):
    """A method without negatives: PNR's pseudo-negative is the teacher's feature of the other view, kept at a
    distance.

    A subclass gives distill = lambda_d x mean over views of D(p_v, f_v), repel = mean over views of Dneg(p_v,
    f_v'), and self.lambda_neg.
    """

    def repel(self, pred, teacher):
        """Dneg(p_v, f_v'), v' the other view, mean over views."""
        raise NotImplementedError

    def align(self, pred, teacher, negatives=None):
        """distill - lambda_neg x repel; just distill without pseudo-negatives."""
        attract = self.distill(pred, teacher)
        return attract if negatives is None else attract - self.lambda_neg * self.repel(pred, teacher)


def over_views(distance, a, b):
    """Mean over the two views of distance(a_v, b_v). a, b: lists with one [N, D] tensor per view."""
    return (distance(a[0], b[0]) + distance(a[1], b[1])) / 2


class Regularizer(nn.Module):
    """What keeps the old tasks. One that needs a teacher overrides all of this; see losses/cassle.py."""

    @staticmethod
    def add_arguments(parser):
        """Declares the regulariser's flags on an argparse group."""

    @staticmethod
    def resolve(args):
        """Fills in what the flags leave open."""

    def __init__(self, args):
        super().__init__()

    def check(self, method):
        """Raises MethodError if the flags do not fit the method."""

    def begin_task(self, task, method):
        """Before task >= 0: build what the task needs from the network as the previous task left it."""

    def teach(self, views):
        """The teacher's Outputs, or None while there is no teacher."""

    def predict(self, method, out):
        """Outputs whose z is p = g(z), or None while there is no teacher."""

    def losses(self, method, out, pred, old):
        """The loss as a dict of named terms that are summed."""
        raise NotImplementedError

    def after_step(self, old):
        """After the optimiser's step, with the teacher's Outputs of that step."""


class Learner(nn.Module):
    """Method, regulariser and online probe (or None) together: the module that DDP wraps and that last.pt
    holds."""

    def __init__(self, method, regularizer, online=None, autocast_dtype=None):
        super().__init__()
        regularizer.check(method)
        self.method, self.regularizer, self.online, self.autocast_dtype = (
            method,
            regularizer,
            online,
            autocast_dtype,
        )

    def begin_task(self, task, device):
        """Fits the module to the task; the random parts come from torch's seed."""
        self.regularizer.begin_task(task, self.method)
        self.to(device)
        if world_size() > 1:
            sync_batch_norms(self, device)
        self.train()

    def forward(self, view1, view2, labelled=None):
        """Two views of a batch, and for the online probe labelled images and their labels -> (what backward
        is called on; by name the loss, its terms and what the probe measures; the student's Outputs; the
        teacher's Outputs or None)."""
        views, device = [view1, view2], view1.device.type
        with torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            out = self.method(views)
            old = self.regularizer.teach(views)
            pred = self.regularizer.predict(self.method, out)
            features = None if labelled is None else self.online.features(self.method, labelled[0])
        out, old, pred = (None if o is None else o.of_all_ranks() for o in (out, old, pred))
        with torch.autocast(device, enabled=False):
            terms = self.regularizer.losses(self.method, out, pred, old)
            loss = sum(terms.values())
            probed = {} if labelled is None else self.online(features, labelled[1])
            return loss + probed.get("online_loss", 0), {"loss": loss, **terms, **probed}, out, old

    def after_step(self, out, old, progress):
        """After the optimiser's step: the EMA twin moves, this batch enters the queues."""
        self.method.after_step(out, progress)
        self.regularizer.after_step(old)
