"""Optimisers and schedules, checkpoints, logs, evaluation, and the start of a process."""


class RunError(ValueError):
    """A run cannot start, or cannot go on; the message says why, where, and what to do."""
