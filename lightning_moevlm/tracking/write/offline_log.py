"""What a run has logged and its store has not taken: on disk, in the run's folder, until it is delivered.

`undelivered.jsonl` is a journal, one JSON object per line, only ever appended to; `undelivered/` holds files under
their artifact names. The first line names run and store. The journal goes last, when all is delivered: whoever is
killed before begins again, and since every write may be repeated (`run_writer`) nothing is there twice. A lock says
whose business it is: a run at work holds it, and the system frees it when its holder dies.

A kill loses no line that was appended; a power failure may lose those since the last `sync`.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock, Timeout

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.point import Point
from lightning_moevlm.tracking.write.run_writer import METRICS_PER_WRITE, RunWriter

JOURNAL = "undelivered.jsonl"
FILES = "undelivered"
_LOCK = ".undelivered.lock"
_UNFINISHED = ".undelivered.new."
_PATIENCE_SECONDS = 60.0  # for another process that is delivering


class Address(NamedTuple):
    """Where a journal is to go. store: the tracking URI, credentials masked."""

    store: str
    run_id: str


class PendingCount(NamedTuple):
    """How much waits in a log."""

    points: int
    files: int


class OfflineLog:
    """The undelivered part of one run. Not for several threads.

    run_dir: the run's folder; nothing is made there before something has to be kept. address: of the run; read from
    the journal where None.
    """

    def __init__(self, run_dir: Path, address: Address | None = None) -> None:
        self.run_dir = run_dir
        self.journal = run_dir / JOURNAL
        self._files = run_dir / FILES
        self._lock = FileLock(run_dir / _LOCK)
        self._address = address
        self._stream: IO[bytes] | None = None
        self._delivered = 0  # bytes of the journal that this process has delivered
        self._ending: tuple[str, int] | None = None  # read from them

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self.journal.exists()

    @property
    def address(self) -> Address:
        """Where it is to go.

        Raises:
            UserError: the journal was edited by hand or is none of ours.
        """
        if self._address is None:
            try:
                first, _ = next(_entries(self.journal))
                self._address = Address(first["store"], first["run_id"])
            except (StopIteration, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.journal}: its first line names no store and run; restore it, or remove the file to give "
                    "up what it holds"
                ) from error
        return self._address

    def hold(self, patience_seconds: float = 0.0) -> bool:
        """Make this log the business of this process alone, and tell whether it is; held twice is held."""
        if self._lock.is_locked:
            return True
        self.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=patience_seconds)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        """Leave it to others."""
        self._lock.release()

    def keep_points(self, points: Sequence[Point]) -> None:
        """Append points; NaN and infinities, which JSON lacks, are the texts "nan", "inf" and "-inf"."""
        self._append([point._asdict() | {"value": _plain(point.value)} for point in points])

    def keep_tags(self, tags: Mapping[str, str]) -> None:
        """Append tags."""
        self._append([{"tags": dict(tags)}] if tags else [])

    def keep_params(self, params: Mapping[str, str]) -> None:
        """Append params."""
        self._append([{"params": dict(params)}] if params else [])

    def keep_ending(self, status: str, end_ms: int) -> None:
        """Append how the run ended."""
        self._append([{"status": status, "end_ms": end_ms}])

    def keep_file(self, path: Path, name: str) -> None:
        """Keep a copy of a file under its artifact name."""
        self._append([])
        kept = self._files / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_name(f"{_UNFINISHED}{kept.name}")
        shutil.copyfile(path, beside)
        beside.replace(kept)

    def sync(self) -> None:
        """Put the journal on the disk itself, so that it outlasts a power failure."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def deliver(self, writer: RunWriter, has_ended: bool) -> None:
        """Hand everything over and remove it, in the order in which it was logged, files next and the ending last.

        Args:
            writer: Of this run.
            has_ended: False in a run that goes on: an earlier ending says nothing any more.

        Raises:
            MlflowException, OSError: The store does not take it, or another process delivers it. What was not delivered
                stays.
        """
        if self.is_empty:
            return
        self._take_hold()
        for part in self._parts():
            if part.points:
                writer.points(part.points)
            if part.tags:
                writer.tags(part.tags)
            if part.params:
                writer.params(part.params)
            self._ending = part.ending or self._ending
            self._delivered = part.end
        for path in self._kept_files():
            writer.file(path, path.relative_to(self._files).as_posix())
            path.unlink()
        if self._ending is not None and has_ended:
            writer.ending(*self._ending)
        self._remove()

    def count(self) -> "PendingCount":
        """Return how much waits."""
        lines = [entry for entry, _ in _entries(self.journal)] if not self.is_empty else []
        return PendingCount(sum("key" in entry for entry in lines), len(self._kept_files()))

    def _parts(self) -> Iterator["_Part"]:
        """Yield what has not been delivered, a batch of points or one other entry at a time."""
        points: list[Point] = []
        end = self._delivered
        for entry, end in _entries(self.journal, self._delivered):
            if "key" in entry:
                points.append(Point(**entry | {"value": float(entry["value"])}))
            if "key" not in entry or len(points) == METRICS_PER_WRITE:
                ending = (entry["status"], entry["end_ms"]) if "status" in entry else None
                yield _Part(points, entry.get("tags", {}), entry.get("params", {}), ending, end)
                points = []
        if points:
            yield _Part(points, {}, {}, None, end)

    def _kept_files(self) -> list[Path]:
        """Return the whole ones; what a killed writer left half done is none."""
        found = sorted(path for path in self._files.rglob("*") if path.is_file())
        return [path for path in found if not path.name.startswith(_UNFINISHED)]

    def _append(self, entries: Iterable[Mapping[str, object]]) -> None:
        """Append lines in one write; the first time, take hold and begin the journal."""
        if self._stream is None:
            self._stream = self._open()
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        self._stream.write(text.encode())

    def _open(self) -> IO[bytes]:
        """Return the journal, unbuffered, behind its last whole line."""
        address = self.address
        self._take_hold()
        if self.is_empty:
            beside = self.journal.with_name(f"{_UNFINISHED}{JOURNAL}")
            beside.write_text(json.dumps({"store": address.store, "run_id": address.run_id}) + "\n", encoding="utf-8")
            beside.replace(self.journal)
        stream = self.journal.open("rb+", buffering=0)
        stream.truncate(self.journal.read_bytes().rfind(b"\n") + 1)
        stream.seek(0, os.SEEK_END)
        return stream

    def _remove(self) -> None:
        """Remove what was delivered, the journal last."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        shutil.rmtree(self._files, ignore_errors=True)
        self.journal.unlink()
        self._delivered, self._ending = 0, None
        self.release()

    def _take_hold(self) -> None:
        if not self.hold(_PATIENCE_SECONDS):
            raise BlockingIOError(f"{self.journal} is held by another process")


class _Part(NamedTuple):
    """What is written at once. end: where it ends in the journal, bytes."""

    points: Sequence[Point]
    tags: Mapping[str, str]
    params: Mapping[str, str]
    ending: tuple[str, int] | None
    end: int


def _entries(journal: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield every whole line with where it ends, from a byte on."""
    end = start
    with journal.open("rb") as stream:
        stream.seek(start)
        for line in stream:
            if not line.endswith(b"\n"):
                return  # its writer is at work, or was killed in the middle
            end += len(line)
            yield json.loads(line), end


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
