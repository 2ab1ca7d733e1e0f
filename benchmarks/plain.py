"""A training step of MoCo + PNR as code of this field is commonly written, to measure against: views by PIL
in DataLoader workers, a module for everything, parameter by parameter, queues put together into one table of
logits, fp16 with a gradient scaler on CUDA, else fp32. The equations are those of docs/METHODS.md."""

import copy
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

from data.augment import BLUR_RADIUS, BLUR_SIGMA, ViewConfig
from models.resnet import build_backbone


def pil_parts(v, mean, std):
    """The view that a ViewConfig describes, by torchvision's transforms of a PIL image, in four parts."""
    jitter = T.ColorJitter(v.brightness, v.contrast, v.saturation, v.hue)
    last = T.RandomSolarize(128, v.solarize_p), T.RandomHorizontalFlip(v.flip_p), T.ToTensor()
    return {
        "crop": T.RandomResizedCrop(v.size, (v.min_scale, 1), interpolation=T.InterpolationMode.BICUBIC),
        "colour": T.Compose([T.RandomApply([jitter], v.jitter_p), T.RandomGrayscale(v.grey_p)]),
        "blur": T.RandomApply([T.GaussianBlur(2 * BLUR_RADIUS + 1, BLUR_SIGMA)], v.blur_p),
        "rest": T.Compose([*last, T.Normalize(mean, std)]),
    }


class PilViews:
    """The views of a PIL image, one for each ViewConfig."""

    def __init__(self, configs, mean, std):
        self.pipelines = [T.Compose([*pil_parts(v, mean, std).values()]) for v in configs]

    def __call__(self, image):
        return [pipeline(image) for pipeline in self.pipelines]


def endless(dataset, args, device):
    """Batches of views in DataLoader workers, one epoch after the other."""
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    pinned = device.type == "cuda"
    loader = DataLoader(dataset, args.batch_size, True, drop_last=True, pin_memory=pinned, **workers)
    return (views for _ in repeat(None) for views in loader)


class Views(Dataset):
    """Images uint8 [N, 3, H, W], each through a transform of PIL images that gives its views."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(to_pil_image(self.images[i]))


class Network(nn.Module):
    """Student, momentum encoder, frozen teacher, predictor, and a queue for each of the two views and
    models."""

    def __init__(self, args):
        super().__init__()
        dim, hidden, self.tau = args.moco_dim, args.moco_hidden, args.moco_tau
        backbone = build_backbone(args.backbone, args.width, args.stem)
        head = nn.Linear(backbone.feature_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)
        self.student = nn.Sequential(backbone, *head)
        self.momentum, self.teacher = (copy.deepcopy(self.student).requires_grad_(False) for _ in range(2))
        width = args.predictor_hidden
        layers = nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, dim)
        self.predictor = nn.Sequential(*layers)
        queues = F.normalize(torch.randn(4, dim, args.moco_queue_size), dim=1)
        self.register_buffer("queues", queues)  # of the momentum encoder for view 1 and 2, of the teacher
        self.pointer = 0

    def nce(self, query, key, *queues):
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        positive = torch.einsum("nc,nc->n", query, key).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", query, torch.cat(queues, dim=1))
        logits = torch.cat([positive, negative], dim=1) / self.tau
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    @torch.no_grad()
    def after_step(self, k, f, tau=0.995):
        for old, new in zip(self.momentum.parameters(), self.student.parameters()):
            old.data = tau * old.data + (1 - tau) * new.data
        size, count = self.queues.shape[2], len(k[0])
        for queue, keys in zip(self.queues, (*k, *f)):
            keys = F.normalize(keys.float(), dim=1)[: size - self.pointer]
            queue[:, self.pointer : self.pointer + count] = keys.T
        self.pointer = (self.pointer + count) % size


class LARS(torch.optim.SGD):
    """One parameter after the other."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        decay, group["weight_decay"] = group["weight_decay"], 0
        for p in group["params"]:
            if p.grad is not None:
                norm, gradient = torch.norm(p), torch.norm(p.grad)
                if norm != 0 and gradient != 0:
                    local = 0.02 * norm / (gradient + norm * decay + 1e-8)
                    p.grad += decay * p
                    p.grad *= min(local / group["lr"], 1)
        super().step()
        group["weight_decay"] = decay


class Plain:
    """Steps of a second task, on images [N, 3, H, W] uint8."""

    def __init__(self, args, device, images):
        self.device, self.network = device, Network(args).to(device).train()
        rate = {"lr": args.lr * args.batch_size / 256, "momentum": 0.9, "weight_decay": args.weight_decay}
        self.optimizer = LARS([p for p in self.network.parameters() if p.requires_grad], **rate)
        self.fp16 = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.fp16)
        views = [ViewConfig(args.image_size, args.min_scale, *p) for p in zip(args.blur_p, args.solarize_p)]
        self.views = endless(Views(images, PilViews(views, (0.5,) * 3, (0.25,) * 3)), args, device)

    def step(self, timed=lambda name, function: function()):
        """timed: called with each part's name and what it does, whose result it returns."""
        net, cast = self.network, lambda: torch.autocast(self.device.type, torch.float16, enabled=self.fp16)

        def of_both(module, inputs):
            with cast():
                return [module(x) for x in inputs]

        def frozen(module):
            with torch.no_grad():
                return of_both(module, views)

        def loss():
            with cast():
                q = net.queues.clone()
                ssl = sum(net.nce(z[v], k[1 - v], q[1 - v], q[3 - v]) for v in (0, 1)) / 2
                return ssl + sum(net.nce(p[v], f[v], q[1 - v], q[3 - v]) for v in (0, 1)) / 2

        def update():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            net.after_step(k, f)

        views = timed("data", lambda: [x.to(self.device, non_blocking=True) for x in next(self.views)])
        z = timed("forward student", lambda: of_both(net.student, views))
        k = timed("forward momentum", lambda: frozen(net.momentum))
        f = timed("forward teacher", lambda: frozen(net.teacher))
        p = timed("forward predictor", lambda: of_both(net.predictor, [F.normalize(x, dim=1) for x in z]))
        value = timed("loss", loss)
        timed("backward", lambda: self.scaler.scale(value).backward())
        timed("optimiser, EMA, queues", update)
