"""One shard, read with care: every sample that the manifest promises comes out, as itself or as a loss.

A shard is verified before it is opened (size, then sha256: about a millisecond per megabyte, which warms the
page cache for the parsing; not again by the same process, unless the file was touched), and the end of its tar
is compared with what was promised, so a set whose manifest was made of broken files is found out as well.
Samples are named and grouped as WebDataset does it (`sample_groups`), so a whole shard gives exactly the samples that
WebDataset gives. Only members with wanted extensions are read; nothing is unpickled.
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
    """What shards are taken from: a set's storage, or something before it that opens them ahead."""

    def place(self, file: str) -> str:
        """Return where a file of the set lies, without credentials, for messages."""
        ...

    def open(self, entry: ShardEntry) -> BinaryIO:
        """Open the verified shard for reading.

        Raises:
            ShardFault: if nothing of it can be used.

        """
        ...


class RawSample(NamedTuple):
    """An undecoded sample. shard: file it came from. members: bytes by file extension, every one that was wanted."""

    key: str
    shard: str
    members: Mapping[str, bytes]


def require_all(samples: Iterable[RawSample | Lost]) -> Iterator[RawSample]:
    """Pass samples on, for those who tolerate no loss.

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
    """Yield a shard's samples in order, each with its wanted members, and what is lost.

    wanted: members of the set. layout: where they lie in the tar.

    The samples and the `num_samples` of the losses add up to `entry.num_samples`, the same at every reading. Bad
    data raise nothing:

    - a shard that is missing, unreachable, truncated or altered is lost as a whole;
    - where a tar breaks (possible only if the manifest was made of the broken file), all that follows is lost;
    - of two samples with one key the second is lost, and so is a sample that lacks a wanted member;
    - samples beyond the manifest's number are left out, and a loss of 0 samples says so at the end.
    """
    place = opener.place(entry.file)
    try:
        with opener.open(entry) as stream:
            extensions = frozenset(extension for member in wanted for extension in layout.extensions_of(member))
            members = tar_members(stream, lambda name: key_and_extension(name)[1] in extensions)
            yield from _account(_name_members(sample_groups(members), wanted, layout, entry), entry, wanted, place)
    except ShardFault as fault:
        yield Lost(entry.num_samples, fault.cause, str(fault))


class _Found(NamedTuple):
    """A group with the wanted members that it has, by their names in the set. cut: more may have belonged to it."""

    key: str
    members: dict[str, bytes]
    cut: bool


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
    """Give every group one of the promised places; the places that are left over go to what ended the shard."""
    num_found, num_useless, seen = 0, 0, set[str]()
    broken: TarBreak | None = None
    try:
        for key, members, cut in groups:
            lacking = sorted(wanted - members.keys()) if len(members) < len(wanted) else []
            if wanted and not members:
                num_useless += 1  # a sample without anything of use, or no sample at all: the count will tell
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
        broken = TarBreak("shard_unreachable", f"cannot be read on ({error})")
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
