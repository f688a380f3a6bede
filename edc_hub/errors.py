"""The exception that a user can cause, and those that another process can."""

from collections.abc import Iterator
from contextlib import contextmanager


STOPPED = "edc-hub: stopped; the same command goes on from here"  # what ctrl-C is answered with, wherever it falls


class InputError(ValueError):
    """What the user gave is wrong: a recipe key, a file, a data set, a device.

    The message is one line: the key or file, what is wrong with it, and what to write instead. Commands print it
    without a traceback and exit with status 2.
    """


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Says what the InputErrors inside are about: `place: …`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def first_line(error: Exception) -> str:
    """What an error of a library says first, for a message of one line."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


class OtherFailed(RuntimeError):
    """Another process of this run has failed while this one waited for it, and goes on with the next piece of work."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error  # what failed there: an InputError, or a RuntimeError with the text of anything else


class OtherStopped(RuntimeError):
    """Another process of this run has stopped while this one waited for it; its own message says why."""
