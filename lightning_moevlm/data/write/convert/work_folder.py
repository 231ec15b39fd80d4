"""Keeps the finished tasks of a conversion in a hidden folder, so that a killed conversion can resume.

The folder lies beside the target (`.NAME.converting-FINGERPRINT`). Its name depends on everything that determines the
set, so only the same conversion finds it again. `journal/` holds one small file per finished task, written after its
result; tasks without one are done again. The folder becomes the set when the manifest is written.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from filelock import FileLock, Timeout

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import ShardEntry, file_sha256
from lightning_moevlm.data.write.convert.process_pool import WorkerDiedError

T = TypeVar("T")
_JOURNAL, _LOCK = "journal", ".lock"


class WorkFolder:
    """The folder of a conversion, with the finished tasks of earlier attempts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remember(self, task: str, result: object) -> None:
        """Note the result of a finished task: a record, or several."""
        path = self.folder / _JOURNAL / f"{task}.json"
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_bytes(msgspec.json.encode(result))
        unfinished.replace(path)

    def recall(self, task: str, kind: type[T]) -> T | None:
        """Return a finished task's result; None if there is none or it cannot be read."""
        try:
            return msgspec.json.decode((self.folder / _JOURNAL / f"{task}.json").read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError):
            return None

    def finished_shard(self, task: str) -> ShardEntry | None:
        """Return a finished shard if its bytes are unchanged."""
        entry = self.recall(task, ShardEntry)
        if entry is None:
            return None
        path = self.folder / entry.file
        return entry if path.is_file() and file_sha256(path) == entry.sha256 else None

    def tidy(self, *files: str) -> None:
        """Remove everything that is not part of the set, and further files."""
        for file in files:
            (self.folder / file).unlink(missing_ok=True)
        shutil.rmtree(self.folder / _JOURNAL)
        (self.folder / _LOCK).unlink(missing_ok=True)


@contextmanager
def open_work_folder(out: Path, fingerprint: str, keeps: bool = False) -> Iterator[WorkFolder]:
    """Open the folder for a set at `out`. A `UserError` removes it, unless `keeps` is set; a kill does not.

    Raises:
        UserError: if another process converts the same set.
    """
    folder = out.parent / f".{out.name}.converting-{fingerprint[:16]}"
    (folder / _JOURNAL).mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{out} is being converted by another process; wait for it, or end it") from None
    try:
        for partial in (*folder.glob(".*.unfinished"), *(folder / _JOURNAL).glob(".*.unfinished")):
            partial.unlink()
        yield WorkFolder(folder)
    except WorkerDiedError:
        raise  # the data may be right: finished tasks stay
    except UserError:
        if not keeps:
            shutil.rmtree(folder, ignore_errors=True)  # corrected data must be inspected again
        raise
    finally:
        lock.release()
