"""LARS and the learning-rate schedule, as the released PNR and CaSSLe code has them."""

import math

import torch


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling (You et al., 2017) around SGD with momentum.

    For each tensor w with gradient g: local = min(eta |w| / (|g| + wd |w| + 1e-8) / lr, 1) and g <- local (g
    + wd w), before momentum; a tensor with |w| = 0 or |g| = 0 keeps its g. With exclude_bias_n_norm 1-D
    tensors skip all of it, weight decay too. Parameter groups may have their own lr and weight decay.
    Everything is a few multi-tensor calls, without a Python loop or a device sync; .grad is scaled in
    place."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02, exclude_bias_n_norm=False,
                 fused=None):  # fmt: skip
        foreach = None if fused else True
        super().__init__(params, lr, momentum, weight_decay=weight_decay, fused=fused, foreach=foreach)
        self.eta, self.exclude_bias_n_norm = eta, exclude_bias_n_norm
        for group in self.param_groups:
            group["lars_weight_decay"], group["weight_decay"] = group["weight_decay"], 0.0  # not SGD's affair
            for p in group["params"]:
                # the fused kernel would leave it uninitialised where GradScaler skips the first step
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            params = [p for p in params if p.ndim > 1 or not self.exclude_bias_n_norm]
            if params:
                grads = [p.grad for p in params]
                self.scale_gradients(params, grads, group["lr"], group["lars_weight_decay"])
        return super().step(closure)

    def scale_gradients(self, params, grads, lr, wd):
        w_norm = torch.stack(torch._foreach_norm(params))  # one entry per tensor
        g_norm = torch.stack(torch._foreach_norm(grads))
        local = (self.eta * w_norm / (g_norm + wd * w_norm + 1e-8) / lr).clamp(max=1)
        local = torch.where(w_norm > 0, local, 1.0)
        local = torch.where(g_norm > 0, local, 0.0)  # weight decay alone moves nothing
        torch._foreach_add_(grads, params, alpha=wd)
        torch._foreach_mul_(grads, list(local.unbind()))


def warmup_cosine(t, base_lr, total, warmup=10, start_lr=0.003):
    """The learning rate at t, counted in epochs or in steps as `total` and `warmup` are: linear from start_lr
    (t = 0) to base_lr (t = warmup - 1), then cosine to 0 at `total`."""
    start_lr = min(start_lr, base_lr)
    if t < warmup:
        return start_lr + t * (base_lr - start_lr) / max(warmup - 1, 1)
    return base_lr * (1 + math.cos(math.pi * (t - warmup) / (total - warmup))) / 2


OPTIMIZERS = {"lars": LARS, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(args, learner):
    """Of the learner's parameters, those of the online probe with its own rate."""
    probe = [] if learner.online is None else list(learner.online.parameters())
    own = {id(p) for p in probe}
    groups = [{"params": [p for p in learner.parameters() if p.requires_grad and id(p) not in own]}]
    if probe:
        groups.append({"params": probe, "lr": args.online_lr, "weight_decay": 0.0})
    options = {"lr": args.lr * args.batch_size / 256, "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "lars":
        options["exclude_bias_n_norm"] = learner.method.exclude_bias_n_norm
    optimizer = OPTIMIZERS[args.optimizer](groups, **options)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_lr(optimizer, args, start_lr, epoch, step, steps):
    """For a step of an epoch of `steps`, by --lr_schedule; warm-up begins at start_lr."""
    t, unit = (epoch, 1) if args.lr_schedule == "epoch" else (epoch * steps + step, steps)
    for group in optimizer.param_groups:
        span = args.epochs * unit, round(args.warmup_epochs * unit)
        group["lr"] = warmup_cosine(t, group["base_lr"], *span, start_lr)
