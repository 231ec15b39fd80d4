"""The hidden folder that a set is converted in: what is done is kept, so a killed conversion goes on.

It lies beside the target (`.NAME.converting-FINGERPRINT`) and is named after everything that decides about the
set, so that only the very same conversion finds it again. `journal/` holds one small file per finished task, written
after what it tells of; whatever has none is done again. The folder becomes the set when the manifest is written.
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
    """A folder to work in, and what earlier attempts have finished."""

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
        """Return a shard that is written and still has the bytes that it had then."""
        entry = self.recall(task, ShardEntry)
        if entry is None:
            return None
        path = self.folder / entry.file
        return entry if path.is_file() and file_sha256(path) == entry.sha256 else None

    def tidy(self, *files: str) -> None:
        """Remove everything that is not part of the set, further files included."""
        for file in files:
            (self.folder / file).unlink(missing_ok=True)
        shutil.rmtree(self.folder / _JOURNAL)
        (self.folder / _LOCK).unlink(missing_ok=True)


@contextmanager
def open_work_folder(out: Path, fingerprint: str) -> Iterator[WorkFolder]:
    """Open the folder for a set at `out`; a mistake of the user removes it, being killed does not.

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
        for left in (*folder.glob(".*.unfinished"), *(folder / _JOURNAL).glob(".*.unfinished")):
            left.unlink()
        yield WorkFolder(folder)
    except WorkerDiedError:
        raise  # nothing to mend in the data: what is finished stays
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)  # what is to be mended may be what was looked at
        raise
    finally:
        lock.release()
