"""What a network says of a batch, and the module that DDP wraps: method, regulariser and online probe."""

from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from models.parallel import full_precision, gather, sync_batch_norms, world_size

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


@dataclass
class Outputs:
    """What one network says of a batch; each list holds one [N, .] tensor per view.

    z: projections (of the student, or of the teacher, where the equations write f); h: the backbone's
    features; k: projections of the momentum encoder; q: what BYOL's own predictor makes of z; queue: [2, K,
    D] unit rows of earlier batches, one set for each view; codes: FALCON's log-codes, once they are
    needed."""

    z: list
    h: list | None = None
    k: list | None = None
    q: list | None = None
    queue: torch.Tensor | None = None
    codes: list | None = None

    def of_all_ranks(self):
        """The outputs for the global batch, in full precision: losses are in float32, or in float64 if so
        given."""
        lists = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {name: views for name, views in lists.items() if isinstance(views, list)}
        return replace(self, **{k: [gather(full_precision(x)) for x in views] for k, views in lists.items()})


class Learner(nn.Module):
    """Method, regulariser and online probe (or None) together: the module that DDP wraps and that last.pt
    holds."""

    def __init__(self, method, regularizer, online=None, autocast_dtype=None, compiled=False):
        super().__init__()
        regularizer.check(method)
        self.method, self.regularizer, self.online = method, regularizer, online
        self.autocast_dtype, self.compiled = autocast_dtype, compiled

    def begin_task(self, task, device, loader=None):
        """Fits the module to the task; the random parts come from torch's seed. loader: the task's own."""
        self.regularizer.begin_task(task, self.method, loader)
        self.to(device)
        if world_size() > 1:
            sync_batch_norms(self, device, self.compiled)
        self.train()

    def forward(self, view1, view2, labelled=None):
        """Two views of a batch, and for the online probe labelled images and their labels -> (what backward
        is called on; by name the loss, its terms and what the probe measures; the student's Outputs; the
        teacher's or None)."""
        views, device = [view1, view2], view1.device.type
        with torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            student = self.method(views)
            teacher = self.regularizer.teach(views)
            predicted = self.regularizer.predict(self.method, student)
            if not self.regularizer.uses_features:
                student.h = None  # of no use to others, so that ranks need not exchange it
            features = None if labelled is None else self.online.features(self.method, labelled[0])
        everything = student, predicted, teacher
        student, predicted, teacher = (None if x is None else x.of_all_ranks() for x in everything)
        with torch.autocast(device, enabled=False):
            terms = self.regularizer.losses(self.method, student, predicted, teacher)
            loss = sum(terms.values())
            probed = {} if labelled is None else self.online(features, labelled[1])
            return loss + probed.get("online_loss", 0), {"loss": loss, **terms, **probed}, student, teacher

    def after_step(self, student, teacher, progress):
        """After the optimiser's step: the momentum encoder moves, this batch enters the queues. progress: the
        share of the task's steps done before it, 0 to 1."""
        self.method.after_step(student, progress)
        self.regularizer.after_step(teacher)
