"""SimCLR (Chen et al., ICML 2020), and its CaSSLe and PNR terms (PNR, ICML 2024)."""

import torch
import torch.nn.functional as F

from losses.base import Method
from losses.contrastive import contrastive_distillation, lse_of_others
from models.heads import mlp


class SimCLR(Method):
    """NT-Xent: of the 2N projections of both views, each is drawn to its other view and away from all the
    others."""

    lr, weight_decay, probe_lr, online_lr = 0.6, 1e-4, 1.0, 0.1
    contrastive = True
    small = "--simclr_hidden 32 --simclr_dim 16"

    @staticmethod
    def add_arguments(add):
        add("--simclr_hidden", type=int, default=2048, help="hidden width of the projector")
        add("--simclr_dim", type=int, default=128, help="output dimension of the projector")
        add("--simclr_tau", type=float, default=0.2, help="temperature of the SSL loss")
        add("--simclr_tau_distill", type=float, default=0.2, help="temperature tau_d with CaSSLe and PNR")

    def __init__(self, backbone, args):
        super().__init__(backbone)
        self.dim, self.tau, self.tau_d = args.simclr_dim, args.simclr_tau, args.simclr_tau_distill
        self.projector = mlp(backbone.feature_dim, args.simclr_hidden, self.dim)

    def ssl(self, student, negatives=None):
        """mean_i -z_i.z_j/tau + ln sum_{k != i} e^(z_i.z_k/tau), j the other view of i; with pseudo-negatives
        the sum gains sum_{k != i} e^(z_i.f_k/tau), and tau is tau_d. The teacher's f_j is a negative too, as
        released."""
        tau = self.tau if negatives is None else self.tau_d
        z = F.normalize(torch.cat(student.z), dim=1)  # 2N x D
        total = lse_of_others(z, z, tau)
        if negatives is not None:
            total = torch.logaddexp(total, lse_of_others(z, F.normalize(torch.cat(negatives.z), dim=1), tau))
        other_view = z.roll(len(z) // 2, dims=0)
        return (total - (z * other_view).sum(dim=1) / tau).mean()

    def distill(self, predicted, teacher):
        return contrastive_distillation(predicted.z, teacher.z, self.tau_d)

    def align(self, predicted, teacher, negatives=None):
        """mean_i -p_i.f_i/tau_d + ln [sum_{k != i} e^(p_i.f_k/tau_d) + sum_{k != i} e^(p_i.z_k/tau_d)], the
        second sum only with pseudo-negatives. The positive is not in its own denominator, as released."""
        p, f = (F.normalize(torch.cat(views), dim=1) for views in (predicted.z, teacher.z))
        total = lse_of_others(p, f, self.tau_d)
        if negatives is not None:
            z = F.normalize(torch.cat(negatives.z), dim=1)
            total = torch.logaddexp(total, lse_of_others(p, z, self.tau_d))
        return (total - (p * f).sum(dim=1) / self.tau_d).mean()
