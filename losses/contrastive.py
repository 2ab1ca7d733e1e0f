"""The contrastive losses that several methods share, as plain functions of projections."""

import torch
import torch.nn.functional as F

BLOCK = 2048  # keys worked on together on the CPU, so that their products stay in its cache


class LogSumExp(torch.autograd.Function):
    """ln sum_k e^(q_i.n_k), [N], of queries [N, D] and rows [K, D] that get no gradient. The queries'
    gradient, the mean of the rows weighted by softmax, is accumulated in the forward pass, so that nothing of
    size N x K is kept or read again."""

    @staticmethod
    def forward(ctx, query, rows):
        top, total = torch.full_like(query[:, :1], -torch.inf), torch.zeros_like(query[:, :1])
        mean = torch.zeros_like(query)
        for block in rows.split(BLOCK if rows.device.type == "cpu" else len(rows)):
            logits = query @ block.T
            highest = torch.maximum(top, logits.amax(dim=1, keepdim=True))
            shrink, weights = (top - highest).exp_(), logits.sub_(highest).exp_()
            top, total = highest, total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
            mean.mul_(shrink).addmm_(weights, block)
        ctx.save_for_backward(mean.div_(total))
        return (top + total.log_())[:, 0]

    @staticmethod
    def backward(ctx, gradient):
        return gradient.unsqueeze(1) * ctx.saved_tensors[0], None


def info_nce(query, positive, negatives, tau):
    """mean_i -ln[ e^(q_i.k_i/tau) / (e^(q_i.k_i/tau) + sum_n e^(q_i.n/tau)) ]. query, positive: [N, D],
    normalised here; negatives: a list of [K, D] unit rows without gradients, all of them against every query;
    two queues are never copied into one. Source: van den Oord et al. (2018); He et al. (CVPR 2020)."""
    query = F.normalize(query, dim=1) / tau
    positive = (query * F.normalize(positive, dim=1)).sum(dim=1)  # N
    total = positive
    for rows in negatives:
        total = torch.logaddexp(total, LogSumExp.apply(query, rows))
    return (total - positive).mean()


def lse_of_others(a, b, tau):
    """ln sum_{k != i} e^(a_i.b_k/tau), [M]. a, b: [M, D] unit rows."""
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    return (a @ b.T / tau).masked_fill(itself, -torch.inf).logsumexp(dim=1)


def contrastive_distillation(pred, target, tau):
    """CaSSLe's 1/2 [D(p, f) + D(f, p)] with D(a, b) = cross-entropy of a_i against all b, its own b_i being
    the positive. pred, target: lists with one [N, D] tensor per view, normalised here; the 2N rows of both
    views are candidates for each other, and a row's positive is the target of its own view. Source: Fini et
    al. (CVPR 2022)."""
    p = F.normalize(torch.cat(pred), dim=1)
    f = F.normalize(torch.cat(target), dim=1)
    logits = p @ f.T / tau  # 2N x 2N
    own = torch.arange(len(p), device=p.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
