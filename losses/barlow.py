"""Barlow Twins (Zbontar et al., ICML 2021), and its CaSSLe and PNR terms (PNR, ICML 2024)."""

import torch.nn.functional as F

from losses.base import Method, over_views
from models.heads import deep_mlp


def barlow_loss(a, b, lambda_off, scale):
    """scale [sum_i (C_ii - 1)^2 + lambda_off sum_{i != j} C_ij^2], C the cross-correlation of a and b, [N, D]
    each."""
    a, b = (F.batch_norm(x, None, None, training=True, eps=1e-5) for x in (a, b))
    if 2 * len(a) <= a.shape[1]:  # the sum of all C_ij^2 is also that of a a^T * b b^T: N x N for D x D
        diagonal, squares = (a * b).mean(dim=0), ((a @ a.T) * (b @ b.T)).sum() / len(a) ** 2
    else:
        correlation = a.T @ b / len(a)
        diagonal, squares = correlation.diagonal(), correlation.square().sum()
    off_diagonal = squares - diagonal.square().sum()
    return scale * ((diagonal - 1).square().sum() + lambda_off * off_diagonal)


def negative_cosine(a, b):
    return -F.cosine_similarity(a, b, dim=1).mean()


class BarlowTwins(Method):
    """The cross-correlation of the two views' projections is drawn to the identity."""

    lr, weight_decay, probe_lr, online_lr = 0.4, 1e-4, 0.1, 0.1
    small = "--barlow_hidden 32 --barlow_dim 16"

    @staticmethod
    def add_arguments(add):
        add("--barlow_hidden", type=int, default=2048, help="hidden width of the projector")
        add("--barlow_dim", type=int, default=2048, help="output dimension of the projector")
        add("--barlow_lambda", type=float, default=5e-3, help="weight of the off-diagonal entries")
        add("--barlow_scale_loss", type=float, default=0.1, help="factor of the whole loss")
        add("--barlow_lambda_neg", type=float, default=1.0, help="weight of PNR's pseudo-negatives")

    def __init__(self, backbone, args):
        super().__init__(backbone)
        self.dim, self.lambda_neg = args.barlow_dim, args.barlow_lambda_neg
        self.lambda_off, self.scale = args.barlow_lambda, args.barlow_scale_loss
        self.projector = deep_mlp(backbone.feature_dim, args.barlow_hidden, self.dim)

    def loss(self, a, b):
        return barlow_loss(a, b, self.lambda_off, self.scale)

    def ssl(self, student, negatives=None):
        return self.loss(*student.z)

    def distill(self, predicted, teacher):
        return over_views(self.loss, predicted.z, teacher.z)

    def repel(self, predicted, teacher):
        return over_views(negative_cosine, predicted.z, teacher.z[::-1])
