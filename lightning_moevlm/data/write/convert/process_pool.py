"""Runs tasks in several processes, and yields their results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lightning_moevlm.common.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_WAITING_PER_JOB = 4
"""Tasks submitted in advance: a slow task does not stop the others, and memory stays bounded."""


class WorkerDiedError(UserError):
    """A process died. Results of finished tasks are still valid."""


def map_in_order(function: Callable[[T], R], tasks: Iterable[T], num_jobs: int) -> Generator[R]:
    """Yield `function(task)` for every task, in order; with one job, in this process.

    Raises:
        WorkerDiedError: if a process died.
    """
    if num_jobs <= 1:
        yield from map(function, tasks)
        return
    # spawned, not forked: the parent may run threads, whose locks a fork would copy in any state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_jobs, context, initializer=_end_with_parent) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= num_jobs * _WAITING_PER_JOB:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise WorkerDiedError(
                "a process of the conversion died (was it killed for memory?); run the same command to resume, with "
                "fewer --jobs if memory was short"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _end_with_parent() -> None:
    """End with the parent, even after kill -9; the pool alone would wait for its next task forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
