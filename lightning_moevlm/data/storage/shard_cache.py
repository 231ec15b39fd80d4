"""Keeps shards of remote sets on the local disk: whole files only; the least recently used are removed first.

Processes share the folder. One takes a lock for a shard's name and downloads it while the others wait. A download
reserves its bytes at once (a sparse file of the full size) and is renamed when it is complete and verified. Partial
files of killed processes are removed, not continued. File names are hashes of the full address (without credentials)
and of the expected content, so sets never mix and a changed set is fetched anew.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import ShardEntry, check_sha256, check_size, file_sha256
from lightning_moevlm.data.storage.stop_request import StopRequest

GIB = 2**30
_DONE = ".tar"
_PARTIAL = ".partial"
_POLL_S = 0.5


def default_cache_dir() -> Path:
    """Return the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning-moevlm" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """A folder of downloaded shards."""

    folder: Path
    max_bytes: int | None  # of all files together; None: no limit

    def path(
        self, address: str, entry: ShardEntry, download: Callable[[BinaryIO], None], stop: StopRequest | None = None
    ) -> Path:
        """Return the verified shard, downloaded if necessary. Another process may remove it before it is opened.

        Raises:
            ShardFault: if `download` raises it, or the file is not the one of the manifest.
            UserError: if the folder cannot be written.
            StoppedError: if asked to stop.
        """
        name = hashlib.sha256(f"{address}\n{entry.sha256}".encode()).hexdigest()
        path = self.folder / (name + _DONE)
        try:
            if self._is_good(path, entry):
                return path
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._hold_lock(name, stop or StopRequest()):
                if not self._is_good(path, entry):  # another process may just have downloaded it
                    self._download(path, entry, address, download)
        except OSError as error:
            raise UserError(
                f"the cache of shards {self.folder} cannot be used ({error}); set data.cache_dir to a folder with space"
            ) from None
        return path

    @contextmanager
    def _hold_lock(self, name: str, stop: StopRequest) -> Iterator[None]:
        """Hold the lock of a name; waiting for it can be stopped."""
        lock = self._lock(name)
        while True:
            try:
                lock.acquire(timeout=_POLL_S)
                break
            except Timeout:
                stop.check()
        try:
            yield
        finally:
            lock.release()

    def _is_good(self, path: Path, entry: ShardEntry) -> bool:
        try:
            if path.stat().st_size != entry.num_bytes or file_sha256(path) != entry.sha256:
                return False
            os.utime(path)  # used just now
        except FileNotFoundError:
            return False
        return True

    def _download(self, path: Path, entry: ShardEntry, address: str, download: Callable[[BinaryIO], None]) -> None:
        partial = path.with_suffix(_PARTIAL)
        try:
            self._reserve(partial, entry.num_bytes)
            with partial.open("r+b") as out:
                download(out)
            check_size(partial.stat().st_size, entry, address)
            check_sha256(file_sha256(partial), entry, address)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, num_bytes: int) -> None:
        """Make room for a file, and create it sparse with its full size, so that other processes count it."""
        with FileLock(self.folder / "room.lock"):
            partial.unlink(missing_ok=True)
            if self.max_bytes is not None:
                self._make_room(self.max_bytes - num_bytes)
            with partial.open("wb") as file:
                file.truncate(num_bytes)

    def _make_room(self, target_bytes: int) -> None:
        """Remove partial files of killed processes, then the least recently used shards, down to a size.

        Current downloads stay, so a cache that is smaller than its readers' simultaneous downloads exceeds its limit.
        """
        for partial in self.folder.glob("*" + _PARTIAL):
            self._remove_if_abandoned(partial)
        found = []
        for path in self.folder.iterdir():
            if path.suffix in (_DONE, _PARTIAL):
                try:
                    about = path.stat()
                except FileNotFoundError:
                    continue
                found.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= target_bytes:
                return
            if path.suffix == _DONE:
                path.unlink(missing_ok=True)
                total -= size

    def _remove_if_abandoned(self, partial: Path) -> None:
        lock = self._lock(partial.stem)
        try:
            with lock.acquire(timeout=0):
                partial.unlink(missing_ok=True)
        except Timeout:
            return  # another process is filling it

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f"{name[:2]}.lock")  # 256 files that are never removed
