"""Distinguishes Lightning's refusals from failures: a refusal comes from a `raise` in Lightning's own code.

Lightning raises ValueError, TypeError, RuntimeError and more for a user's mistakes, and bugs raise the same classes.
The place of the `raise` distinguishes them. The parser wraps such an error in its own, so the cause is followed.
"""

import linecache
from types import TracebackType

from lightning_moevlm.common.errors import UserError

_LIGHTNING = ("lightning", "pytorch_lightning")


def find_refusal(error: BaseException) -> str | None:
    """Return the refusal in one line, by a part of ours (a `UserError`) or by Lightning; None for a failure."""
    text: str | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            text = str(cause)
        elif isinstance(cause, Exception) and is_raised_by(cause, *_LIGHTNING):
            text = _describe(cause)
        cause = cause.__cause__
    return text


def is_raised_by(error: BaseException, *packages: str) -> bool:
    """Return whether a `raise` in one of the packages raised the error, and not code that they call."""
    if error.__traceback__ is None:
        return False
    frame = _last(error.__traceback__)
    line = linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno)
    return str(frame.tb_frame.f_globals.get("__name__")).split(".")[0] in packages and line.lstrip().startswith(
        "raise "
    )


def _describe(error: Exception) -> str:
    assert error.__traceback__ is not None
    names = _last(error.__traceback__).tb_frame.f_locals
    message = " ".join(str(error).split())
    owner = type(names["self"]).__name__ if "self" in names else ""
    is_public = owner and not owner.startswith("_") and not owner.endswith(("Connector", "Loop"))
    return f"{owner}: {message}" if is_public and owner not in message else message


def _last(traceback: TracebackType) -> TracebackType:
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback
