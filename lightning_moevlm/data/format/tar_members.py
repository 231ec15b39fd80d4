"""Iterates over the members of a tar, and raises if it breaks off before its end.

WebDataset and Python's `tarfile` stop silently at an invalid header: a zeroed block, a flipped bit, the end of half a
file. Here only a proper end is silent. `tarfile` parses headers (ustar, GNU and pax names), except plain ones, because
it is slow. The walk from header to header is guarded: no file can make it jump backwards, unpack anything or ask for
unbounded memory. Sparse members and compressed tars are refused, because both could unpack to any size. Names are never
used as paths: nothing is written.
"""

import os
import tarfile
from collections.abc import Callable, Generator, Iterator
from typing import BinaryIO, NamedTuple

from lightning_moevlm.data.format.faults import DataFault
from lightning_moevlm.data.format.tar_header import BLOCK_BYTES, parse_plain_header

_CHUNK_BYTES = 2**20
_LONGEST_HEADER_BYTES = 2**14
"""Largest extended header, which holds names. Before 3.11.10 Python's parsing time is quadratic in its length."""
# raised by tarfile's parsing of headers: some fields are read without a check (IndexError, KeyError), and chains of
# extended headers are followed by recursion
_NO_HEADER = (tarfile.TarError, ValueError, IndexError, KeyError, OverflowError, RecursionError)


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str  # printable; other characters are escaped
    data: bytes | None  # None if it was not wanted
    offset: int  # of its first byte in the tar
    num_bytes: int


class TarBreak(DataFault):
    """A tar ends before its proper end. The message continues "the shard ..."."""


def tar_members(stream: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """Yield the regular files of a plain tar in their order, with the bytes of those whose name is wanted.

    Raises:
        TarBreak: after the last good member, unless the proper end of a tar follows it.
    """
    num_bytes = os.fstat(stream.fileno()).st_size
    if num_bytes == 0:
        raise TarBreak("shard_truncated", "is empty")
    try:
        tar = tarfile.TarFile(fileobj=_HeaderFile(stream), encoding="utf-8")  # type: ignore[arg-type]
        info = tar.next()
    except _NO_HEADER:
        raise _explain_break(0, stream.tell(), num_bytes) from None
    end = 0
    while info is not None:
        start, end = end, tar.offset
        if info.size < 0 or end <= start or (info.isreg() and info.offset_data + info.size > end):
            raise TarBreak("shard_corrupt", f"is not a valid tar from byte {start} on")
        if info.isreg() and not info.issparse():
            if info.offset_data + info.size > num_bytes:
                raise TarBreak("shard_truncated", f"ends within {_escape(info.name)}")
            data = None
            if wanted(info.name):
                stream.seek(info.offset_data)
                data = stream.read(info.size)
            yield Member(_escape(info.name), data, info.offset_data, info.size)
        tar.members.clear()  # type: ignore[attr-defined]  # or it would keep every header
        if end > num_bytes:
            raise TarBreak("shard_truncated", f"ends within {_escape(info.name)}")
        if not tar.pax_headers:  # otherwise these change the meaning of later headers
            end = tar.offset = yield from _plain_members(stream, end, num_bytes, wanted)
        try:
            info = tar.next()
        except _NO_HEADER:
            raise _explain_break(end, stream.tell(), num_bytes) from None
    if not _holds_only_zeros(stream, end):
        raise _explain_break(end, end, num_bytes)


class _HeaderFile:
    """A file for `tarfile` to read headers from, in bounded pieces."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek = stream.seek
        self.tell = stream.tell
        self._stream = stream

    def read(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= _LONGEST_HEADER_BYTES:
            raise ValueError(f"a header of {num_bytes} bytes")
        return self._stream.read(num_bytes)


def _plain_members(
    stream: BinaryIO, start: int, num_bytes: int, wanted: Callable[[str], bool]
) -> Generator[Member, None, int]:
    """Yield members with plain headers and whole data from `start` on; return the offset after the last."""
    seek, read = stream.seek, stream.read
    while True:
        seek(start)
        header = parse_plain_header(read(BLOCK_BYTES))
        if header is None:
            return start
        name, size = header
        end = start + BLOCK_BYTES + header.padded_bytes
        if end > num_bytes:
            return start
        yield Member(_escape(name), read(size) if wanted(name) else None, start + BLOCK_BYTES, size)
        start = end


def _escape(name: str) -> str:
    """Escape characters that could harm a terminal or cannot be encoded: names are untrusted."""
    return name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode("ascii")


def _explain_break(offset: int, read_to: int, num_bytes: int) -> TarBreak:
    """Return the reason for an invalid header at `offset`. read_to: end of the bytes that were searched."""
    if num_bytes - offset < tarfile.BLOCKSIZE or read_to >= max(num_bytes, offset + tarfile.BLOCKSIZE + 1):
        return TarBreak("shard_truncated", f"ends at byte {num_bytes} without the end mark of a tar")
    return TarBreak("shard_corrupt", f"is not a valid tar from byte {offset} on")


def _holds_only_zeros(stream: BinaryIO, offset: int) -> bool:
    """Return whether at least one byte follows, and only zeros."""
    stream.seek(offset)
    chunk = stream.read(_CHUNK_BYTES)
    if not chunk:
        return False
    while chunk:
        if chunk.count(0) != len(chunk):
            return False
        chunk = stream.read(_CHUNK_BYTES)
    return True
