"""A process that imports the package once and forks into each run of a sweep.

A run then starts at once, not after seconds of imports. Forks share the memory of what was there before.
`study/run/engines/forks.py` starts it and defines the messages:

    python -m lightning_moevlm.cli.fork_server PIPE

PIPE is the number of an inherited pipe. The first message is a sample command line. It is parsed to warm caches, but
nothing is built: a process that has started compute threads cannot be forked safely. Every run is a session of its own
and ends with this process.
"""

import atexit
import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from rich.console import Console

from lightning_moevlm.cli.main import main
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.process_tuning import collect_rarely
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.study.run.processes.child_process import die_with_parent

# Imported by a run later than its command line is parsed; the last three only if they are installed.
_LATER = (
    *("mlflow.store.tracking.sqlalchemy_store", "sqlalchemy.dialects.sqlite", "alembic.command", "git"),
    *("s3fs", "gcsfs", "adlfs"),
)
_POLL_SECONDS = 0.02


def serve(pipe: Connection) -> Sequence[str] | None:
    """Fork runs as asked and report how they end, until the other end of the pipe is closed; that ends them all.

    Returns:
        In a fork: the words of the run that it becomes. In this process itself: None.
    """
    runs: dict[int, str] = {}  # tickets by process number, which is the run's own until it has been waited for here
    try:
        while True:
            if pipe.poll(_POLL_SECONDS):
                try:
                    ticket, words, log_file = pipe.recv()
                except (EOFError, ConnectionResetError):
                    return None
                bind = die_with_parent()
                pid = os.fork()
                if pid == 0:
                    runs.clear()
                    _become_run(log_file, bind)
                    return list(words)
                runs[pid] = ticket
                _send(pipe, (ticket, pid, time.time()))
            for pid in list(runs):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    _send(pipe, (runs.pop(pid), None, os.waitstatus_to_exitcode(status)))
    finally:  # also after an error; none of them is left when the engine learns of it
        for pid in runs:
            os.kill(pid, signal.SIGKILL)
        for pid in runs:
            os.waitpid(pid, 0)


def _send(pipe: Connection, message: tuple[str, int | None, float]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # the next `recv` notices it
        pipe.send(message)


def _become_run(log_file: str, bind: Callable[[], None] | None) -> None:
    """Become a session that ends with the server, writes to its log and looks like `python -m lightning_moevlm`.

    Args:
        log_file: Gets the output.
        bind: Called first.
    """
    if bind is not None:
        bind()
    os.setsid()
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    # to start further ranks, Lightning runs the main module again
    main_module = sys.modules["__main__"] = importlib.import_module("lightning_moevlm.__main__")
    sys.argv = [str(main_module.__file__)]


class QuickExit:
    """Ends a fork as Python ends, but frees nothing: it would first copy all that it shares, which takes a second.

    Create it first of all, since handlers for the end run in reverse order. code: exit code; 1 after an error.
    """

    def __init__(self) -> None:
        self._server = os.getpid()
        self.code = 1
        atexit.register(self._leave)

    def _leave(self) -> None:
        if os.getpid() != self._server:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)

    def run(self, program: Callable[[], int]) -> int:
        """Run a program, note its exit code and return it."""
        try:
            self.code = program()
        except SystemExit as error:
            self.code = error.code if isinstance(error.code, int) else int(error.code is not None)
            raise
        return self.code


def prepare(words: Sequence[str]) -> None:
    """Import and parse what a run imports and parses."""
    from lightning_moevlm.cli import training

    for name in _LATER:
        with suppress(ImportError):  # a broken one may not be needed by any run
            importlib.import_module(name)
    try:
        training.rehearse(words)
    except UserError as error:  # its run reports it too
        _print(str(error))


def _print(line: str) -> None:
    Console(stderr=True).print(mask_url_secrets(line), highlight=False, markup=False, soft_wrap=True)


def run(number: str) -> int:
    """Serve the pipe of that number, or become one of its runs; return an exit code."""
    quick_exit = QuickExit()
    with Connection(int(number)) as pipe:  # closed as soon as this ends, even if the process ends later
        try:
            _, sample, _ = pipe.recv()
        except EOFError:
            return 0
        with collect_rarely():
            prepare(sample)
        gc.freeze()
        if threading.active_count() > 1:
            names = ", ".join(thread.name for thread in threading.enumerate())
            _print(f"the imports have started threads ({names}), which no fork would have")
            return 1
        words = serve(pipe)
    return 0 if words is None else quick_exit.run(lambda: main(words))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
