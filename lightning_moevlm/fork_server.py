"""A process that has imported and read what the runs of a sweep have in common, and becomes each of them by forking.

A run then begins at once, not after seconds of imports; forks share the memory of what was there before. Started by
`study/engines/forks.py`:

    python -m lightning_moevlm.fork_server PIPE WORDS...

PIPE is the number of an inherited pipe, WORDS a command line like those to come: it is parsed, and nothing of it is
built, since a process that has computed on several threads must not be forked. Every run is a session of its own and
ends with this process.
"""

import atexit
import gc
import importlib
import multiprocessing
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from rich.console import Console

from lightning_moevlm.cli import main
from lightning_moevlm.collector import collected_seldom
from lightning_moevlm.errors import UserError
from lightning_moevlm.study.child import die_with_parent
from lightning_moevlm.study.engines.forks import Channel
from lightning_moevlm.url_secrets import without_url_secrets

# What a run imports in the course of things, beyond what its command line needs; the last three where they are there.
_LATER = (
    *("mlflow.store.tracking.sqlalchemy_store", "sqlalchemy.dialects.sqlite", "alembic.command", "git"),
    *("s3fs", "gcsfs", "adlfs"),
)


def serve(channel: Channel, program: Callable[[list[str]], int]) -> None:
    """Fork runs as asked, and tell how they end, until the other end is gone.

    Args:
        channel: to the engine.
        program: what a run does with its words; returns its exit code.
    """
    runs: dict[str, BaseProcess] = {}  # by ticket
    try:
        with selectors.PollSelector() as events:
            events.register(channel.pipe, selectors.EVENT_READ)
            while True:
                for event, _ in events.select():
                    if event.data is not None:
                        _tell_end(channel, event, events, runs)
                    elif (message := channel.receive()) is None:
                        return
                    elif "signal" in message:
                        if (run := runs.get(message["ticket"])) is not None:
                            _end(run, message["signal"])
                    else:
                        _begin(channel, message, events, runs, program)
    finally:  # also of an error: Python would wait for them when this process ends, and nobody would hear of them
        for run in runs.values():
            run.kill()


def _begin(
    channel: Channel,
    message: Mapping[str, Any],
    events: selectors.BaseSelector,
    runs: dict[str, BaseProcess],
    program: Callable[[list[str]], int],
) -> None:
    ours = [other.fd for other in events.get_map().values()]
    forks = multiprocessing.get_context("fork")
    arguments = program, message["words"], message["log"], ours, die_with_parent()
    run = forks.Process(target=_be, args=arguments)
    run.start()
    assert run.pid is not None
    runs[message["begin"]] = run
    events.register(os.pidfd_open(run.pid), selectors.EVENT_READ, message["begin"])
    channel.send({"ticket": message["begin"], "pid": run.pid, "at": time.time()})


def _end(run: BaseProcess, number: int) -> None:
    """Send a signal by the run itself: `os.kill` would fail, or meet another, where its end was noted just now."""
    if number == signal.SIGKILL:
        run.kill()
    else:
        run.terminate()


def _tell_end(
    channel: Channel, event: selectors.SelectorKey, events: selectors.BaseSelector, runs: dict[str, BaseProcess]
) -> None:
    events.unregister(event.fd)
    os.close(event.fd)
    run = runs.pop(event.data)
    run.join()
    channel.send({"ticket": event.data, "code": run.exitcode})


def _be(
    program: Callable[[list[str]], int],
    words: list[str],
    log_file: str,
    ours: Collection[int],
    bind: Callable[[], None] | None,
) -> None:
    """Be a run: a session of its own that writes to its log. `ours`: files of the server, `bind`: to end with it."""
    if bind is not None:
        bind()
    for number in ours:
        os.close(number)
    os.setsid()
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    # to start further ranks, Lightning runs the main module again
    sys.modules["__main__"] = importlib.import_module("lightning_moevlm.__main__")
    try:
        code = program(words)
    finally:
        atexit._run_exitfuncs()  # as a program does; a fork leaves without
    sys.exit(code)


def prepare(words: Sequence[str]) -> None:
    """Import and parse what a run imports and parses."""
    from lightning_moevlm import lightning_cli

    for name in _LATER:
        if find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    try:
        lightning_cli.rehearse(words)
    except UserError as error:  # its run will tell
        _tell(str(error))


def _tell(line: str) -> None:
    Console(stderr=True).print(without_url_secrets(line), highlight=False, markup=False, soft_wrap=True)


def run(number: str, words: Sequence[str]) -> int:
    """Serve the pipe of that number; return an exit code."""
    with Connection(int(number)) as pipe:  # closed as soon as this ends, whatever then holds the process up
        with collected_seldom():
            prepare(words)
        gc.freeze()
        if threading.active_count() > 1:
            names = ", ".join(thread.name for thread in threading.enumerate())
            _tell(f"what was imported has started threads ({names}), which no fork would have")
            return 1
        serve(Channel(pipe), main)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
