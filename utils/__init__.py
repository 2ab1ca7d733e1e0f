"""Flags, the run folder, checkpoints, logs, optimisers, evaluation, and the start and end of a process."""


class UserError(ValueError):
    """What the user can mend: the message says what is wrong, where, and what to do."""


LATER = {"loss_precision": "fp32"}  # flags that older runs do not know, and what they did
