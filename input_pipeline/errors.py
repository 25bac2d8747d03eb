"""The two errors that a user can cause: a mistake to correct, and an image that cannot be used."""


class UserError(ValueError):
    """A mistake that the user can correct: the message says what was found, what was expected and what to do.

    The command line prints it without a traceback and exits with 2.
    """


class DecodeError(ValueError):
    """One image that cannot be used, with its reason; its slot stays empty and the run counts it."""
