"""A process that has imported and read what the runs of a sweep have in common, and becomes each of them by forking.

A run then begins at once, not after seconds of imports; forks share the memory of what was there before. Started by
`study/engines/forks.py`:

    python -m lightning_moevlm.cli.fork_server PIPE

PIPE is the number of an inherited pipe. The first that comes by it is a command line like those to come: it is parsed,
and nothing of it is built, since a process that has computed on several threads must not be forked. Every run is a
session of its own and ends with this process.
"""

import atexit
import gc
import importlib
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NoReturn

from rich.console import Console

from lightning_moevlm.cli.main import main
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.process_tuning import collect_rarely
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.study.run.engines.forks import Channel
from lightning_moevlm.study.run.processes.child_process import die_with_parent

# What a run imports in the course of things, beyond what its command line needs; the last three where they are there.
_LATER = (
    *("mlflow.store.tracking.sqlalchemy_store", "sqlalchemy.dialects.sqlite", "alembic.command", "git"),
    *("s3fs", "gcsfs", "adlfs"),
)


def serve(channel: Channel) -> list[str] | None:
    """Fork runs as asked, and tell how they end, until the other end is gone; that ends them all.

    Returns:
        In a fork: the words of the run that it is to be. In this process itself: None.
    """
    runs: dict[str, int] = {}  # process numbers by ticket; each is the run's own until it has been waited for here
    with selectors.PollSelector() as events:
        events.register(channel.pipe, selectors.EVENT_READ)
        try:
            while True:
                for event, _ in events.select():
                    if event.data is not None:  # the ticket of a run that has ended
                        events.unregister(event.fd)
                        os.close(event.fd)
                        _, status = os.waitpid(runs.pop(event.data), 0)
                        channel.send({"ticket": event.data, "code": os.waitstatus_to_exitcode(status)})
                    elif (message := channel.receive()) is None:
                        return None
                    elif "signal" in message:
                        if message["ticket"] in runs:
                            os.kill(runs[message["ticket"]], message["signal"])
                    else:
                        bind = die_with_parent()
                        pid = os.fork()
                        if pid == 0:
                            runs.clear()
                            others = [other.fd for other in events.get_map().values() if other.data is not None]
                            _be_a_run(message["log"], others, bind)
                            return list(message["words"])
                        runs[message["begin"]] = pid
                        events.register(os.pidfd_open(pid), selectors.EVENT_READ, message["begin"])
                        channel.send({"ticket": message["begin"], "pid": pid, "at": time.time()})
        finally:  # also after an error; none of them is left when the engine learns of it
            for pid in runs.values():
                os.kill(pid, signal.SIGKILL)
            for pid in runs.values():
                os.waitpid(pid, 0)


def _be_a_run(log_file: str, others: Collection[int], bind: Callable[[], None] | None) -> None:
    """Be a session that ends with the server, writes to its log and is, for whoever asks, `python -m lightning_moevlm`.

    Args:
        log_file: gets the output.
        others: files that tell the server of the end of other runs.
        bind: called first.
    """
    if bind is not None:
        bind()
    for number in others:
        os.close(number)
    os.setsid()
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    # to start further ranks, Lightning runs the main module again
    main_module = sys.modules["__main__"] = importlib.import_module("lightning_moevlm.__main__")
    sys.argv = [str(main_module.__file__)]


def leave(code: int) -> NoReturn:
    """End a run as Python ends, but free nothing: it would first copy all that it shares, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(words: Sequence[str]) -> None:
    """Import and parse what a run imports and parses."""
    from lightning_moevlm.cli import training

    for name in _LATER:
        with suppress(ImportError):  # one that is broken may not be asked for by any run
            importlib.import_module(name)
    try:
        training.rehearse(words)
    except UserError as error:  # its run will tell
        _tell(str(error))


def _tell(line: str) -> None:
    Console(stderr=True).print(mask_url_secrets(line), highlight=False, markup=False, soft_wrap=True)


def run(number: str) -> int:
    """Serve the pipe of that number, or be one of its runs; return an exit code."""
    with Connection(int(number)) as pipe:  # closed as soon as this ends, whatever then holds the process up
        channel = Channel(pipe)
        if (example := channel.receive()) is None:
            return 0
        with collect_rarely():
            prepare(example["words"])
        gc.freeze()
        if threading.active_count() > 1:
            names = ", ".join(thread.name for thread in threading.enumerate())
            _tell(f"what was imported has started threads ({names}), which no fork would have")
            return 1
        moevlm_arguments = serve(channel)
    if moevlm_arguments is not None:
        leave(main(moevlm_arguments))
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
