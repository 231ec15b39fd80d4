"""Writing shards: the same samples always become the same bytes.

A shard is a plain POSIX tar in WebDataset's layout (`KEY.jpg`, `KEY.json`, `KEY.txt`, one after the other).
Times, owners and modes are fixed, so that a shard's hash depends on its samples alone. Every sample falls
into its split by the hash of what it shows, so near-duplicates never straddle two splits and a larger set
keeps the smaller one's split.
"""

import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from lightning_moevlm.data.format.manifest import SPLITS, ShardEntry, Split, file_sha256

TRAIN_SHARE = 0.8
VAL_SHARE = 0.1


class Sample(NamedTuple):
    """One sample to be written.

    key: unique in the set, without dots or slashes. identity: what it shows; samples of one identity share
    a split. image: encoded bytes. image_format: their file extension. caption: English. annotation: a JSON
    text.
    """

    key: str
    identity: str
    image: bytes
    image_format: str
    caption: str
    annotation: str


def choose_split(identity: str) -> Split:
    """Return the split that everything of this identity belongs to (80 % train, 10 % val, 10 % test)."""
    position = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) / 2**64
    if position < TRAIN_SHARE:
        return "train"
    return "val" if position < TRAIN_SHARE + VAL_SHARE else "test"


def open_shard(path: Path) -> tarfile.TarFile:
    """Open a new, empty shard for writing."""
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Append one sample, its members by file extension, with nothing in the headers that could differ next time."""
    for extension in sorted(members):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(members[extension])
        info.mode = 0o444
        tar.addfile(info, io.BytesIO(members[extension]))


class _SplitWriter:
    """Fills the shards of one split, one after the other."""

    def __init__(self, root: Path, split: Split, samples_per_shard: int) -> None:
        self._root = root
        self._split = split
        self._samples_per_shard = samples_per_shard
        self._tar: tarfile.TarFile | None = None
        self._num_samples = 0
        self.entries: list[ShardEntry] = []

    @property
    def _unfinished(self) -> Path:
        return self._root / f".{self._split}.unfinished"

    def write(self, sample: Sample) -> None:
        if self._tar is None:
            self._tar = open_shard(self._unfinished)
        members = {
            sample.image_format: sample.image,
            "json": sample.annotation.encode(),
            "txt": sample.caption.encode(),
        }
        add_sample(self._tar, sample.key, members)
        self._num_samples += 1
        if self._num_samples == self._samples_per_shard:
            self.finish()

    def finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._root / f"{self._split}-{len(self.entries):06d}.tar"
        self._unfinished.replace(path)
        self.entries.append(ShardEntry(path.name, self._num_samples, path.stat().st_size, file_sha256(path)))
        self._tar, self._num_samples = None, 0

    def abandon(self) -> None:
        if self._tar is not None:
            self._tar.close()
        self._unfinished.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into `root/{split}-{number}.tar`; a context manager.

    After a clean exit `entries` lists the shards of every split; after an exception no unfinished file is
    left.
    """

    def __init__(self, root: Path, samples_per_shard: int) -> None:
        self._splits = {split: _SplitWriter(root, split, samples_per_shard) for split in SPLITS}

    def write(self, sample: Sample) -> Split:
        """Append one sample to the split that its identity falls into, and say which that is."""
        split = choose_split(sample.identity)
        self._splits[split].write(sample)
        return split

    @property
    def entries(self) -> dict[Split, tuple[ShardEntry, ...]]:
        """The finished shards of every split."""
        return {split: tuple(writer.entries) for split, writer in self._splits.items()}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._splits.values():
            if kind is None:
                writer.finish()
            else:
                writer.abandon()
