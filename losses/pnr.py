"""PNR, Pseudo-Negative Regularization (Cha, Cho, Moon, ICML 2024): each model's features are negatives in the
other's loss."""

from dataclasses import replace

from losses.base import MethodError, NonContrastive
from losses.cassle import CaSSLe
from models.heads import Queue


class PNR(CaSSLe):
    """L = ssl(z, pseudo-negatives of the teacher) + align(p, f, pseudo-negatives of the student), from the
    second task on.

    Where the method keeps a queue, the teacher gets one of its size: random rows in the second task, then
    carried on.
    """

    @staticmethod
    def add_arguments(parser):
        CaSSLe.add_teacher_arguments(parser)
        parser.add_argument("--pnr_pseudo_negatives", choices=("both", "main", "reg", "none"), default="both",
                            help="the paper's ablation: teacher features in the main loss only, student "
                                 "features in the "
                            "regularisation only, both, or none")  # fmt: skip

    @staticmethod
    def resolve(args):
        """PNR's code puts its teacher in eval mode; on CIFAR the trainer undoes that when the first epoch's
        validation ends, its ImageNet and DomainNet scripts never validate (docs/METHODS.md)."""
        if args.teacher_bn == "auto":
            args.teacher_bn = "eval" if args.dataset in ("imagenet100", "imagenet", "domainnet") else "batch"

    def __init__(self, args):
        super().__init__(args)
        self.queue = None
        self.in_main = args.pnr_pseudo_negatives in ("both", "main")
        self.in_reg = args.pnr_pseudo_negatives in ("both", "reg")

    def check(self, method):
        if isinstance(method, NonContrastive) and self.in_main != self.in_reg:
            raise MethodError(
                "--pnr_pseudo_negatives main and reg are for simclr and moco: use both or none with other "
                "methods"
            )

    def begin_task(self, task, method):
        super().begin_task(task, method)
        if task > 0 and self.queue is None and hasattr(method, "queue"):
            self.queue = Queue(method.queue.rows.shape[1], method.dim)

    def teach(self, views):
        old = super().teach(views)
        return old if old is None or self.queue is None else replace(old, queue=self.queue.rows)

    def losses(self, method, out, pred, old):
        if old is None:
            return {"ssl": method.ssl(out)}
        return {
            "ssl": method.ssl(out, negatives=old if self.in_main else None),
            "align": method.align(pred, old, negatives=out if self.in_reg else None),
        }

    def after_step(self, old):
        if old is not None and self.queue is not None:
            self.queue.enqueue(*old.z)
