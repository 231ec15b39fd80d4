"""Runs that are forks of one process, so that a sweep imports once what each of them needs.

The process is `lightning_moevlm.cli.fork_server`. It and the engine speak over a pipe: to it go the beginnings
and the signals, from it come the process numbers and the exit codes, since only a parent is told those.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from lightning_moevlm.study.run.processes.child_process import PATIENCE_SECONDS, end_processes, start_process
from lightning_moevlm.study.run.processes.run_files import open_log

_SERVER = (sys.executable, "-m", "lightning_moevlm.cli.fork_server")


@dataclass(frozen=True)
class Channel:
    """One end of a pipe of two directions; a message is a JSON object, whatever its keys: nothing is unpickled.

    words: the first one, a command line like those to come. begin, words, log: fork the run of that ticket. signal,
    ticket: send it a signal. pid, at, ticket: it has begun, in seconds since 1970. code, ticket: it has ended.
    """

    pipe: Connection

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; where the other end is gone, to nobody: who receives learns of that."""
        try:
            self.pipe.send_bytes(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message; None: the other end is gone."""
        try:
            received = self.pipe.recv_bytes()
        except (EOFError, OSError):  # it was closed between messages, or within one
            return None
        message: dict[str, Any] = json.loads(received)
        return message


class ForkServer:
    """The process that becomes the runs. Linux only: runs end with it, and it ends with this program.

    Args:
        words: of `moevlm`, as those of the runs to come.
        env: of the runs.
        folder: of the runs.
        log_file: of the server itself.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], folder: Path, log_file: Path) -> None:
        ours, theirs = Pipe()
        command = [*_SERVER, str(theirs.fileno())]
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with theirs, open_log(log_file, command) as log:
            self._process = start_process(command, env, log, folder, (theirs.fileno(),))
        self._channel = Channel(ours)
        self._channel.send({"words": list(words)})
        self._begun: dict[str, tuple[int, float]] = {}  # by ticket: process number, seconds since 1970
        self._codes: dict[str, int] = {}
        self.pid = self._process.pid
        self.is_gone = False

    @property
    def has_served(self) -> bool:
        """Whether any run has begun."""
        return bool(self._begun)

    def begin(self, ticket: str, words: Sequence[str], log_file: Path) -> None:
        """Ask for a run, which begins as soon as the server has imported what it needs."""
        self._channel.send({"begin": ticket, "words": list(words), "log": str(log_file)})

    def signal(self, ticket: str, number: int) -> None:
        """Send a run a signal, unless it has ended; one that has not begun gets it when it does."""
        self._channel.send({"ticket": ticket, "signal": number})
        self._process.send_signal(signal.SIGCONT)  # a stopped one would not hear

    def hear(self, seconds: float = 0.0) -> None:
        """Take in what the server has told, waiting so long for the first message."""
        while not self.is_gone:
            is_dead = self._process.poll() is not None  # asked first: then it has told all that it will
            if self._channel.pipe.poll(seconds):
                seconds = 0.0
                self._take(self._channel.receive())
            elif is_dead:  # another process holds its end open
                self._take(None)
            else:
                return

    def _take(self, message: Mapping[str, Any] | None) -> None:
        if message is None:
            self.is_gone = True
            self.kill(PATIENCE_SECONDS)
            end_processes([pid for ticket, (pid, _) in self._begun.items() if ticket not in self._codes], 0.0)
        elif "pid" in message:
            self._begun[message["ticket"]] = message["pid"], message["at"]
        else:
            self._codes[message["ticket"]] = message["code"]

    def begun(self, ticket: str) -> tuple[int, float] | None:
        """Return the process number of a run and when it began, seconds since 1970; None until then."""
        return self._begun.get(ticket)

    def code_of(self, ticket: str) -> int | None:
        """Return the exit code of a run that has ended; runs that ended with their server were killed."""
        lost = -signal.SIGKILL if self.is_gone and ticket in self._begun else None
        return self._codes.get(ticket, lost)

    def kill(self, patience_seconds: float = 0.0) -> None:
        """End it, and whatever it still runs; within the patience it may end by itself."""
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it, and whatever it still runs; it keeps nothing that it would have to write."""
        self._channel.pipe.close()
        self.is_gone = True
        self.kill()


@dataclass
class Fork:
    """A run as a fork of the server; a process of its own where the server ended before it had begun.

    command: what it is, as a command line of its own. log: gets its output.
    """

    server: ForkServer
    ticket: str
    command: Sequence[str]
    env: Mapping[str, str]
    folder: Path
    log: IO[bytes]
    alone: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _asked: int | None = field(default=None, init=False)  # to end, by a signal

    @property
    def pid(self) -> int | None:
        """Its number, once the server has told it."""
        if self.alone is not None:
            return self.alone.pid
        begun = self.server.begun(self.ticket)
        return None if begun is None else begun[0]

    @property
    def began(self) -> float | None:
        """When the server forked it, seconds since 1970; None where it did not."""
        begun = self.server.begun(self.ticket)
        return None if begun is None else begun[1]

    def poll(self, seconds: float = 0.0) -> int | None:
        """Return its exit code, waiting so long for news; None while it runs, or waits for the server's imports."""
        if self.alone is None:
            self.server.hear(seconds)
            if not self.server.is_gone or self.pid is not None:
                return self.server.code_of(self.ticket)
            if self._asked is not None:
                return -self._asked
            self.log.write(b"# the fork server ended before this began, see its log; it is a process of its own\n")
            self.log.flush()
            self.alone = start_process(self.command, self.env, self.log, self.folder)
        return self.alone.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        ends = float("inf") if timeout is None else time.monotonic() + timeout
        left = ends - time.monotonic()
        while (code := self.poll(max(0.0, min(left, 1.0)))) is None:
            if self.alone is not None:
                return self.alone.wait(None if timeout is None else max(0.0, left))
            left = ends - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.command, timeout or 0.0)
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Make it end; a server that has not even begun it hangs, and ends first."""
        if self.alone is None and self.pid is None:
            self.server.kill()
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.alone is None:
            self._asked = number
            self.server.signal(self.ticket, number)
        else:
            self.alone.send_signal(number)
