"""Copies of the student that no gradient reaches: the momentum encoder (EMA) and the frozen teacher."""

import copy
import math

import torch
from torch import nn


def frozen_copy(module):
    """A deep copy without gradients."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(momentum, online, tau):
    """momentum <- tau * momentum + (1 - tau) * online, parameters only, in one fused pass; running statistics
    follow the momentum encoder's own batches."""
    torch._foreach_lerp_(list(momentum.parameters()), list(online.parameters()), 1 - tau)


def ema_tau(progress, base, final):
    """Cosine from base (progress 0) to final (progress 1)."""
    return final - (final - base) * (math.cos(math.pi * progress) + 1) / 2


class Teacher(nn.Module):
    """The previous task's backbone and projector, frozen: images -> projections [N, D].

    bn="eval" normalises with the statistics of the previous tasks; bn="batch" with those of the present
    batch. Either way the running statistics stay what they were."""

    def __init__(self, backbone, projector, bn):
        super().__init__()
        self.backbone, self.projector, self.bn = frozen_copy(backbone), frozen_copy(projector), bn
        self.train()

    def train(self, mode=True):
        """Keeps its own mode, whatever is asked of the network around it."""
        super().train(self.bn == "batch")
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # off: batch statistics, and the buffers are left alone
                module.track_running_stats = self.bn == "eval"
        return self

    @torch.no_grad()
    def forward(self, x):
        return self.projector(self.backbone(x))
