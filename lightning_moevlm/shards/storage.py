"""Where a set lies: the one place that turns a shard's entry in the manifest into a file to read."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_moevlm.shards.manifest import ShardEntry, check_shard


@dataclass(frozen=True)
class ShardStorage:
    """A set's place. root: its folder."""

    root: str

    def __str__(self) -> str:
        return self.root

    def place(self, file: str) -> str:
        """Return where a file of the set lies, for messages."""
        return str(Path(self.root) / file)

    def local_path(self, entry: ShardEntry) -> Path:
        """Return the shard as a local file that has the size and the sha256 of the manifest.

        Raises:
            ShardFault: if the shard is missing, truncated or altered.

        """
        return check_shard(Path(self.root), entry)

    def open(self, entry: ShardEntry) -> BinaryIO:
        """Open the verified shard for reading.

        Raises:
            ShardFault: if the shard is missing, truncated or altered.

        """
        return self.local_path(entry).open("rb")
