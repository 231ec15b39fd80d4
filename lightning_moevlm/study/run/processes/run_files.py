"""Finds a run's log and checkpoints in its folder."""

import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

LOG_FILE = "log.txt"

_LOG_LINES = 20


def open_log(log_file: Path, command: Sequence[str]) -> IO[bytes]:
    """Open a log to append to, and write the command line into it."""
    log = log_file.open("ab")
    log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
    log.flush()
    return log


def log_tail(log_file: Path) -> tuple[str, ...]:
    """Return the last lines of a log, without empty ones."""
    try:
        text = log_file.read_bytes()[-20_000:].decode(errors="replace")
    except FileNotFoundError:
        return ()
    return tuple([line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-_LOG_LINES:])


def last_checkpoint(*folders: Path) -> Path | None:
    """Return the newest whole checkpoint below the folders, or None.

    A checkpoint is a zip archive whose directory stands at its end. One that a kill cut short has none and is skipped.
    """
    found = [file for folder in folders if folder.is_dir() for file in folder.rglob("*.ckpt")]
    newest_first = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)
    return next((file for file in newest_first if zipfile.is_zipfile(file)), None)
