"""Shards whose members a test has changed, in a set that is in order otherwise."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lightning_moevlm.data.format.manifest import Split, file_sha256, read_manifest


def rewrite_shard(root: Path, split: Split, number: int, change: Callable[[str, bytes], bytes]) -> None:
    """Put every member of a shard through `change` (name, data) and let the manifest name the result."""
    manifest = read_manifest(root)
    entries = list(manifest.splits[split])
    path = root / entries[number].file
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            changed = change(name, data)
            info = tarfile.TarInfo(name)
            info.size = len(changed)
            tar.addfile(info, io.BytesIO(changed))
    entries[number] = replace(entries[number], num_bytes=path.stat().st_size, sha256=file_sha256(path))
    replace(manifest, splits={**manifest.splits, split: tuple(entries)}).write(root)


def spoil_first(root: Path, split: Split, num_samples: int) -> None:
    """Make the images of a split's first samples undecodable; they lie in its first shard."""
    spoilt: set[str] = set()

    def spoil(name: str, data: bytes) -> bytes:
        if name.endswith(".jpg") and (len(spoilt) < num_samples):
            spoilt.add(name)
            return b"no image"
        return data

    rewrite_shard(root, split, 0, spoil)
    assert len(spoilt) == num_samples
