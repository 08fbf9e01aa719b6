"""How the program ends when it is not done: the exception that means that the user can fix it, and exit codes."""

import os

PREEMPTED = os.EX_TEMPFAIL
"""Exit code 75 of what was preempted: the same command goes on."""


class UserError(ValueError):
    """A wrong input: one sentence that says what, where, what was expected and how to fix it.

    The command line prints the sentence alone and exits with code 2; any other exception is a
    fault of this program and keeps its traceback.
    """


class CommonError(UserError):
    """One that all ranks raise in the same step: the first alone says it."""
