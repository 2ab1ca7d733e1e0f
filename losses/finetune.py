"""Fine-tuning: the SSL loss of each task in turn, and nothing that keeps the old ones."""

from losses.base import Regularizer


class Finetune(Regularizer):
    def losses(self, method, student, predicted, teacher):
        return {"ssl": method.ssl(student)}
