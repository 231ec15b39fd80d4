"""Keeps on disk what a run has logged until MLflow has it: every point, param, tag and file is here first.

The folder `offline-TIME-PID` in the run's own holds `journal.jsonl`, one JSON object a line, the first of which names
the run and its store, and `files/NUMBER/NAME`, files under their artifact names. Every process that logs has a folder
of its own and locks it; the system frees the lock when the process dies. The folder goes when all of it is uploaded.

An upload that was interrupted is repeated from its first line, which is harmless: writes may be repeated
(`run_writer`). A kill loses no line that was appended; a power failure may lose the lines since the last `sync`.
"""

import errno
import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.write.run_writer import METRICS_PER_WRITE, RunWriter

JOURNAL = "journal.jsonl"
_COMPACT_BYTES = 1 << 22  # of lines that MLflow has


class Address(NamedTuple):
    """The run that a log belongs to."""

    store: str
    """The tracking URI, credentials masked."""
    run_id: str


class PendingCount(NamedTuple):
    """How much of a log MLflow does not have."""

    points: int
    files: int


class OfflineLog:
    """The log of one process for one run. Any thread may append; one at a time uploads.

    `begin` makes a new one. Call `hold` before an upload of another process's.
    """

    _held: ClassVar[set[Path]] = set()
    """Folders whose locks this process has. The system's table has processes only, not the objects in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.run_dir = self.folder.parent
        self.journal = self.folder / JOURNAL
        self._files = self.folder / "files"
        self._numbers = count()
        self._num_added = self._num_uploaded = 0  # folders of files
        self._lock: IO[bytes] | None = None
        self._stream: IO[bytes] | None = None  # to append to
        self._appending = threading.Lock()
        self._start = self._uploaded = self._end = 0  # bytes of the journal: its first line, what MLflow has, all
        self._in_memory: list[bytes] = []  # lines that the disk does not take
        self._ending: tuple[str, int] | None = None

    @classmethod
    def begin(cls, run_dir: Path, address: Address) -> "OfflineLog":
        """Return a new log, held by this process.

        Raises:
            UserError: the run's folder cannot be written.
        """
        log = cls(run_dir / f"offline-{time.time_ns() // 1_000_000}-{os.getpid()}")
        with explain_write_errors(
            run_dir, "free disk space or grant write permission, or name another store in tracking_uri"
        ):
            log._files.mkdir(parents=True)
            log.hold()
            log._stream = log.journal.open("ab+", buffering=0)
            if error := log.append(**address._asdict()):
                raise error
        log._start = log._uploaded = log._end
        return log

    @cached_property
    def address(self) -> Address:
        """The run, as the first line names it.

        Raises:
            UserError: the journal was edited by hand, or is not one.
        """
        try:
            first, _ = next(_read_lines(self.journal))
            return Address(first["store"], first["run_id"])
        except (StopIteration, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.journal}: its first line does not name a store and a run; restore it, or remove the file; "
                "its unsent metrics are then lost"
            ) from error

    @property
    def is_empty(self) -> bool:
        """Whether MLflow has all that this process has appended."""
        return self._end == self._uploaded and not self._in_memory and self._num_added == self._num_uploaded

    @property
    def num_in_memory(self) -> int:
        """How many lines are in memory alone, since the disk does not take them."""
        return len(self._in_memory)

    def hold(self) -> bool:
        """Lock the log; return False while another process, as a rule its run, holds it.

        The lock is the process's own: its children do not keep it after a kill, as they would keep one of `flock`.
        """
        if self._lock is not None or self.folder in self._held:
            return self._lock is not None
        try:
            lock = (self.folder / "lock").open("ab")
        except FileNotFoundError:  # another process has just removed it
            return False
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # a file system that knows no locks is no reason to train without MLflow
            if error.errno in (errno.EAGAIN, errno.EACCES):
                lock.close()
                return False
        self._lock = lock
        self._held.add(self.folder)
        return True

    def release(self) -> None:
        """Leave the log, which stays, to other processes."""
        for stream in (self._stream, self._lock):
            if stream is not None:
                stream.close()
        if self._lock is not None:
            self._held.discard(self.folder)
        self._stream = self._lock = None

    def remove(self) -> None:
        """Remove the log, which MLflow has."""
        self.journal.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def append(self, **entry: Any) -> OSError | None:
        """Append a line to the journal; where the disk does not take it, keep it in memory and return why.

        Args:
            entry: `metrics={KEY: VALUE}, step=STEP, time_ms=TIME`, `tags={KEY: TEXT}`, `params={KEY: TEXT}`,
                `rewind=STEP` or `status=TEXT, end_ms=TIME`.
        """
        line = _to_line(entry)
        with self._appending:
            self._in_memory.append(line)
            return self._write() if len(self._in_memory) == 1 else None

    @contextmanager
    def add_files(self) -> Iterator[Path]:
        """Keep every file that is written below the folder handed out, under its path from there.

        Raises:
            UserError: the disk does not take them.
        """
        number = f"{next(self._numbers):06}"
        unfinished = self.folder / number
        try:
            with explain_write_errors(self.folder, "free disk space or grant write permission, then resume the run"):
                unfinished.mkdir()
                yield unfinished
                unfinished.rename(self._files / number)
                self._num_added += 1
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def sync(self) -> OSError | None:
        """Have the lines outlast a power failure; return why the disk does not take them where it does not."""
        with self._appending:
            if error := self._write():
                return error
        assert self._stream is not None
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            return error
        return None

    def upload(self, writer: RunWriter, has_ended: bool) -> None:
        """Write what MLflow does not have: lines in their order, then files, and last how the run ended.

        Args:
            writer: of this run.
            has_ended: False while the run continues: an ending from before no longer counts.

        Raises:
            MlflowException, OSError: the store does not take it. What is left stays.
        """
        in_memory = self._in_memory[:]
        self._upload_lines(in_memory, writer)
        with self._appending:
            del self._in_memory[: len(in_memory)]
        for folder in sorted(self._files.iterdir()):
            for path in _list_files(folder):
                writer.write_file(path, path.relative_to(folder).as_posix())
                path.unlink()
            shutil.rmtree(folder)
            self._num_uploaded += 1
        if self._ending is not None and has_ended:
            writer.end(*self._ending)
        if self._stream is not None:
            self._drop_uploaded_lines(self._stream)

    def count(self) -> PendingCount:
        """Return how much MLflow does not have."""
        lines = [entry for entry, _ in _read_lines(self.journal, self._uploaded)] if self.journal.exists() else []
        return PendingCount(sum(len(entry.get("metrics", ())) for entry in lines), len(_list_files(self._files)))

    def _upload_lines(self, in_memory: Sequence[bytes], writer: RunWriter) -> None:
        """Write the journal's pending lines, then those in memory."""
        points: list[Point] = []
        end = self._uploaded
        lines = _read_lines(self.journal, self._uploaded)
        for entry, end in chain(lines, ((json.loads(line), self._end) for line in in_memory)):
            for key, value in entry.get("metrics", {}).items():
                points.append(Point(key, entry["step"], float(value), entry["time_ms"]))
            if "params" in entry:
                writer.write_params(entry["params"])
            if "tags" in entry:
                writer.write_tags(entry["tags"])
            if "status" in entry:
                self._ending = entry["status"], entry["end_ms"]
            if "rewind" in entry or len(points) >= METRICS_PER_WRITE:
                writer.write_points(points)
                points = []
                if "rewind" in entry:
                    writer.rewind(entry["rewind"])
                self._uploaded = end
        writer.write_points(points)
        self._uploaded = end

    def _write(self) -> OSError | None:
        """Move lines from memory to the disk, all of them or none."""
        assert self._stream is not None
        data = b"".join(self._in_memory)
        try:
            if self._stream.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._stream.truncate(self._end)
            return error
        self._end += len(data)
        self._in_memory.clear()
        return None

    def _drop_uploaded_lines(self, stream: IO[bytes]) -> None:
        with self._appending:
            if self._uploaded == self._end:
                stream.truncate(self._start)
            elif self._uploaded > _COMPACT_BYTES:
                first = os.pread(stream.fileno(), self._start, 0)
                beside = self.folder / f".{JOURNAL}"
                beside.write_bytes(first + os.pread(stream.fileno(), self._end - self._uploaded, self._uploaded))
                beside.replace(self.journal)
                stream.close()
                self._stream = self.journal.open("ab+", buffering=0)
            else:
                return
            self._end -= self._uploaded - self._start
            self._uploaded = self._start


def find_offline_logs(folder: Path) -> list[OfflineLog]:
    """Return the logs in a folder and in all below it, those of a run in the order in which they were begun."""
    return [OfflineLog(journal.parent) for journal in sorted(folder.rglob(JOURNAL))]


def _read_lines(journal: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield every whole line from a byte on, with the byte where it ends."""
    end = start
    with journal.open("rb") as stream:
        stream.seek(start)
        for line in stream:
            if not line.endswith(b"\n"):
                return  # its writer was killed in the middle
            end += len(line)
            yield json.loads(line), end


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _to_line(entry: Mapping[str, Any]) -> bytes:
    """Return JSON, where NaN and infinities, which it lacks, are the texts nan, inf and -inf."""
    try:
        text = json.dumps(entry, allow_nan=False)
    except ValueError:
        finite = {key: value if math.isfinite(value) else str(value) for key, value in entry["metrics"].items()}
        text = json.dumps({**entry, "metrics": finite}, allow_nan=False)
    return text.encode() + b"\n"
