"""The one exception that means: the user can fix this."""


class UserError(ValueError):
    """A wrong input: one sentence that says what, where, what was expected and how to fix it.

    The command line prints the sentence alone and exits with code 2; any other exception is a
    fault of this program and keeps its traceback.
    """
