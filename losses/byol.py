"""BYOL (Grill et al., NeurIPS 2020), and its CaSSLe and PNR terms (PNR, ICML 2024)."""

import torch.nn.functional as F

from losses.base import NonContrastive, over_views
from models.heads import mlp


def cosine_distance(a, b):
    """mean_i 2 - 2 cos(a_i, b_i). a, b: [N, D]."""
    return (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean()


class BYOL(NonContrastive):
    """A predictor of each view's projection is drawn to the EMA twin's projection of the other view."""

    lr, weight_decay, probe_lr = 1.0, 1e-5, 3.0

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--byol_hidden", type="count", default=4096, help="hidden width of the projector")
        parser.add_argument("--byol_dim", type="count", default=256, help="output dimension of the projector")
        parser.add_argument(
            "--byol_predictor_hidden",
            type="count",
            default=4096,
            help="hidden width of BYOL's own predictor q",
        )
        parser.add_argument("--byol_ema", type="fraction", nargs=2, default=(0.99, 1.0),
                            metavar=("BASE", "FINAL"), help="EMA tau of the momentum network at the start "
                            "and at the end of each task")  # fmt: skip
        parser.add_argument(
            "--byol_lambda_neg", type="weight", default=0.5, help="weight of PNR's pseudo-negatives"
        )

    def __init__(self, backbone, args):
        super().__init__(backbone)
        self.dim, self.ema, self.lambda_neg = args.byol_dim, args.byol_ema, args.byol_lambda_neg
        self.projector = mlp(backbone.feature_dim, args.byol_hidden, self.dim, norm=True)
        self.predictor = mlp(self.dim, args.byol_predictor_hidden, self.dim, norm=True)
        self.build_twin()

    def forward(self, views):
        out = super().forward(views)
        out.q = [self.predictor(z) for z in out.z]
        return out

    def ssl(self, out, negatives=None):
        """sum over v of 2 - 2 cos(q(z_v), k_v'), v' the other view."""
        return sum(cosine_distance(out.q[v], out.k[1 - v]) for v in (0, 1))

    def distill(self, pred, teacher):
        return over_views(cosine_distance, pred.z, teacher.z)

    def repel(self, pred, teacher):
        return over_views(cosine_distance, pred.z, teacher.z[::-1])
