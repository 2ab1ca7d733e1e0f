"""The contrastive losses that several methods share, as plain functions of projections."""

import torch
import torch.nn.functional as F


def info_nce(query, positive, negatives, tau):
    """mean_i -ln[ e^(q_i.k_i/tau) / (e^(q_i.k_i/tau) + sum_n e^(q_i.n/tau)) ]. query, positive: [N, D],
    normalised here; negatives: a list of [K, D] unit rows, all of them against every query. The blocks are
    summed one by one, so that two queues are never copied into one. Source: van den Oord et al. (2018); He et
    al. (CVPR 2020)."""
    query = F.normalize(query, dim=1) / tau
    positive = (query * F.normalize(positive, dim=1)).sum(dim=1)  # N
    total = positive
    for rows in negatives:
        total = torch.logaddexp(total, torch.logsumexp(query @ rows.T, dim=1))
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
