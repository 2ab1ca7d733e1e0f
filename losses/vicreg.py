"""VICReg (Bardes et al., ICLR 2022), and its CaSSLe and PNR terms (PNR, ICML 2024)."""

import torch.nn.functional as F

from losses.base import Method, over_views
from models.heads import deep_mlp


def variance_loss(z):
    """mean over dimensions of relu(1 - sqrt(var + 1e-4)), unbiased variance over the batch. z: [N, D]."""
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def covariance_loss(z):
    """sum of the squared off-diagonal entries of the unbiased covariance, over D. z: [N, D]."""
    z = z - z.mean(dim=0)
    if len(z) < z.shape[1]:  # the sum of all squared entries is also that of z z^T: N x N for D x D
        product, diagonal = z @ z.T, z.square().sum(dim=0)
    else:
        product = z.T @ z
        diagonal = product.diagonal()
    return (product.square().sum() - diagonal.square().sum()) / (len(z) - 1) ** 2 / z.shape[1]


class VICReg(Method):
    """Invariance of the two views, variance of each dimension, no covariance between dimensions."""

    lr, weight_decay, probe_lr, online_lr = 0.3, 1e-4, 0.3, 0.3
    small = "--vicreg_hidden 32 --vicreg_dim 16"

    @staticmethod
    def add_arguments(add):
        add("--vicreg_hidden", type=int, default=2048, help="hidden width of the projector")
        add("--vicreg_dim", type=int, default=2048, help="output dimension of the projector")
        add("--vicreg_invariance", type=float, default=25.0, help="weight of the MSE between the views")
        add("--vicreg_variance", type=float, default=25.0, help="raise it if feature_std falls")
        add("--vicreg_covariance", type=float, default=1.0, help="weight of the covariance term")
        add("--vicreg_lambda_distill", type=float, default=25.0, help="weight of CaSSLe's and PNR's MSE")
        add("--vicreg_lambda_neg", type=float, default=23.0, help="weight of PNR's pseudo-negatives")

    def __init__(self, backbone, args):
        super().__init__(backbone)
        self.dim, self.lambda_d = args.vicreg_dim, args.vicreg_lambda_distill
        self.lambda_neg = args.vicreg_lambda_neg
        self.weights = args.vicreg_invariance, args.vicreg_variance, args.vicreg_covariance
        self.projector = deep_mlp(backbone.feature_dim, args.vicreg_hidden, self.dim)

    def ssl(self, student, negatives=None):
        """25 MSE(z_1, z_2) + 25 sum over v of variance(z_v) + 1 sum over v of covariance(z_v)."""
        invariance, variance, covariance = self.weights
        return (
            invariance * F.mse_loss(*student.z)
            + variance * sum(variance_loss(z) for z in student.z)
            + covariance * sum(covariance_loss(z) for z in student.z)
        )

    def distill(self, predicted, teacher):
        return self.lambda_d * over_views(F.mse_loss, predicted.z, teacher.z)

    def repel(self, predicted, teacher):
        return over_views(F.mse_loss, predicted.z, teacher.z[::-1])
