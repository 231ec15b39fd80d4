"""Reads one shard: every sample that the manifest promises is yielded, or a loss with its cause.

A shard is verified before it is opened: its size, then its sha256 (about a millisecond per megabyte, which also warms
the page cache for parsing). The same process verifies it again only if the file was touched. The number of samples is
compared with the manifest, so sets whose manifest was made of broken files are found out too. Samples are named and
grouped as in WebDataset (`sample_groups`). Only members with wanted extensions are read, and nothing is unpickled.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, NamedTuple, Protocol

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import Lost, ShardFault
from lightning_moevlm.data.format.layout import PLAIN_LAYOUT, Layout
from lightning_moevlm.data.format.manifest import ShardEntry
from lightning_moevlm.data.format.sample_groups import Group, key_and_extension, sample_groups
from lightning_moevlm.data.format.tar_members import TarBreak, tar_members


class ShardOpener(Protocol):
    """Opens shards: a set's storage, or a prefetcher in front of it."""

    def place(self, file: ShardEntry) -> str:
        """Return the path or address of a shard, without credentials, for messages."""
        ...

    def open(self, entry: ShardEntry) -> BinaryIO:
        """Open the verified shard for reading.

        Raises:
            ShardFault: if it cannot be used.
        """
        ...


class RawSample(NamedTuple):
    """An undecoded sample."""

    key: str
    shard: str  # file that it came from
    members: Mapping[str, bytes]  # all wanted ones, by file extension


def require_all(samples: Iterable[RawSample | Lost]) -> Iterator[RawSample]:
    """Yield the samples, without tolerance for losses.

    Raises:
        UserError: at the first loss, with its message.
    """
    for sample in samples:
        if isinstance(sample, Lost):
            raise UserError(sample.message)
        yield sample


def read_shard(
    opener: ShardOpener, entry: ShardEntry, wanted: frozenset[str], layout: Layout = PLAIN_LAYOUT
) -> Iterator[RawSample | Lost]:
    """Yield a shard's samples in order, each with its wanted members, and its losses.

    Samples and the `num_samples` of losses add up to `entry.num_samples`, the same at every reading. Bad data raise
    nothing:

    - a shard that is missing, unreachable, truncated or altered is lost as a whole;
    - if a tar breaks (possible only if the manifest was made of the broken file), all that follows is lost;
    - the second of two samples with one key is lost, and so is a sample without a wanted member;
    - samples beyond the manifest's number are left out, and a loss of 0 samples reports them at the end.

    Args:
        opener: Opens the shard.
        entry: The shard.
        wanted: Members of the set to read.
        layout: Names of these members in the tar.
    """
    place = opener.place(entry)
    try:
        with opener.open(entry) as stream:
            extensions = frozenset(extension for member in wanted for extension in layout.extensions_of(member))
            members = tar_members(stream, lambda name: key_and_extension(name)[1] in extensions)
            yield from _account(_name_members(sample_groups(members), wanted, layout, entry), entry, wanted, place)
    except ShardFault as fault:
        yield Lost(entry.num_samples, fault.cause, str(fault))


class _Found(NamedTuple):
    """The wanted members of a group."""

    key: str
    members: dict[str, bytes]  # by their names in the set
    cut: bool  # the tar broke here, so members may be missing


def _name_members(
    groups: Iterator[Group], wanted: frozenset[str], layout: Layout, entry: ShardEntry
) -> Iterator[_Found]:
    prefix = f"{entry.file.removesuffix('.tar')}/" if layout.keys_repeat else ""
    for key, found, cut in groups:
        members: dict[str, bytes] = {}
        for name in wanted:
            member = layout.find(name, found)
            if member is not None and member.data is not None:
                members[name] = member.data
        yield _Found(prefix + key, members, cut)


def _account(
    groups: Iterator[_Found], entry: ShardEntry, wanted: frozenset[str], place: str
) -> Iterator[RawSample | Lost]:
    """Count every group as a promised sample; the remaining ones are lost to the cause that ended the shard."""
    num_found, num_useless, seen = 0, 0, set[str]()
    broken: TarBreak | None = None
    try:
        for key, members, cut in groups:
            lacking = sorted(wanted - members.keys()) if len(members) < len(wanted) else []
            if wanted and not members:
                num_useless += 1  # a sample without wanted members, or a stray file: the final count decides
                continue
            if lacking and cut:
                continue  # lost with all that follows
            if num_found == entry.num_samples:
                yield Lost(
                    0, "sample_count", f"shard {place} holds more samples, {key} for one, than {_promise(entry)}"
                )
                return
            num_found += 1
            if key in seen:
                yield Lost(1, "duplicate_key", f"{key} in shard {entry.file} occurs twice; rebuild the set")
            elif lacking:
                yield Lost(
                    1, "member_missing", f"{key} in shard {entry.file} has no .{lacking[0]} member; rebuild the set"
                )
            else:
                seen.add(key)
                yield RawSample(key, entry.file, members)
    except TarBreak as error:
        broken = error
    except OSError as error:
        broken = TarBreak("shard_unreachable", f"cannot be read further ({error})")
    left = entry.num_samples - num_found
    if not left:
        return
    if broken is not None:
        lost = f"so that {left} of {entry.num_samples} samples are lost"
        yield Lost(
            left, broken.cause, f"shard {place} {broken}, {lost}; restore it or rebuild the set with --force true"
        )
        return
    useless = min(left, num_useless)
    if useless:
        lacks = ", ".join(f".{extension}" for extension in sorted(wanted))
        yield Lost(
            useless, "member_missing", f"{useless} samples in shard {place} have no {lacks} member; rebuild the set"
        )
    if left > useless:
        yield Lost(left - useless, "sample_count", f"shard {place} holds {num_found} samples, {_promise(entry)}")


def _promise(entry: ShardEntry) -> str:
    return f"its manifest says {entry.num_samples}; rebuild the set with --force true"
