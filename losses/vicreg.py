"""VICReg (Bardes et al., ICLR 2022), and its CaSSLe and PNR terms (PNR, ICML 2024)."""

import torch.nn.functional as F

from losses.base import NonContrastive, over_views
from models.heads import deep_mlp


def variance_loss(z):
    """mean over dimensions of relu(1 - sqrt(var + 1e-4)), unbiased variance over the batch. z: [N, D]."""
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def covariance_loss(z):
    """sum of the squared off-diagonal entries of the unbiased covariance, over D. z: [N, D]."""
    z = z - z.mean(dim=0)
    covariance = z.T @ z / (len(z) - 1)  # D x D
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


class VICReg(NonContrastive):
    """Invariance of the two views, variance of each dimension, no covariance between dimensions."""

    lr, weight_decay, probe_lr = 0.3, 1e-4, 0.3
    online_lr = 0.3

    @staticmethod
    def add_arguments(parser):
        parser.add_argument(
            "--vicreg_hidden", type="count", default=2048, help="hidden width of the projector"
        )
        parser.add_argument(
            "--vicreg_dim", type="count", default=2048, help="output dimension of the projector"
        )
        parser.add_argument(
            "--vicreg_invariance", type="weight", default=25.0, help="weight of the MSE between the views"
        )
        parser.add_argument(
            "--vicreg_variance", type="weight", default=25.0, help="raise it if feature_std falls"
        )
        parser.add_argument(
            "--vicreg_covariance", type="weight", default=1.0, help="weight of the covariance term"
        )
        parser.add_argument(
            "--vicreg_lambda_distill",
            type="weight",
            default=25.0,
            help="lambda_d, weight of CaSSLe's and PNR's MSE",
        )
        parser.add_argument(
            "--vicreg_lambda_neg", type="weight", default=23.0, help="weight of PNR's pseudo-negatives"
        )

    def __init__(self, backbone, args):
        super().__init__(backbone)
        self.dim, self.lambda_d, self.lambda_neg = (
            args.vicreg_dim,
            args.vicreg_lambda_distill,
            args.vicreg_lambda_neg,
        )
        self.weights = args.vicreg_invariance, args.vicreg_variance, args.vicreg_covariance
        self.projector = deep_mlp(backbone.feature_dim, args.vicreg_hidden, self.dim)

    def ssl(self, out, negatives=None):
        """25 MSE(z_1, z_2) + 25 sum over v of variance(z_v) + 1 sum over v of covariance(z_v)."""
        invariance, variance, covariance = self.weights
        return (
            invariance * F.mse_loss(*out.z)
            + variance * sum(variance_loss(z) for z in out.z)
            + covariance * sum(covariance_loss(z) for z in out.z)
        )

    def distill(self, pred, teacher):
        return self.lambda_d * over_views(F.mse_loss, pred.z, teacher.z)

    def repel(self, pred, teacher):
        return over_views(F.mse_loss, pred.z, teacher.z[::-1])
