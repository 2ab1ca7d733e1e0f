"""Flags, the run folder, checkpoints, logs, optimisers, evaluation, and the start and end of a process."""


class UserError(ValueError):
    """What the user can mend: the message says what is wrong, where, and what to do."""
