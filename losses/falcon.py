"""FALCON, collapse-proof non-contrastive learning (Sansone, Lebailly, Tuytelaars, arXiv 2410.04959), and
CaSSLe and PNR terms on its codes, which are this project's own."""

import math

import torch
from torch import nn

from losses.base import Method, over_views
from utils import UserError


def cross_entropy(log_p, log_q):
    """mean_n -sum_j p_nj ln q_nj without an [N, c] product. log_p, log_q: [N, c]."""
    return -torch.dot(log_p.exp().flatten(), log_q.flatten()) / len(log_p)


def prior_matching(log_p, prior):
    """How far the mean code is from uniform over the c codes: KL(mean || uniform) ("reverse", as released) or
    KL(uniform || mean) ("forward", the paper's first form). log_p: [N, c]."""
    n, c = log_p.shape
    log_mean = torch.logsumexp(log_p, dim=0) - math.log(n)  # ln mean_n P_nj, finite also where all underflow
    surprise = log_mean + math.log(c)
    return (log_mean.exp() * surprise).sum() if prior == "reverse" else -surprise.mean()


def falcon_loss(logits1, logits2, beta, prior="reverse"):
    """Mean over both directions of prior matching + beta x cross-entropy of one view's codes with the
    other's; no gradient is stopped. logits1, logits2: [N, c]."""
    log_p = [logits.log_softmax(dim=1) for logits in (logits1, logits2)]
    consistency = (cross_entropy(log_p[0], log_p[1]) + cross_entropy(log_p[1], log_p[0])) / 2
    return sum(prior_matching(x, prior) for x in log_p) / 2 + beta * consistency


class FALCON(Method):
    """Projections are read against a fixed dictionary of random signs; the codes are consistent and used
    evenly."""

    lr, weight_decay, probe_lr, online_lr = 1e-3, 1e-4, 0.1, 1e-3  # lr 2.5e-4 at the recipe's batch of 64
    optimizer, lr_schedule, warmup_start_lr = "adam", "step", 3e-5
    small = "--falcon_dim 32 --falcon_codes 64"

    @staticmethod
    def add_arguments(add):
        add("--falcon_dim", type=int, default=2048, help="f, output dimension of the projector")
        add("--falcon_codes", type=int, default=16384, help="c, columns of the dictionary")
        add("--falcon_beta", type=float, default=1.0, help="weight of the consistency of the views")
        add("--falcon_prior", choices=("reverse", "forward"), default="reverse",
            help="divergence of mean code and uniform prior; reverse as released")  # fmt: skip
        add("--falcon_epsilon", type=float, default=1e-8, help="eps of the temperature; lower: sharper codes")
        add("--falcon_lambda_neg", type=float, default=0.1, help="weight of PNR's pseudo-negatives")

    def __init__(self, backbone, args):
        super().__init__(backbone)
        f, c, eps = args.falcon_dim, args.falcon_codes, args.falcon_epsilon
        if c < 2 or eps * c >= 1:
            words = "at least 2 codes, product below 1"
            raise UserError(f"--falcon_codes {c} x --falcon_epsilon {eps:g}: {words}")
        self.dim, self.lambda_neg = f, args.falcon_lambda_neg
        self.beta, self.prior = args.falcon_beta, args.falcon_prior
        # N is the batch of all ranks
        self.temperature = f / (math.sqrt(args.batch_size) * math.log((1 - eps * (c - 1)) / eps))
        self.projector = nn.Sequential(nn.Linear(backbone.feature_dim, f), nn.BatchNorm1d(f))
        signs = torch.randint(0, 2, (f, c)).mul_(2).sub_(1)
        self.register_buffer("dictionary", signs.to(torch.get_default_dtype()))

    def logits(self, z):
        """a = tanh(z) W / T: [N, f] -> [N, c]."""
        return (z.tanh() / self.temperature) @ self.dictionary

    @torch.no_grad()
    def codes(self, h):
        training = self.projector.training
        self.projector.eval()
        codes = torch.cat([self.logits(self.projector(part)).argmax(dim=1) for part in h.split(256)])
        self.projector.train(training)
        return codes, self.dictionary.shape[1]

    def ssl(self, student, negatives=None):
        return falcon_loss(self.logits(student.z[0]), self.logits(student.z[1]), self.beta, self.prior)

    def log_codes(self, out):
        """ln softmax(a) of each view, a list of [N, c]; computed once for both terms."""
        if out.codes is None:
            out.codes = [self.logits(z).log_softmax(dim=1) for z in out.z]
        return out.codes

    def distill(self, predicted, teacher):
        """Cross-entropy of the teacher's codes with the predicted ones."""
        return over_views(cross_entropy, self.log_codes(teacher), self.log_codes(predicted))

    def repel(self, predicted, teacher):
        """The same with the teacher's codes of the other view."""
        return over_views(cross_entropy, self.log_codes(teacher)[::-1], self.log_codes(predicted))
