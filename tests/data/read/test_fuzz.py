"""Mutated shards by the hundred: no crash, no hang, no sample that is neither read nor counted as lost."""

import hashlib
import io
import random
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lightning_moevlm.data.format.faults import CAUSES, Lost
from lightning_moevlm.data.format.manifest import ShardEntry
from lightning_moevlm.data.format.shard_reader import RawSample, read_shard
from lightning_moevlm.data.storage.shard_storage import ShardStorage

WANTED = frozenset({"jpg", "txt"})
BLOCK = 512
SLOWEST_S = 5.0
"""A shard of 40 kB is read in a millisecond; what takes thousands of them hangs."""


class Good(NamedTuple):
    """A whole shard. spans: where header, data and what follows begin, for each member, by key and extension."""

    data: bytes
    spans: dict[tuple[str, str], tuple[int, int, int]]
    content: dict[tuple[str, str], bytes]
    num_samples: int

    def __repr__(self) -> str:
        return f"{self.num_samples} samples, {len(self.data)} bytes"


def _good(format: int, num_samples: int) -> Good:
    chance = random.Random(num_samples)
    out, spans, content = io.BytesIO(), {}, {}
    prefix = "a-rather-long-folder-name/" * 5 if format != tarfile.USTAR_FORMAT else ""
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for number in range(num_samples):
            for extension in ("jpg", "json", "txt"):
                # every member is unlike every other, so that one cannot pass for another
                data = f"{number}.{extension} ".encode() + chance.randbytes(chance.randrange(1500))
                info = tarfile.TarInfo(f"{prefix}k{number}.{extension}")
                info.size = len(data)
                begin = tar.offset
                tar.addfile(info, io.BytesIO(data))
                spans[f"{prefix}k{number}", extension] = (
                    begin,
                    tar.offset - -(-len(data) // BLOCK) * BLOCK,
                    tar.offset,
                )
                content[f"{prefix}k{number}", extension] = data
    return Good(out.getvalue(), spans, content, num_samples)


SHARDS = [_good(f, n) for f in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for n in (1, 12)]


class Mutation(NamedTuple):
    """What becomes of a shard. first: all before it is as it was. changed: places, if bytes only changed in place."""

    data: bytes
    first: int
    changed: tuple[tuple[int, int], ...] | None

    def __repr__(self) -> str:
        return f"from byte {self.first} of {len(self.data)}, in place: {self.changed}"


@st.composite
def _mutations(draw: st.DrawFn, good: Good) -> Mutation:
    data, size = good.data, len(good.data)
    # half of the mutations strike headers, where parsers are hurt
    header = st.sampled_from(sorted(begin for begin, _, _ in good.spans.values())).flatmap(
        lambda begin: st.integers(begin, begin + BLOCK - 1)
    )
    place = st.one_of(header, st.integers(0, size - 1))
    kind = draw(
        st.sampled_from(("flip", "flips", "cut", "insert", "delete", "zero", "swap", "header", "junk", "forged"))
    )
    event(kind)
    at = draw(place)
    block = at // BLOCK * BLOCK
    if kind == "flip":
        return _changed(data, at, bytes([data[at] ^ 1 << draw(st.integers(0, 7))]))
    if kind == "flips":
        places = draw(st.lists(place, min_size=2, max_size=20, unique=True))
        array = bytearray(data)
        for one in places:
            array[one] ^= draw(st.integers(1, 255))
        return Mutation(bytes(array), min(places), tuple((one, one + 1) for one in places))
    if kind == "cut":
        return Mutation(data[:at], at, None)
    if kind == "insert":
        return Mutation(data[:at] + draw(st.binary(min_size=1, max_size=1500)) + data[at:], at, None)
    if kind == "delete":
        length = draw(st.sampled_from((1, 7, BLOCK, 3 * BLOCK)))
        return Mutation(data[:at] + data[at + length :], at, None)
    if kind == "zero":
        length = BLOCK * draw(st.integers(1, 5))
        return _changed(data, block, bytes(min(length, size - block)))
    if kind == "swap":
        other = draw(place) // BLOCK * BLOCK
        low, high = sorted((block, other))
        one, two = data[low : low + BLOCK], data[high : high + BLOCK]
        if low == high:
            return Mutation(data, size, ())
        mixed = data[:low] + two + data[low + BLOCK : high] + one + data[high + BLOCK :]
        return Mutation(mixed, low, ((low, low + BLOCK), (high, high + BLOCK)))
    if kind == "header":  # the field of a header, with a right checksum: what a hostile writer would do
        begin = draw(st.sampled_from(sorted(begin for begin, _, _ in good.spans.values())))
        offset, length = draw(
            st.sampled_from(((0, 100), (100, 8), (124, 12), (156, 1), (257, 8), (345, 155), (482, 13)))
        )
        field = draw(st.one_of(st.binary(min_size=length, max_size=length), _numbers(length), _types(length)))
        head = data[begin : begin + offset] + field + data[begin + offset + length : begin + BLOCK]
        return _changed(data, begin, _with_checksum(head))
    if kind == "junk":
        return Mutation(draw(st.binary(max_size=3000)), 0, None)
    chain = draw(st.lists(st.sampled_from(b"LKxgSX7021"), min_size=1, max_size=40))
    forged = b"".join(_forged(kind, draw(st.sampled_from((0, 5, 512, 4096, -512, 2**40)))) for kind in chain)
    return Mutation(data[:block] + forged + data[block:], block, None)


def _changed(data: bytes, at: int, new: bytes) -> Mutation:
    return Mutation(data[:at] + new + data[at + len(new) :], at, ((at, at + len(new)),))


def _numbers(length: int) -> st.SearchStrategy[bytes]:
    """Octal and base-256 numbers, negative ones too."""
    sizes = st.sampled_from((0, 1, 511, 512, 10_000, 8**11 - 1))
    octal = sizes.map(lambda n: b"%011o\0" % n)
    binary = st.sampled_from((b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 8 + b"\0" * 4, b"\x80" + b"\0" * 11))
    return st.one_of(octal, binary).map(lambda field: field[:length].ljust(length, b"\0"))


def _types(length: int) -> st.SearchStrategy[bytes]:
    return st.sampled_from(b"01234567LKSxgXVMN\0").map(lambda kind: bytes([kind]).ljust(length, b"\0"))


def _with_checksum(head: bytes) -> bytes:
    blank = head[:148] + b" " * 8 + head[156:]
    return head[:148] + b"%06o\0 " % sum(blank) + head[156:]


def _forged(kind: int, size: int) -> bytes:
    info = tarfile.TarInfo("forged")
    info.size = size
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[156] = kind
    return _with_checksum(bytes(head))


def _read(folder: Path, data: bytes, entry: ShardEntry) -> list[RawSample | Lost]:
    (folder / entry.file).write_bytes(data)
    begin = time.process_time()  # other programs may keep the cores busy
    found = []
    for item in read_shard(ShardStorage(str(folder)), entry, WANTED):
        found.append(item)
        assert time.process_time() - begin < SLOWEST_S, "hangs"
    assert time.process_time() - begin < SLOWEST_S, "hangs"
    return found


def _account(found: list[RawSample | Lost], entry: ShardEntry) -> dict[str, Mapping[str, bytes]]:
    """Check that every promised sample is there or lost, and return those that are there."""
    samples = [item for item in found if isinstance(item, RawSample)]
    losses = [item for item in found if isinstance(item, Lost)]
    assert len(samples) + sum(loss.num_samples for loss in losses) == entry.num_samples
    assert all(loss.cause in CAUSES and loss.num_samples >= 0 for loss in losses)
    assert all(entry.file in loss.message and loss.message.isprintable() for loss in losses)
    assert len({sample.key for sample in samples}) == len(samples)
    assert all(sample.members.keys() == WANTED for sample in samples)
    return {sample.key: sample.members for sample in samples}


@pytest.mark.parametrize("good", SHARDS, ids=repr)
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choice=st.data())
def test_a_mutated_shard_is_read_as_far_as_it_goes_and_the_rest_is_counted(
    tmp_path: Path, good: Good, choice: st.DataObject
) -> None:
    data, first, changed = choice.draw(_mutations(good))
    # a manifest that was made of the mutated file, so that its parsing is reached
    entry = ShardEntry("x.tar", good.num_samples, len(data), hashlib.sha256(data).hexdigest())
    samples = _account(_read(tmp_path, data, entry), entry)
    only_data = changed is not None and all(
        any(begin <= low and high <= end for _, begin, end in good.spans.values()) for low, high in changed
    )
    for key in {key for key, _ in good.spans}:
        spans = [span for (one, _), span in good.spans.items() if one == key]
        members = {extension: good.content[key, extension] for extension in WANTED}
        touched = changed is None or any(low < end and begin < high for low, high in changed for begin, _, end in spans)
        if spans[-1][2] <= first:
            assert samples[key] == members, "it lies before the mutation"
        elif key in samples and not touched:
            assert samples[key] == members, "other bytes than its own were touched"
        elif only_data:
            assert key in samples, "headers are as they were"
    # against the manifest of the whole file, the mutation is found before anything is parsed
    known = ShardEntry("x.tar", good.num_samples, len(good.data), hashlib.sha256(good.data).hexdigest())
    found = _read(tmp_path, data, known)
    if data == good.data:
        assert len(_account(found, known)) == good.num_samples
    else:
        cause = "shard_truncated" if len(data) < len(good.data) else "shard_altered"
        assert [item[:2] for item in found] == [(good.num_samples, cause)]
