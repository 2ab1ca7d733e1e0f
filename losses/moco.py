"""MoCo v2+ (Chen et al., 2020; symmetric, with one queue per view), and its CaSSLe and PNR terms (PNR, ICML
2024)."""

import torch.nn.functional as F

from losses.base import Method, MethodError, Outputs
from losses.contrastive import contrastive_distillation, info_nce
from models.heads import Queue, mlp


class MoCo(Method):
    """Momentum contrast: the other view's momentum key against a queue of earlier keys."""

    lr, weight_decay, probe_lr = 0.6, 1e-4, 3.0
    exclude_bias_n_norm = False
    online_lr = 0.3

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--moco_hidden", type="count", default=2048, help="hidden width of the projector")
        parser.add_argument("--moco_dim", type="count", default=128, help="output dimension of the projector")
        parser.add_argument(
            "--moco_queue_size",
            type="count",
            default=65536,
            help="keys per view; lower it for small data sets",
        )
        parser.add_argument("--moco_tau", type="positive", default=0.2, help="temperature of the SSL loss")
        parser.add_argument(
            "--moco_tau_distill",
            type="positive",
            default=0.2,
            help="temperature tau_d of the CaSSLe and PNR terms",
        )
        parser.add_argument("--moco_ema", type="fraction", nargs=2, default=(0.99, 0.999),
                            metavar=("BASE", "FINAL"), help="EMA tau of the momentum network at the start "
                            "and at the end of each task")  # fmt: skip

    def __init__(self, backbone, args):
        if args.moco_queue_size < args.batch_size:
            raise MethodError(
                f"--moco_queue_size {args.moco_queue_size} is smaller than --batch_size {args.batch_size}: "
                "raise it"
            )
        super().__init__(backbone)
        self.dim, self.ema = args.moco_dim, args.moco_ema
        self.tau, self.tau_d = args.moco_tau, args.moco_tau_distill
        self.projector = mlp(backbone.feature_dim, args.moco_hidden, self.dim)
        self.queue = Queue(args.moco_queue_size, self.dim)
        self.build_twin()

    def forward(self, views):
        out = super().forward(views)
        return Outputs(z=out.z, k=out.k, queue=self.queue.rows)

    def predictor_input(self, z):
        return F.normalize(z, dim=1)

    def ssl(self, out, negatives=None):
        """1/2 sum over v of NCE(z_v; +k_v'; -[Q^k_v', Q^f_v'], tau), v' the other view; Q^f only with
        pseudo-negatives."""
        queues = [out.queue] if negatives is None else [out.queue, negatives.queue]
        return sum(info_nce(out.z[v], out.k[1 - v], [q[1 - v] for q in queues], self.tau) for v in (0, 1)) / 2

    def distill(self, pred, teacher):
        return contrastive_distillation(pred.z, teacher.z, self.tau_d)

    def align(self, pred, teacher, negatives=None):
        """1/2 sum over v of NCE(p_v; +f_v; -[Q^k_v', Q^f_v'], tau_d), v' the other view; Q^k only with
        pseudo-negatives."""
        queues = [teacher.queue] if negatives is None else [negatives.queue, teacher.queue]
        return (
            sum(info_nce(pred.z[v], teacher.z[v], [q[1 - v] for q in queues], self.tau_d) for v in (0, 1)) / 2
        )

    def after_step(self, out, progress):
        super().after_step(out, progress)
        self.queue.enqueue(*out.k)
