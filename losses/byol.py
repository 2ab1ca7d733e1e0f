"""BYOL (Grill et al., NeurIPS 2020), and its CaSSLe and PNR terms (PNR, ICML 2024)."""

import torch.nn.functional as F

from losses.base import Method, over_views
from models.heads import mlp


def cosine_distance(a, b):
    """mean_i 2 - 2 cos(a_i, b_i). a, b: [N, D]."""
    return (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean()


class BYOL(Method):
    """A predictor of each view's projection is drawn to the momentum encoder's projection of the other
    view."""

    lr, weight_decay, probe_lr, online_lr = 1.0, 1e-5, 3.0, 0.1
    small = "--byol_hidden 32 --byol_dim 16 --byol_predictor_hidden 32"

    @staticmethod
    def add_arguments(add):
        add("--byol_hidden", type=int, default=4096, help="hidden width of the projector")
        add("--byol_dim", type=int, default=256, help="output dimension of the projector")
        add("--byol_predictor_hidden", type=int, default=4096, help="hidden width of BYOL's own predictor q")
        add("--byol_ema", type=float, nargs=2, default=(0.99, 1.0), metavar=("BASE", "FINAL"),
            help="EMA tau of the momentum encoder at the start and at the end of each task")  # fmt: skip
        add("--byol_lambda_neg", type=float, default=0.5, help="weight of PNR's pseudo-negatives")

    def __init__(self, backbone, args):
        super().__init__(backbone)
        self.dim, self.ema, self.lambda_neg = args.byol_dim, args.byol_ema, args.byol_lambda_neg
        self.projector = mlp(backbone.feature_dim, args.byol_hidden, self.dim, norm=True)
        self.predictor = mlp(self.dim, args.byol_predictor_hidden, self.dim, norm=True)
        self.build_momentum_encoder()

    def forward(self, views):
        student = super().forward(views)
        student.q = [self.predictor(z) for z in student.z]
        return student

    def ssl(self, student, negatives=None):
        """sum over v of 2 - 2 cos(q(z_v), k_v'), v' the other view."""
        return sum(cosine_distance(student.q[v], student.k[1 - v]) for v in (0, 1))

    def distill(self, predicted, teacher):
        return over_views(cosine_distance, predicted.z, teacher.z)

    def repel(self, predicted, teacher):
        return over_views(cosine_distance, predicted.z, teacher.z[::-1])
