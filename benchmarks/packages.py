"""A training step of MoCo with lightly's parts (pip install lightly): its views, head, loss with a memory
bank and EMA, around this project's backbone with this project's settings; symmetric, views by PIL in
DataLoader workers, fp16 with a gradient scaler on CUDA, else fp32. lightly has no regularisers: to be held
against fine-tuning."""

import copy

import torch
from torch import nn

from benchmarks.plain import Views, endless
from models.resnet import build_backbone


class Lightly:
    """Steps on images [N, 3, H, W] uint8; an interface like that of benchmarks/plain.py's Plain."""

    def __init__(self, args, device, images):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad
        from lightly.transforms import MoCoV2Transform

        backbone, size = build_backbone(args.backbone, args.width, args.stem), args.image_size
        head = MoCoProjectionHead(backbone.feature_dim, args.moco_hidden, args.moco_dim)
        self.student = nn.Sequential(backbone, head).to(device)
        self.momentum = copy.deepcopy(self.student)
        deactivate_requires_grad(self.momentum)
        self.criterion = NTXentLoss(args.moco_tau, (args.moco_queue_size, args.moco_dim)).to(device)
        rate = args.lr * args.batch_size / 256
        self.optimizer = torch.optim.SGD(self.student.parameters(), rate, 0.9, weight_decay=args.weight_decay)
        self.device, self.fp16 = device, device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.fp16)
        transform = MoCoV2Transform(input_size=size, min_scale=args.min_scale, gaussian_blur=args.blur_p[0])
        self.views = endless(Views(images, transform), args, device)

    def step(self, timed=lambda name, function: function()):
        """timed: called with each part's name and what it does, whose result it returns."""
        from lightly.models.utils import update_momentum

        cast = torch.autocast(self.device.type, torch.float16, enabled=self.fp16)

        def keys():
            with cast, torch.no_grad():
                return [self.momentum(x) for x in views]

        def queries():
            with cast:
                return [self.student(x) for x in views]

        def loss():
            with cast:
                return (self.criterion(q[0], k[1]) + self.criterion(q[1], k[0])) / 2

        def update():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            update_momentum(self.student, self.momentum, 0.99)

        views = timed("data", lambda: [x.to(self.device, non_blocking=True) for x in next(self.views)])
        k, q = timed("forward momentum", keys), timed("forward student", queries)
        value = timed("loss", loss)
        timed("backward", lambda: self.scaler.scale(value).backward())
        timed("optimiser, EMA, queues", update)
