"""CaSSLe (Fini et al., CVPR 2022): a predictor of the present features is drawn to the frozen network of the
previous task."""

from losses.base import Outputs, Regularizer
from models.heads import mlp
from models.twins import Teacher


class CaSSLe(Regularizer):
    """L = L_SSL + weight * distill(p, f), from the second task on; p = g(z), f = the teacher's z."""

    @staticmethod
    def add_teacher_arguments(parser):
        """The flags of every regulariser with a teacher."""
        parser.add_argument(
            "--predictor_hidden", type="count", default=2048, help="hidden width of the predictor g"
        )
        parser.add_argument("--teacher_bn", choices=("auto", "eval", "batch"), default="auto",
                            help="what the frozen teacher's batch norms use: its running statistics, or each "
                                 "batch's own (the "
                            "running statistics never change); auto, as released: eval for pnr on ImageNet "
                            "and DomainNet, else "
                            "batch")  # fmt: skip

    @staticmethod
    def add_arguments(parser):
        CaSSLe.add_teacher_arguments(parser)
        parser.add_argument(
            "--cassle_weight", type="weight", default=1.0, help="weight of the distillation term"
        )

    @staticmethod
    def resolve(args):
        """CaSSLe's code never puts its teacher in eval mode."""
        if args.teacher_bn == "auto":
            args.teacher_bn = "batch"

    def __init__(self, args):
        super().__init__(args)
        self.args, self.teacher, self.predictor = args, None, None

    def begin_task(self, task, method):
        """The student becomes the teacher; the predictor is made for the second task and goes on learning in
        later ones."""
        if task == 0:
            return
        self.teacher = Teacher(method.backbone, method.projector, self.args.teacher_bn)
        if self.predictor is None:
            self.predictor = mlp(method.dim, self.args.predictor_hidden, method.dim, norm=True)

    def teach(self, views):
        return None if self.teacher is None else Outputs(z=[self.teacher(view) for view in views])

    def predict(self, method, out):
        return (
            None
            if self.teacher is None
            else Outputs(z=[self.predictor(method.predictor_input(z)) for z in out.z])
        )

    def losses(self, method, out, pred, old):
        terms = {"ssl": method.ssl(out)}
        if old is not None:
            terms["distill"] = self.args.cassle_weight * method.distill(pred, old)
        return terms
