"""PNR, Pseudo-Negative Regularization (Cha, Cho, Moon, ICML 2024). Contrastive methods: each model's
features are negatives in the other's loss; the others: the teacher's of the other view are negatives of p."""

from dataclasses import replace

from losses.cassle import CaSSLe
from models.heads import Queue
from utils import UserError


class PNR(CaSSLe):
    """From the second task on, with p = g(z) and f the teacher's z, one of two forms (docs/METHODS.md,
    section 4):

    contrastive   ssl(z, pseudo-negatives of the teacher) + align(p, f, pseudo-negatives of the student)
    others        ssl(z) + distill(p, f) - lambda_neg x repel(p, f), f there that of the other view

    Where the method keeps a queue, the teacher gets one of its size: random rows in the second task, then
    carried on."""

    @staticmethod
    def add_arguments(add):
        CaSSLe.add_teacher_arguments(add)
        add("--pnr_pseudo_negatives", choices=("both", "main", "reg", "none"), default="both",
            help="the paper's ablation: teacher features in the main loss only, student features in the "
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
        if not method.contrastive and self.in_main != self.in_reg:
            raise UserError("--pnr_pseudo_negatives main, reg: for contrastive methods; use both or none")

    def begin_task(self, task, method, loader):
        super().begin_task(task, method, loader)
        if task > 0 and self.queue is None and hasattr(method, "queue"):
            self.queue = Queue(method.queue.rows.shape[1], method.dim)

    def teach(self, views):
        teacher = super().teach(views)
        return teacher if teacher is None or self.queue is None else replace(teacher, queue=self.queue.rows)

    def losses(self, method, student, predicted, teacher):
        if teacher is None:
            return {"ssl": method.ssl(student)}
        if method.contrastive:
            return {
                "ssl": method.ssl(student, negatives=teacher if self.in_main else None),
                "align": method.align(predicted, teacher, negatives=student if self.in_reg else None),
            }
        terms = {"ssl": method.ssl(student), "distill": method.distill(predicted, teacher)}
        if self.in_reg:
            terms["pseudo_negatives"] = -method.lambda_neg * method.repel(predicted, teacher)
        return terms

    def after_step(self, teacher):
        if teacher is not None and self.queue is not None:
            self.queue.enqueue(*teacher.z)
