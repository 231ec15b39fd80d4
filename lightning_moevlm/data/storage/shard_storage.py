"""Opens a set in a folder or on a server; the one place that turns manifest entries into files.

Folders are read in place. Shards of a remote set (http, https, s3, gs) are downloaded when they are opened and kept in
a bounded cache. Manifest and tokenizer are small and read again by each process. A shard is returned only with the size
and sha256 of the manifest. No address can reach a shell.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.data.format.faults import ShardFault
from lightning_moevlm.data.format.manifest import (
    MANIFEST_FILE,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    check_shard,
    check_shard_size,
    parse_manifest,
    read_manifest,
)
from lightning_moevlm.data.storage.remote_folder import RemoteFolder
from lightning_moevlm.data.storage.shard_cache import GIB, ShardCache, default_cache_dir
from lightning_moevlm.data.storage.stop_request import StopRequest
from lightning_moevlm.data.text.tokenizer import CaptionTokenizer, load_tokenizer, parse_tokenizer

PROTOCOLS = ("file", "http", "https", "s3", "gs")
CACHE_GIB = 50.0
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):(?=//)")
_OPENINGS = 5
_BUFFER_BYTES = 2**16  # a sample or two per system call


class _Version(NamedTuple):
    """Identifies a file's content: every write changes its times."""

    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "_Version":
        stat = path.stat()
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True)
class ShardStorage:
    """The folder or address of a set."""

    root: str = field(repr=False)
    cache_dir: str | None = None  # folder for shards of a remote set; None: the user's cache folder
    cache_gib: float | None = CACHE_GIB  # size limit of that folder, GiB; None: no limit
    allowed_protocols: tuple[str, ...] = PROTOCOLS  # of `root`
    attempts: int = 8  # tries in a row without progress until a server counts as unreachable
    backoff_s: float = 0.5  # longest first pause between tries, seconds; it doubles
    _verified: dict[ShardEntry, _Version] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        protocol = self._protocol
        if protocol == "pipe":
            raise UserError(
                f"data root is {self.root!r}: shell commands are not allowed; give a folder, or an address that begins "
                f"with one of {', '.join(name for name in self.allowed_protocols if name != 'file')}"
            )
        if protocol not in self.allowed_protocols or (protocol != "file" and "::" in self.root):
            raise UserError(
                f"data root {self} has the protocol {protocol!r}, but only {', '.join(self.allowed_protocols)} are "
                "allowed, without chains (::); copy the set, or name the protocol in data.allowed_protocols"
            )
        if self.cache_gib is not None and self.cache_gib <= 0:
            raise UserError(f"data.cache_gib is {self.cache_gib}: choose a value above 0, or null for no limit")
        check_number("attempts", self.attempts, least=1)

    def __str__(self) -> str:
        return str(self.folder) if self._protocol in ("file", "pipe") else self._remote.place()

    @property
    def folder(self) -> Path | None:
        """The folder of a local set; None if it is remote."""
        if self._protocol not in ("file", "pipe"):
            return None
        return Path(self.root.removeprefix("file://"))

    def place(self, file: str | ShardEntry) -> str:
        """Return the path or address of a file or shard, without credentials, for messages."""
        if isinstance(file, ShardEntry):
            return self.home_of(file).place(file.file)
        return str(self.folder / file) if self.folder is not None else self._remote.place(file)

    def home_of(self, entry: ShardEntry) -> "ShardStorage":
        """Return the storage that holds a shard: this one, unless the manifest names another place.

        Raises:
            UserError: if the protocol of that place is not allowed.
        """
        if not entry.at or entry.at == self.root:
            return self
        home = replace(self, root=entry.at)
        object.__setattr__(home, "_verified", self._verified)
        return home

    def files(self, pattern: str) -> list[str]:
        """Return the names of the folder's files that match a pattern, sorted.

        Raises:
            UserError: if the folder is missing, out of reach, or cannot be listed.
        """
        if self.folder is None:
            return self._remote.files(pattern)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {self.folder}; give the folder of the tars, or their names")
        return sorted(path.name for path in self.folder.glob(pattern) if not path.name.startswith("."))

    def stream(self, file: str) -> BinaryIO:
        """Open a file of any content for reading from its beginning on; a broken transfer is resumed.

        Raises:
            ShardFault: if it is missing or out of reach, here or at a later read.
        """
        if self.folder is None:
            return self._remote.stream(file)
        try:
            return (self.folder / file).open("rb", buffering=_BUFFER_BYTES)
        except FileNotFoundError:
            raise ShardFault("shard_missing", f"{self.folder / file} is missing; restore it, or leave it out") from None
        except OSError as error:
            raise _read_fault(self.place(file), error) from None

    def read_manifest(self) -> Manifest:
        """Read the set's manifest.

        Raises:
            UserError: if it is missing, out of reach or broken.
        """
        if self.folder is not None:
            return read_manifest(self.folder)
        return parse_manifest(self._remote.read(MANIFEST_FILE), self.place(MANIFEST_FILE))

    def read_tokenizer(self, entry: TokenizerEntry) -> CaptionTokenizer:
        """Read the set's tokenizer.

        Raises:
            UserError: if it is missing, out of reach, or not the one of the manifest.
        """
        if self.folder is not None:
            return load_tokenizer(self.folder, entry)
        return parse_tokenizer(self._remote.read(entry.file), entry, self.place(entry.file))

    def local_path(self, entry: ShardEntry, stop: StopRequest | None = None) -> Path:
        """Return the shard as a local file with the size and sha256 of the manifest.

        A local shard is hashed once per process, and again if the file was touched.

        Raises:
            ShardFault: if the shard is missing, unreachable, truncated or altered.
            UserError: if the cache cannot be written.
            StoppedError: if asked to stop.
        """
        home = self.home_of(entry)
        if home.folder is not None:
            try:
                path = check_shard_size(home.folder, entry)
                version = _Version.of(path)  # before the bytes are read: a write meanwhile changes it
                if self._verified.get(entry) != version:
                    check_shard(home.folder, entry)
                    self._verified[entry] = version
                return path
            except OSError as error:
                raise _read_fault(self.place(entry), error) from None
        remote, stop = home._remote, stop or StopRequest()
        return self._cache.path(self.place(entry), entry, lambda out: remote.download(entry, out, stop), stop)

    def fits_beside(self, entry: ShardEntry, other: ShardEntry) -> bool:
        """Return whether the set has a cache, with room for both shards."""
        if self.home_of(entry).folder is not None:
            return False
        return self._cache.max_bytes is None or entry.num_bytes + other.num_bytes <= self._cache.max_bytes

    def open(self, entry: ShardEntry, stop: StopRequest | None = None) -> BinaryIO:
        """Open the verified shard for reading.

        Raises:
            ShardFault: if the shard is missing, unreachable, truncated or altered.
            UserError: if the cache cannot be written.
            StoppedError: if asked to stop.
        """
        for _ in range(_OPENINGS):
            path = self.local_path(entry, stop)
            try:
                return path.open("rb", buffering=_BUFFER_BYTES)
            except FileNotFoundError:
                continue  # another process needed its room in the cache
            except OSError as error:
                raise _read_fault(str(path), error) from None
        limit = "null" if self.cache_gib is None else f"{self.cache_gib:g}"
        raise UserError(
            f"shards are removed from the cache {self._cache.folder} before they are read: it is too small for all "
            f"processes that use it. Raise data.cache_gib in each of them (here {limit})"
        )

    @property
    def _protocol(self) -> str:
        if self.root.startswith(("pipe:", "|")):
            return "pipe"
        match = _SCHEME.match(self.root)
        return match.group(1).lower() if match else "file"

    @property
    def _remote(self) -> RemoteFolder:
        return RemoteFolder(self.root, self.attempts, self.backoff_s)

    @property
    def _cache(self) -> ShardCache:
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()
        return ShardCache(folder, None if self.cache_gib is None else int(self.cache_gib * GIB))


def _read_fault(place: str, error: OSError) -> ShardFault:
    return ShardFault("shard_unreachable", f"shard {place} cannot be read ({error}); check the disk and permissions")
