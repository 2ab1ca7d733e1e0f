"""What sits on a backbone: projectors and predictors, and the queue of past keys."""

import torch
import torch.nn.functional as F
from torch import nn


def mlp(dim_in, hidden, dim_out, norm=False):
    """Linear-[BN-]ReLU-Linear: MoCo's and SimCLR's projector without BN; with it BYOL's projector and q, and
    CaSSLe's and PNR's predictor g."""
    norms = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(dim_in, hidden), *norms, nn.ReLU(inplace=True), nn.Linear(hidden, dim_out))


def deep_mlp(dim_in, hidden, dim_out):
    """The three-layer projector with BN of VICReg and Barlow Twins: twice Linear-BN-ReLU, then Linear."""
    layers = []
    for dim in (dim_in, hidden):
        layers += [nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, dim_out))


class Queue(nn.Module):
    """First in, first out: one ring of unit rows for each of the two views, in buffers that are allocated
    once.

    rows: [2, size, dim], random unit rows at first; pointer: where the oldest row lies."""

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(2, size, dim), dim=-1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, view1, view2):
        """Overwrites the oldest rows with the normalised rows of a batch, [N, dim] for each view; N <= size,
        wraps around. In place: call it after backward, which still needs the old rows. The index stays on the
        device."""
        n, size = len(view1), self.rows.shape[1]
        index = (self.pointer + torch.arange(n, device=self.rows.device)).remainder_(size)
        batch = F.normalize(torch.stack((view1, view2)), dim=-1).to(self.rows.dtype)
        self.rows.index_copy_(1, index, batch)
        self.pointer.add_(n).remainder_(size)
