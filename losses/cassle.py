"""CaSSLe (Fini et al., CVPR 2022): a predictor of the present features is drawn to the frozen network of the
previous task."""

from losses.base import Regularizer
from models.frozen import Teacher
from models.heads import mlp
from models.learner import Outputs


class CaSSLe(Regularizer):
    """L = L_SSL + weight * distill(p, f), from the second task on; p = g(z), f = the teacher's z."""

    @staticmethod
    def add_teacher_arguments(add):
        """The flags of every regulariser with a teacher."""
        add("--predictor_hidden", type=int, default=2048, help="hidden width of the predictor g")
        add("--teacher_bn", choices=("auto", "eval", "batch"), default="auto",
            help="what the frozen teacher's batch norms use: its running statistics, or each batch's "
            "own (the running statistics never change); auto, as released: eval for pnr on ImageNet and "
            "DomainNet, else batch")  # fmt: skip

    @staticmethod
    def add_arguments(add):
        CaSSLe.add_teacher_arguments(add)
        add("--cassle_weight", type=float, default=1.0, help="weight of the distillation term")

    @staticmethod
    def resolve(args):
        """CaSSLe's code never puts its teacher in eval mode."""
        if args.teacher_bn == "auto":
            args.teacher_bn = "batch"

    def __init__(self, args):
        super().__init__(args)
        self.args, self.teacher, self.predictor = args, None, None

    def begin_task(self, task, method, loader):
        """The student becomes the teacher; g is made for the second task and goes on learning in later
        ones."""
        if task == 0:
            return
        self.teacher = Teacher(method.backbone, method.projector, self.args.teacher_bn)
        if self.predictor is None:
            self.predictor = mlp(method.dim, self.args.predictor_hidden, method.dim, norm=True)

    def teach(self, views):
        return None if self.teacher is None else Outputs(z=[self.teacher(view) for view in views])

    def predict(self, method, student):
        if self.teacher is None:
            return None
        return Outputs(z=[self.predictor(method.predictor_input(z)) for z in student.z])

    def losses(self, method, student, predicted, teacher):
        terms = {"ssl": method.ssl(student)}
        if teacher is not None:
            terms["distill"] = self.args.cassle_weight * method.distill(predicted, teacher)
        return terms
