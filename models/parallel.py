"""N ranks that compute what one process computes: a differentiable gather and a batch norm over all ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def full_precision(x):
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Gather(torch.autograd.Function):
    """Concatenates the ranks' rows. Every rank then computes the same loss of the whole batch, so the
    gradient that it gets for its own rows is complete; DDP averages parameter gradients over ranks, hence the
    factor world."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows] * dist.get_world_size()


def gather(x):
    """[N / world, D] on each rank -> [N, D] on every rank, in rank order; differentiable."""
    return x if world_size() == 1 else _Gather.apply(x)


class _AllReduce(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class CrossRankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all ranks on any device, for where torch's SyncBatchNorm does not go: on a
    CPU, and into torch.compile without a break of its graph."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, False, 0.0, self.eps)
        full = full_precision(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _AllReduce.apply(full.sum(dims)) / count
        centred = full - mean.view(shape)
        var = _AllReduce.apply(centred.square().sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        y = centred * (var + self.eps).rsqrt().view(shape)
        y = y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def sync_batch_norms(module, device, compiled):
    """Makes every batch norm of the module, in place, see the batch of all ranks; its state_dict keeps its
    keys."""
    if device.type == "cuda" and not compiled:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in module.modules():
        for child in parent.children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.__class__ = CrossRankBatchNorm
    return module
