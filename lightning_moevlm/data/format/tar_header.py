"""Parses plain tar headers fast: a regular file, its name and its size.

`tarfile` makes an object with thirty fields of every header, which costs more than decoding a small image. A header
that passes here means the same to `tarfile` (owner, mode and time are ignored). Directories, links, extended headers,
sizes in base 256, wrong checksums and the end of the tar are left to `tarfile`.
"""

import struct
import zlib
from typing import NamedTuple

BLOCK_BYTES = 512
_REGULAR = (b"0", b"\0")
_FIELDS = struct.Struct("100s 24x 12s 12x 8s c 188x 155s 12x")
"""Fields of a header that matter: name, size, checksum, kind, prefix."""


class PlainHeader(NamedTuple):
    """The header of a regular file."""

    name: str  # with its prefix, decoded as in `tarfile`
    num_bytes: int  # of the data, which begin right after the header

    @property
    def padded_bytes(self) -> int:
        """Bytes from the end of the header to the next header."""
        return -(-self.num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def parse_plain_header(block: bytes) -> PlainHeader | None:
    """Return a header block as a plain header; None if it is not one."""
    if len(block) != BLOCK_BYTES:
        return None
    name_field, size_field, checksum_field, kind, prefix_field = _FIELDS.unpack(block)
    if kind not in _REGULAR:
        return None
    num_bytes, checksum = _octal(size_field), _octal(checksum_field)
    # the checksum counts its own field as blanks
    if num_bytes is None or checksum != _sum(block) - sum(checksum_field) + 8 * ord(" "):
        return None
    name = _text(name_field)
    if not name or name.endswith("/"):  # a directory of old tars
        return None
    if prefix_field[0]:
        name = f"{_text(prefix_field)}/{name}"
    return PlainHeader(name, num_bytes)


def _sum(block: bytes) -> int:
    """Return the sum of a block's bytes. The low half of an Adler checksum is 1 + the sum, exact for 256 bytes."""
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


def _octal(field: bytes) -> int | None:
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits.isdigit():  # int() would take signs and underscores too
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
