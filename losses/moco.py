"""MoCo v2+ (Chen et al., 2020; symmetric, with one queue per view), and its CaSSLe and PNR terms (PNR, ICML
2024)."""

from dataclasses import replace

import torch.nn.functional as F

from losses.base import Method
from losses.contrastive import contrastive_distillation, info_nce
from models.heads import Queue, mlp
from utils import UserError


class MoCo(Method):
    """Momentum contrast: the other view's momentum key against a queue of earlier keys."""

    lr, weight_decay, probe_lr, online_lr = 0.6, 1e-4, 3.0, 0.3
    exclude_bias_n_norm, contrastive = False, True
    small = "--moco_queue_size 64 --moco_hidden 32 --moco_dim 16"

    @staticmethod
    def add_arguments(add):
        add("--moco_hidden", type=int, default=2048, help="hidden width of the projector")
        add("--moco_dim", type=int, default=128, help="output dimension of the projector")
        add("--moco_queue_size", type=int, default=65536, help="keys per view; lower it for small data sets")
        add("--moco_tau", type=float, default=0.2, help="temperature of the SSL loss")
        add("--moco_tau_distill", type=float, default=0.2, help="tau_d, temperature with CaSSLe and PNR")
        add("--moco_ema", type=float, nargs=2, default=(0.99, 0.999), metavar=("BASE", "FINAL"),
            help="EMA tau of the momentum encoder at the start and at the end of each task")  # fmt: skip

    def __init__(self, backbone, args):
        size = args.moco_queue_size
        if size < args.batch_size:
            raise UserError(f"--moco_queue_size {size} is below --batch_size {args.batch_size}: raise it")
        super().__init__(backbone)
        self.dim, self.ema = args.moco_dim, args.moco_ema
        self.tau, self.tau_d = args.moco_tau, args.moco_tau_distill
        self.projector = mlp(backbone.feature_dim, args.moco_hidden, self.dim)
        self.queue = Queue(size, self.dim)
        self.build_momentum_encoder()

    def forward(self, views):
        return replace(super().forward(views), queue=self.queue.rows)

    def predictor_input(self, z):
        return F.normalize(z, dim=1)

    def ssl(self, student, negatives=None):
        """1/2 sum over v of NCE(z_v; +k_v'; -[Q^k_v', Q^f_v'], tau), v' the other view; Q^f only with
        pseudo-negatives."""
        queues = [student.queue] if negatives is None else [student.queue, negatives.queue]
        z, k = student.z, student.k
        return sum(info_nce(z[v], k[1 - v], [q[1 - v] for q in queues], self.tau) for v in (0, 1)) / 2

    def distill(self, predicted, teacher):
        return contrastive_distillation(predicted.z, teacher.z, self.tau_d)

    def align(self, predicted, teacher, negatives=None):
        """1/2 sum over v of NCE(p_v; +f_v; -[Q^k_v', Q^f_v'], tau_d), v' the other view; Q^k only with
        pseudo-negatives."""
        queues = [teacher.queue] if negatives is None else [negatives.queue, teacher.queue]
        p, f = predicted.z, teacher.z
        return sum(info_nce(p[v], f[v], [q[1 - v] for q in queues], self.tau_d) for v in (0, 1)) / 2

    def after_step(self, student, progress):
        super().after_step(student, progress)
        self.queue.enqueue(*student.k)
