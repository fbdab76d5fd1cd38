"""The one exception that means "the request was wrong", as opposed to "the run failed"."""


class RequestError(ValueError):
    """A person's input cannot be used. The message says what is wrong, where, and what to do.

    Commands print it on one line and exit with code 2; nothing has been written over when it is raised.
    """
