"""Collapse monitors on features that an evaluation has extracted anyway: what each reads when training has
failed silently.

The four kinds are those of FALCON's paper (arXiv 2410.04959): representation, dimensional, cluster and
intracluster collapse.
"""

import math

import torch
import torch.nn.functional as F

COLLAPSED_STD = 0.02  # of features, or projections, that are as good as equal


def feature_std(z):
    """sqrt(D) x the standard deviation of unit-length features, mean over dimensions: 1 if spread out, 0 if
    all are equal (representation collapse). z: [N, D]. Source: Chen and He, SimSiam (CVPR 2021)."""
    z = z.detach()
    return float(F.normalize(z, dim=1).std(dim=0).mean() * z.shape[1] ** 0.5)


def collapsed(report):
    """Whether `collapse_metrics` reports a total collapse: all features equal, or all on one line."""
    return report["feature_std"] < COLLAPSED_STD or report["effective_rank"] < 1.5


def singular_values(x):
    """Of the centred features, largest first: float64 [D]. x: [N, D]."""
    x = (x - x.mean(dim=0)).double()
    return torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt().flip(0)


def effective_rank(values):
    """e^entropy of the normalised singular values: from 1 (dimensional collapse) to D. Source: Roy and
    Vetterli (2007)."""
    p = values / values.sum().clamp(min=1e-300)  # all equal features: rank 1
    return float(torch.special.entr(p).sum().exp())


def code_entropy(codes):
    """Entropy of code use over its largest possible value, ln min(N, codes): 1 if all are used evenly, 0 if
    one is (cluster collapse). codes: int64 [N], and their number."""
    index, count = codes
    share = torch.bincount(index, minlength=count).double() / len(index)
    return float(torch.special.entr(share).sum()) / math.log(min(len(index), count))


def intracluster_variance(x, codes):
    """Share of the features' variance that lies within codes: 0 if all samples of a code are equal
    (intracluster collapse). x: [N, D]; codes: int64 [N], and their number."""
    index, count = codes
    x = x.double()
    sums = torch.zeros(count, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, index, x)
    means = sums / torch.bincount(index, minlength=count).clamp(min=1).unsqueeze(1)
    total = (x - x.mean(dim=0)).square().sum().clamp(min=1e-300)  # all equal features: 0
    return float((x - means[index]).square().sum() / total)


def collapse_metrics(x, codes=None):
    """All monitors by name, and the singular values. x: features [N, D]; codes: (int64 [N], their number)
    where there are any."""
    values = singular_values(x)
    report = {"feature_std": feature_std(x), "effective_rank": effective_rank(values)}
    if codes is not None:
        report["code_entropy"] = code_entropy(codes)
        report["intracluster_variance"] = intracluster_variance(x, codes)
    return report, values
