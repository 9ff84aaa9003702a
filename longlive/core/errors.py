"""Errors that users meet. One line each: what is wrong, the values, the remedy.

The command line prints the message on stderr and exits with `exit_code`; no traceback.
Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted with what was finished kept.
"""


class LongLiveError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 1


class CheckFailed(LongLiveError):
    """A check ran to its end and its answer is no."""

    exit_code = 1


class InputError(LongLiveError, ValueError):
    """The user gave something that cannot work. The message names the value and the remedy."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value that cannot work."""


class CheckpointError(InputError):
    """A weight file that is missing, truncated or of the wrong kind."""


class NotAvailable(InputError):
    """A documented feature whose engine is not in this version."""

    def __init__(self, feature: str, remedy: str):
        super().__init__(f"{feature} is not available yet; {remedy}")


class Interrupted(LongLiveError):
    """The user stopped the work; what was finished is kept."""

    exit_code = 130


def nearest(word: str, words) -> str | None:
    """The member of `words` closest in spelling to `word`, or None when nothing is close."""
    import difflib

    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return close[0] if close else None
