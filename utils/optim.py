"""LARS and the learning-rate schedule, as the released PNR and CaSSLe code has them."""

import math

import torch


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al., 2017) around SGD with momentum.

    For each tensor w with gradient g: local = min(eta |w| / (|g| + wd |w| + 1e-8) / lr, 1) and g <- local (g
    + wd w), before momentum; a tensor with |w| = 0 or |g| = 0 keeps its g. With exclude_bias_n_norm 1-D
    tensors skip all of it, weight decay too. Parameter groups may have their own lr and weight decay.
    Everything is a few multi-tensor calls, without a Python loop or a device sync; .grad is scaled in place.
    """

    def __init__(
        self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02, exclude_bias_n_norm=False, fused=None
    ):
        super().__init__(
            params, lr, momentum, weight_decay=weight_decay, fused=fused, foreach=None if fused else True
        )
        self.eta, self.exclude_bias_n_norm = eta, exclude_bias_n_norm
        for group in self.param_groups:  # LARS sees to it, not SGD
            group["lars_weight_decay"], group["weight_decay"] = group["weight_decay"], 0.0
        for p in (p for group in self.param_groups for p in group["params"]):
            # the fused kernel would leave it uninitialised where GradScaler skips the first step
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [
                p
                for p in group["params"]
                if p.grad is not None and not (self.exclude_bias_n_norm and p.ndim == 1)
            ]
            if params:
                self.scale_gradients(
                    params, [p.grad for p in params], group["lr"], group["lars_weight_decay"]
                )
        return super().step(closure)

    def scale_gradients(self, params, grads, lr, wd):
        w_norm = torch.stack(torch._foreach_norm(params))  # one entry per tensor
        g_norm = torch.stack(torch._foreach_norm(grads))
        valid = (w_norm > 0) & (g_norm > 0)
        local = self.eta * w_norm / (g_norm + wd * w_norm + 1e-8)
        local = torch.where(valid, (local / lr).clamp(max=1), 1.0)
        decay = torch.where(valid, wd * local, 0.0)
        torch._foreach_mul_(grads, list(local.unbind()))
        torch._foreach_add_(grads, torch._foreach_mul(params, list(decay.unbind())))


def warmup_cosine(t, base_lr, total, warmup=10, start_lr=0.003, min_lr=0.0):
    """The learning rate at t, counted in epochs or in steps as `total` and `warmup` are: linear from start_lr
    (t = 0) to base_lr (t = warmup - 1), then cosine to min_lr at `total`."""
    start_lr = min(start_lr, base_lr)
    if t < warmup:
        return start_lr + t * (base_lr - start_lr) / max(warmup - 1, 1)
    return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * (t - warmup) / (total - warmup))) / 2
