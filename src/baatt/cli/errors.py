"""The one exception of the command line: a sentence for the user, shown without a traceback."""


class UsageError(Exception):
    """Something the caller can mend; `main` prints it on one line and exits with 2."""
