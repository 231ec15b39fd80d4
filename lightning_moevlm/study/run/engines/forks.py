"""Runs a job as a fork of one process, so that a sweep imports once what all its runs need.

That process is `lightning_moevlm.cli.fork_server`. Engine and server speak over a pipe, in tuples:

    to the server    (ticket, words, log file)     start that run; the first tuple is a sample without a ticket
    from the server  (ticket, pid, seconds)        it has started, in seconds since 1970
                     (ticket, None, exit code)     it has ended: only a parent learns the exit code

`multiprocessing`'s fork server is not used. Its `start` blocks during the imports, so that Ctrl-C has to wait. Up to
Python 3.12 it skips exit handlers, which upload what a run has logged. Its runs outlive a killed server or sweep.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path

import psutil

from lightning_moevlm.study.run.processes.child_process import PATIENCE_SECONDS, end_processes, start_process
from lightning_moevlm.study.run.processes.run_files import open_log

_SERVER = (sys.executable, "-m", "lightning_moevlm.cli.fork_server")


class ForkServer:
    """The process that becomes the runs. Linux only: runs end with it, and it ends with this program.

    Args:
        words: Arguments of `moevlm`, like those of the runs to come.
        env: Environment of the runs.
        folder: Working directory of the runs.
        log_file: Log of the server itself.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], folder: Path, log_file: Path) -> None:
        self._pipe, theirs = Pipe()
        command = [*_SERVER, str(theirs.fileno())]
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open_log(log_file, command) as log:
            self._process = start_process(command, env, log, folder, (theirs.fileno(),))
        self.pid = self._process.pid
        self.is_gone = False
        self.started: dict[str, tuple[int, float]] = {}  # by ticket: process number, seconds since 1970
        self._codes: dict[str, int] = {}
        self.start("", words, log_file)

    def start(self, ticket: str, words: Sequence[str], log_file: Path) -> None:
        """Ask for a run, which starts as soon as the server has imported what it needs."""
        with suppress(BrokenPipeError, ConnectionResetError):  # `read_news` notices a server that is gone
            self._pipe.send((ticket, list(words), str(log_file)))

    def wake(self) -> None:
        """Let a stopped server continue: it could neither start a run nor report its end."""
        self._process.send_signal(signal.SIGCONT)

    def send_signal(self, ticket: str, number: int) -> None:
        """Send a started run a signal, unless it has ended."""
        self.wake()
        self.read_news()
        if ticket not in self._codes:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(self.started[ticket][0]).send_signal(number)

    def read_news(self) -> None:
        """Read the server's reports so far."""
        while not self.is_gone:
            is_dead = self._process.poll() is not None  # before the pipe is read: then nothing can follow
            try:
                if self._pipe.poll():
                    ticket, pid, number = self._pipe.recv()
                    if pid is None:
                        self._codes[ticket] = number
                    else:
                        self.started[ticket] = pid, number
                    continue
            except (EOFError, OSError):
                is_dead = True
            if not is_dead:
                return
            self.is_gone = True
            self.kill(PATIENCE_SECONDS)
            end_processes([pid for ticket, (pid, _) in self.started.items() if ticket not in self._codes], 0.0)

    def exit_code(self, ticket: str) -> int | None:
        """Return the exit code of a run that has ended; runs that ended with their server were killed."""
        lost = -signal.SIGKILL if self.is_gone and ticket in self.started else None
        return self._codes.get(ticket, lost)

    def kill(self, patience_seconds: float = 0.0) -> None:
        """Kill it with its runs, unless it ends by itself within the patience."""
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Kill it with its runs; it holds nothing that it would have to write."""
        self._pipe.close()
        self.is_gone = True
        self.kill()


@dataclass
class Fork:
    """A run as a process: a fork of the server."""

    server: ForkServer  # forks the run
    ticket: str  # names the run to the server
    _signal: int | None = field(default=None, init=False)  # asked for before it started

    @property
    def pid(self) -> int | None:
        """Process number; None until it has started."""
        return self.server.started.get(self.ticket, (None,))[0]

    @property
    def fork_seconds(self) -> float | None:
        """Moment of the fork, seconds since 1970; None until then."""
        return self.server.started.get(self.ticket, (None, None))[1]

    @property
    def is_lost(self) -> bool:
        """Whether the server ended by itself before it started the run."""
        return self.server.is_gone and self.pid is None and self._signal is None

    def poll(self) -> int | None:
        """Return its exit code; None while it runs or waits for the server's imports."""
        self.server.read_news()
        if self.pid is None:
            return -(self._signal or signal.SIGKILL) if self.server.is_gone else None
        if self._signal is not None:
            self.server.send_signal(self.ticket, self._signal)
            self._signal = None
        return self.server.exit_code(self.ticket)

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it; a server that hangs before it has started the run is killed first."""
        if self.pid is None:
            self.server.kill()
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.pid is not None:
            self.server.send_signal(self.ticket, number)
        else:
            self._signal = number  # `poll` sends it
            self.server.wake()
