"""Starts, watches and ends one run as a process.

A child is a session of its own, so Ctrl-C in the terminal reaches the sweep alone, which then ends its children. If the
sweep is killed, the system ends them (Linux); elsewhere the next `sweep run` does.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import psutil

from lightning_moevlm.study.run.processes.run_files import open_log

PATIENCE_SECONDS = 30.0
"""Time for a process that was asked to end: it finishes its step and writes a checkpoint."""
_STOPS = (
    "SIGINT",
    "SIGTERM",
    "SIGHUP",
    "SIGUSR1",
    "SIGUSR2",
)  # what a run saves upon: training/callbacks/stopping/stop_by_signal.py
_LOOK_SECONDS = 0.01
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ProcessEnd:
    """How a run's process ended."""

    # exit code; negative: the signal that ended it; None: its place was stopped, and the run may resume
    code: int | None
    reason: str = ""  # why we ended it, or ""
    started: float | None = None  # seconds since 1970; None if unknown
    ended: float | None = None  # seconds since 1970; None if unknown

    @property
    def stop_signal(self) -> signal.Signals | None:
        """The signal that asked it to end, upon which it saved a checkpoint, as `moevlm fit` does; or None."""
        return next((number for number in signal.Signals if number.name in _STOPS and self.code == 128 + number), None)


class Process(Protocol):
    """A process, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int | None:
        """Its number; None while unknown."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """Kill it."""


@dataclass
class Child:
    """A started process and its open log."""

    process: Process
    log: IO[bytes]  # gets its output
    started: float  # seconds since 1970
    timeout_seconds: float | None = None  # longest time; None: no limit
    reason: str = ""  # why we ended it, or ""
    begun: float = field(default_factory=time.monotonic)  # the start by the monotonic clock

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        log_file: Path,
        timeout_seconds: float | None = None,
        folder: Path | None = None,
    ) -> "Child":
        """Start a command in a folder, by default this one; its output is appended to the log."""
        log = open_log(log_file, command)
        return cls(start_process(command, env, log, folder), log, time.time(), timeout_seconds)

    def poll(self) -> ProcessEnd | None:
        """Return how it ended, or None while it runs; a process over its time is ended first."""
        code = self.process.poll()
        if code is None and self.timeout_seconds is not None and time.monotonic() > self.begun + self.timeout_seconds:
            self.reason = f"not done after {self.timeout_seconds / 60:g} minutes (timeout_minutes), so it was ended"
            self.end()
            code = self.process.poll()
        if code is None:
            return None
        self.log.close()
        return ProcessEnd(code, self.reason, self.started, time.time())

    def end(self) -> None:
        """End it and its descendants, unless it has ended: SIGTERM, then SIGKILL."""
        end_children([self])


def end_children(children: Sequence[Child]) -> None:
    """End our own processes and their descendants, all at once: SIGTERM, after PATIENCE_SECONDS SIGKILL.

    Only the first to wait for a child gets its exit code, so each is waited for by its own `process`.
    """
    living = [child.process for child in children if child.process.poll() is None]
    below = [process for child in living for process in _find_descendants(child.pid)]
    for process in living:
        process.terminate()
    deaf = _wait_for_ends(living, PATIENCE_SECONDS)
    for process in deaf:
        process.kill()
    _wait_for_ends(deaf, math.inf)
    _kill_and_wait(below)


def _wait_for_ends(processes: Sequence[Process], seconds: float) -> Sequence[Process]:
    """Wait at most so long for our own processes; return those that still run."""
    ends = time.monotonic() + seconds
    while (living := [each for each in processes if each.poll() is None]) and time.monotonic() < ends:
        time.sleep(_LOOK_SECONDS)
    return living


def _find_descendants(pid: int | None) -> list[psutil.Process]:
    try:
        return [] if pid is None else psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:  # another process has waited for it
        return []


def end_processes(pids: Sequence[int], patience_seconds: float) -> None:
    """End processes that are not our children, and their descendants: SIGTERM, after the patience SIGKILL."""
    asked: list[psutil.Process] = []
    family: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            family += process.children(recursive=True)
            process.terminate()
            asked.append(process)
    _wait_until_over(asked, patience_seconds)
    _kill_and_wait([*asked, *family])


def _kill_and_wait(processes: Sequence[psutil.Process]) -> None:
    left = [process for process in processes if is_alive(process)]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_until_over(left, PATIENCE_SECONDS)


def _wait_until_over(processes: Sequence[psutil.Process], seconds: float) -> None:
    # psutil.wait_procs would take the exit codes of our own children, and wait for zombies that are never reaped
    ends = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < ends:
        time.sleep(_LOOK_SECONDS)


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs.

    A process that has ended stays listed, as a zombie, until its parent asks for its exit code. The parent of an orphan
    is process 1, which in a container without an init never asks.
    """
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def start_process(
    command: Sequence[str], env: Mapping[str, str], log: IO[bytes], folder: Path | None, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a command as a session of its own that ends with this process; it inherits only the files `pass_fds`."""
    return subprocess.Popen(
        command,
        env=dict(env),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent(),
        pass_fds=pass_fds,
    )


def start_time(pid: int) -> float | None:
    """Return the start of a process by the system's clock, seconds since 1970; None if it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def die_with_parent() -> Callable[[], None] | None:
    """Return a function that a child calls first, before any exec, so that the kernel ends it when its parent dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return bind
