"""What an SSL method and a regulariser are."""

import torch
from torch import nn

from models.frozen import ema_tau, ema_update, frozen_copy
from models.learner import Outputs


class Method(nn.Module):
    """An SSL method: a backbone, its heads and its losses.

    A subclass builds self.projector (and what else it needs) in __init__, gives the losses below, and
    declares flags of its own, each beginning with its name. All losses take Outputs of the global batch and
    return a scalar. A contrastive method gives `align`, the others `repel` and self.lambda_neg."""

    # the defaults of the flags of these names
    lr, weight_decay, probe_lr, online_lr = 0.6, 1e-4, 1.0, 0.1
    optimizer, lr_schedule = "lars", "epoch"
    warmup_start_lr = 0.003  # where the warm-up begins
    small = ""  # flags for a tiny network, as the tests want it
    exclude_bias_n_norm = True  # 1-D parameters skip LARS and weight decay
    contrastive = False  # whether the loss has negatives, to which PNR adds the other model's
    dim = None  # D, the projector's output dimension
    ema = None  # (base, final) of the momentum encoder's tau; None: there is none
    ema_tau = None  # of the last step

    @staticmethod
    def add_arguments(add):
        """Declares the method's flags by calls of add_argument; for ranges by name see utils/arguments.py."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def build_momentum_encoder(self):
        """Call at the end of __init__ where ema is set."""
        copies = {"backbone": frozen_copy(self.backbone), "projector": frozen_copy(self.projector)}
        self.momentum_encoder = nn.ModuleDict(copies)

    def forward(self, views):
        """[view 1, view 2], images [N, 3, S, S] each -> Outputs."""
        h = [self.backbone(view) for view in views]
        return Outputs(z=[self.projector(x) for x in h], h=h, k=self.momentum_outputs(views))

    @torch.no_grad()
    def momentum_outputs(self, views):
        if self.ema is None:
            return None
        return [self.momentum_encoder["projector"](self.momentum_encoder["backbone"](view)) for view in views]

    def predictor_input(self, z):
        """What the regulariser's predictor g gets to see."""
        return z

    def codes(self, h):
        """(int64 [N], number of codes) of features [N, F], for the collapse monitors; None where there are no
        codes."""

    def ssl(self, student, negatives=None):
        """The SSL loss. Contrastive: with the pseudo-negatives of `negatives`, the teacher's Outputs, in the
        denominator."""
        raise NotImplementedError

    def distill(self, predicted, teacher):
        """CaSSLe's term: draws p = g(z), in predicted.z, to the teacher's f, in teacher.z. Non-contrastive
        methods: lambda_d x mean over views of D(p_v, f_v), PNR's term too."""
        raise NotImplementedError

    def align(self, predicted, teacher, negatives=None):
        """PNR's term of a contrastive method: draws p to f and away from the teacher's other features; with
        `negatives`, the student's Outputs, also from the student's."""
        raise NotImplementedError

    def repel(self, predicted, teacher):
        """PNR's pseudo-negative of the others: mean over views of Dneg(p_v, f_v'), v' the other view."""
        raise NotImplementedError

    def after_step(self, student, progress):
        """After the optimiser's step; progress: the share of the task's steps done before it, 0 to 1. Moves
        the momentum encoder."""
        if self.ema is not None:
            self.ema_tau = ema_tau(progress, *self.ema)
            for part in ("backbone", "projector"):
                ema_update(self.momentum_encoder[part], getattr(self, part), self.ema_tau)


class Regularizer(nn.Module):
    """What keeps the old tasks. One that needs a teacher starts from losses/cassle.py."""

    uses_features = False  # whether its losses get the backbone's features, student.h

    @staticmethod
    def add_arguments(add):
        """Declares the regulariser's flags by calls of add_argument."""

    @staticmethod
    def resolve(args):
        """Fills in what the flags leave open."""

    def __init__(self, args):
        super().__init__()

    def check(self, method):
        """Raises UserError if the flags do not fit the method."""

    def begin_task(self, task, method, loader):
        """Before task >= 0: build what the task needs from the network as the previous task left it."""

    def teach(self, views):
        """The teacher's Outputs, or None while there is no teacher."""

    def predict(self, method, student):
        """Outputs whose z is p = g(z), or None while there is no teacher."""

    def losses(self, method, student, predicted, teacher):
        """The loss as a dict of named terms that are summed."""
        raise NotImplementedError

    def before_step(self, method):
        """With gradients in place (unscaled), before the optimiser's step."""

    def after_step(self, teacher):
        """After the optimiser's step, with the teacher's Outputs of that step."""

    def end_task(self, task, method, loader):
        """After a task's last step: keep what later tasks need, in buffers, so that it is saved."""


def over_views(distance, a, b):
    """Mean over the two views of distance(a_v, b_v). a, b: lists with one [N, D] tensor per view."""
    return (distance(a[0], b[0]) + distance(a[1], b[1])) / 2
