"""Reports a user's mistake on one rank; the others exit with the same code and print nothing.

Every rank finds most mistakes. Some, such as an unreachable MLflow server, only one rank finds, and the others lose
their connection to it. A rank that reports creates a mark, a file whose path all ranks of the machine know:

    started by Lightning         the first process passes the path to its children; the first to find a mistake reports
    started by torchrun, srun    the path follows from their common parent; rank 0 reports, and another one only if no
                                 mark comes for some seconds
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from lightning_moevlm.common.errors import UserError

_MARK = "MOEVLM_MISTAKE_MARK"
_RANKS = ("RANK", "SLURM_PROCID")  # set by torchrun, by srun
_PATIENCE_S = 10.0
_MISTAKE = 2  # the exit code


@contextmanager
def report_once(folder: Path) -> Iterator[None]:
    """Raise a `UserError` on one rank; leave with its exit code on the others.

    Args:
        folder: for the mark of ranks that Lightning starts; removed when the first rank ends.
    """
    is_first = _MARK not in os.environ
    rank = next((int(os.environ[name]) for name in _RANKS if is_first and name in os.environ), None)
    os.environ.setdefault(_MARK, str(folder / "mistake" if rank is None else _find_shared_mark()))
    mark = Path(os.environ[_MARK])
    try:
        yield
    except UserError as error:
        is_reported = rank and _is_soon_claimed(mark)
        if is_reported or not (_claim(mark) or rank == 0):  # a mark of an earlier command does not silence rank 0
            raise SystemExit(_MISTAKE) from error
        raise
    except RuntimeError as error:  # a lost connection is one
        is_one_of_many = not is_first or rank or "LOCAL_RANK" in os.environ  # which Lightning sets for children
        if is_one_of_many and _is_soon_claimed(mark):
            raise SystemExit(_MISTAKE) from error
        raise
    finally:
        if is_first:
            del os.environ[_MARK]


def _find_shared_mark() -> Path:
    parent = psutil.Process(os.getppid())
    return Path(tempfile.gettempdir()) / f"moevlm_mistake_{parent.pid}_{parent.create_time():.0f}"


def _claim(mark: Path) -> bool:
    """Return whether this rank is the first."""
    try:
        mark.touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):  # not found: the first rank has ended, and removed the folder
        return False
    return True


def _is_soon_claimed(mark: Path) -> bool:
    """Return whether a rank reports a mistake, or has ended; the connection may be lost before that."""
    end = time.monotonic() + _PATIENCE_S
    while not mark.exists() and mark.parent.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return mark.exists() or not mark.parent.exists()
