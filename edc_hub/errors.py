"""The exception a user can cause, and the one another process can."""


class InputError(ValueError):
    """What the user gave is wrong: a recipe key, a file, a data set, a device.

    The message is one line: the key or file, what is wrong with it, and what to write instead. Commands print it
    without a traceback and exit with status 2.
    """


class OtherStopped(RuntimeError):
    """Another process of this run has stopped while this one waited for it; its own message says why."""
