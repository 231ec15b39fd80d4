"""One shard, opened with care: nothing is read from a file that is not what its manifest says.

A truncated tar passes WebDataset without a word (it simply ends), so every shard is verified when it is
opened: its size by one `stat`, then its sha256, which costs about a millisecond per megabyte and warms the
page cache for the parsing that follows. The parsing itself is WebDataset's. Only the wanted extensions are
ever looked at.
"""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import group_by_keys, tar_file_expander

from lightning_moevlm.errors import UserError
from lightning_moevlm.shards.manifest import ShardEntry, check_shard


class RawSample(NamedTuple):
    """An undecoded sample. shard: file it came from. members: bytes by file extension."""

    key: str
    shard: str
    members: Mapping[str, bytes]


def refuse_remote(root: str) -> Path:
    """Return the folder of a set.

    Raises:
        UserError: if `root` is a URL or a pipe; data never reaches a shell.

    """
    if "://" in root or root.startswith(("pipe:", "|")):
        raise UserError(f"data root is {root!r}, but sets are read from local folders only; copy it and give its path")
    return Path(root)


def read_shard(root: Path, shard: ShardEntry, wanted: frozenset[str]) -> Iterator[RawSample]:
    """Yield a shard's samples in order, each with those of its members whose extension is wanted.

    Raises:
        UserError: if the shard is missing, truncated, altered, no tar, or holds another number of samples.

    """
    path = check_shard(root, shard)
    num_samples = 0
    with path.open("rb") as stream:
        files = tar_file_expander(
            [{"url": shard.file, "stream": stream}],
            select_files=lambda name: name.rpartition(".")[2].lower() in wanted,
        )
        samples = iter(group_by_keys(files))
        while True:
            try:
                grouped = next(samples, None)
            except (tarfile.TarError, ValueError) as error:
                raise UserError(f"shard {path} is no tar of samples ({error.args[0]}); rebuild the set") from error
            if grouped is None:
                break
            num_samples += 1
            members = {name: value for name, value in grouped.items() if name in wanted}
            yield RawSample(grouped["__key__"], shard.file, members)
    if num_samples != shard.num_samples:
        raise UserError(
            f"shard {path} holds {num_samples} samples, its manifest says {shard.num_samples}; "
            "rebuild the set with --force true"
        )
