"""Writes shards; the same samples always become the same bytes.

A shard is a POSIX tar in WebDataset's layout (`KEY.jpg`, `KEY.json`, `KEY.txt`, one after the other). Times, owners and
modes are fixed, so its hash depends on its samples alone. A sample's split follows from the hash of its content, so
near-duplicates are never in two splits, and a larger set keeps the splits of a smaller one.
"""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from lightning_moevlm.data.format.manifest import SPLITS, ShardEntry, Split, file_sha256

TRAIN_SHARE = 0.8
VAL_SHARE = 0.1


class Sample(NamedTuple):
    """A sample to write."""

    key: str  # unique in the set, without dots or slashes
    identity: str  # of its content; samples of one identity share a split
    image: bytes  # encoded
    image_format: str  # file extension of the image
    caption: str  # English
    annotation: str  # JSON


def choose_split(identity: str) -> Split:
    """Return the split of an identity (80 % train, 10 % val, 10 % test)."""
    position = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) / 2**64
    if position < TRAIN_SHARE:
        return "train"
    return "val" if position < TRAIN_SHARE + VAL_SHARE else "test"


def open_shard(path: Path) -> tarfile.TarFile:
    """Open a new, empty shard for writing."""
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Append a sample, given by file extension, with constant times and owners in the headers."""
    for extension in sorted(members):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(members[extension])
        info.mode = 0o444
        tar.addfile(info, io.BytesIO(members[extension]))


class ShardWriter:
    """Writes samples into `root/{split}-{number}.tar`; a context manager.

    After a clean exit `entries` lists the shards of every split. After an exception no partial file is left.
    """

    def __init__(self, root: Path, samples_per_shard: int) -> None:
        self._root = root
        self._samples_per_shard = samples_per_shard
        self._tars: dict[Split, tarfile.TarFile] = {}
        self._num_samples = Counter[Split]()  # in the open tars
        self.entries: dict[Split, tuple[ShardEntry, ...]] = dict.fromkeys(SPLITS, ())

    def write(self, sample: Sample) -> Split:
        """Append a sample to the split of its identity, and return the split."""
        split = choose_split(sample.identity)
        if split not in self._tars:
            self._tars[split] = open_shard(self._partial(split))
        texts = {"json": sample.annotation.encode(), "txt": sample.caption.encode()}
        add_sample(self._tars[split], sample.key, {sample.image_format: sample.image, **texts})
        self._num_samples[split] += 1
        if self._num_samples[split] == self._samples_per_shard:
            self._finish(split)
        return split

    def _partial(self, split: Split) -> Path:
        return self._root / f".{split}.unfinished"

    def _finish(self, split: Split) -> None:
        self._tars.pop(split).close()
        path = self._root / f"{split}-{len(self.entries[split]):06d}.tar"
        self._partial(split).replace(path)
        entry = ShardEntry(path.name, self._num_samples.pop(split), path.stat().st_size, file_sha256(path))
        self.entries[split] += (entry,)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in list(self._tars):
            if kind is None:
                self._finish(split)
            else:
                self._tars.pop(split).close()
                self._partial(split).unlink()
