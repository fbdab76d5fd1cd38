"""Two exceptions a person is meant to read: the request was wrong, and the run failed."""


class RequestError(ValueError):
    """A person's input cannot be used. The message says what is wrong, where, and what to do.

    Commands print it on one line and exit with code 2; nothing has been written over when it is raised.
    """


class RunFailed(RuntimeError):
    """A run that was asked for rightly cannot go on: a full disk, numbers that stay bad, a lost file.

    The message says what happened, what is kept, and how to go on. Commands print it on one line and exit with code 1.
    """


_LOST_PEER = ("closed by peer", "reset by peer", "closed by remote peer", "remote process exited", "broken pipe")


def lost_a_peer(error: BaseException) -> bool:
    """Whether it was raised because another process of the job is gone: told by the words of gloo and NCCL."""
    return isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in _LOST_PEER)


def lost_a_worker(error: BaseException) -> bool:
    """Whether it was raised because a process that reads data is gone: told by the words of torch.

    torch raises it from a signal handler, that is from whatever line the main thread was at: writing a file, too.
    """
    is_pipe = isinstance(error, ConnectionError | EOFError) and not isinstance(error, BrokenPipeError)
    return is_pipe or "DataLoader worker" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its type where it says nothing, as the EOFError of a pipe."""
    lines = (line.strip().rstrip(". ") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def shown(text: object, limit: int = 200) -> str:
    """Text from outside as a message may show it: on one line, no control or direction characters, not endless."""
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text)[: limit + 1])
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
