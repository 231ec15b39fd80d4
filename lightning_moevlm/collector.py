"""How often Python's collector looks for garbage while a command works, so that it does not walk what stays.

Imports and parsers make a million objects that live as long as the process. Every full collection walks all of them,
and so does the one at its end.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_USUAL = gc.get_threshold()
_SELDOM = (100_000, 50, 100)


@contextmanager
def collected_seldom() -> Iterator[None]:
    """Collect seldom within, and not when the process ends: that takes seconds, and the system frees all of it."""
    atexit.register(gc.freeze)
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*_USUAL)


def collect_as_usual() -> None:
    """Collect as often as Python does from here on, but never what is there already."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
