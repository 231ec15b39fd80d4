"""Let one of the ranks that Lightning starts on this machine tell a mistake, and the others end without a word.

All ranks find most mistakes, each for itself; of others, such as an MLflow server that does not answer, one rank knows,
and the others lose their connection to it. The first to find one marks that in a file, whose path all have from the
process that has started them; a rank that sees the mark has nothing to add. Ranks that a cluster starts have no such
process, and each tells what it finds.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_moevlm.common.errors import UserError

_MARK = "MOEVLM_MISTAKE_TOLD"
_PATIENCE_S = 10.0
_MISTAKE = 2  # the exit code


@contextmanager
def report_once(folder: Path) -> Iterator[None]:
    """Pass a `UserError` on in one rank alone, and in the others leave with its exit code.

    Args:
        folder: for the mark, unless this process was started by another rank; removed when the first rank ends.
    """
    is_first = _MARK not in os.environ
    mark = Path(os.environ.setdefault(_MARK, str(folder / "mistake_told")))
    try:
        yield
    except UserError as error:
        if not _claim(mark):
            raise SystemExit(_MISTAKE) from error
        raise
    except RuntimeError as error:  # what a lost connection is
        is_one_of_many = not is_first or "LOCAL_RANK" in os.environ  # which Lightning sets when it starts others
        if is_one_of_many and _is_told_soon(mark):
            raise SystemExit(_MISTAKE) from error
        raise
    finally:
        if is_first:
            del os.environ[_MARK]


def _claim(mark: Path) -> bool:
    """Return whether this rank is the first."""
    try:
        mark.touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):  # not found: the first rank has ended, and removed the folder
        return False
    return True


def _is_told_soon(mark: Path) -> bool:
    """Return whether a rank tells a mistake, or has told its own end; the connection may be lost before it does."""
    end = time.monotonic() + _PATIENCE_S
    while not mark.exists() and mark.parent.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return mark.exists() or not mark.parent.exists()
