"""The one exception that means "the input is at fault, not the program"."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected, and the remedy.

    The command line prints the message on one line and exits with code 2. Library callers may catch
    it as a ValueError.
    """
