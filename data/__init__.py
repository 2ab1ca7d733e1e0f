"""From disk to two augmented views: datasets -> scenarios -> loader -> augment."""


class DataError(ValueError):
    """Something is wrong with the user's data; the message says what, where, and what to do."""
