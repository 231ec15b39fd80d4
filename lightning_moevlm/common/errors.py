"""Errors that end a command without a traceback.

`moevlm` prints a `UserError` in one line and exits with code 2. Our own bugs are `assert`s and keep their traceback.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_MISSING = re.compile(r"requires (?:the )?(?:🤗 )?([\w-]+) library|pip install ([\w-]+)`|No module named '([\w-]+)")
_PACKAGES = {"pil": "pillow", "pyav": "av", "jinja": "jinja2"}
_REMARKS = {"torchvision": ", the release that fits your torch, from the same index"}
_MISMATCHED = re.compile(r"operator torchvision::\w+ does not exist|undefined symbol")


class UserError(ValueError):
    """A mistake in the user's input; the message names the value, the values allowed and the change to make."""


class Diverged(Exception):  # noqa: N818 - an outcome, not a fault
    """A run ended because its loss is not a number; the message names the step."""


class Stopped(Exception):  # noqa: N818 - asked for, not a fault
    """A run was ended by a signal, after it saved a checkpoint; `text` says where."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.signal_number = signal_number


def say_missing_package(error: BaseException) -> str | None:
    """Return which package a library misses, and its remedy; None if an error is about something else.

    transformers hides the error of an import behind one of its own, so the causes are read too.
    """
    text = " ".join(" ".join(str(each).split()) for each in _with_causes(error))
    if _MISMATCHED.search(text):
        return (
            "needs a torchvision that fits your torch, and the installed one is of another build: pip install "
            f"--force-reinstall --no-deps torchvision{_REMARKS['torchvision']}"
        )
    found = _MISSING.search(text)
    if found is None:
        return None
    name = next(each for each in found.groups() if each is not None).lower()
    package = _PACKAGES.get(name, name)
    return f"needs the package {package}, which is not installed: pip install {package}{_REMARKS.get(package, '')}"


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def explain_allocation() -> Iterator[None]:
    """Turn memory that the machine does not have, asked for while a model is built, into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"can't allocate memory.* allocate (\d+) bytes", str(error))
        if found is None:
            raise
        raise UserError(
            f"the model does not fit into memory: one of its tensors takes {int(found.group(1)) / 1e9:,.0f} GB; choose "
            "smaller sizes, such as num_experts or hidden_dim; `moevlm describe -c ...` counts them without memory"
        ) from error
