"""The common tar header, read fast: a regular file, its name and its size, and nothing out of the ordinary.

`tarfile` makes an object with thirty fields of every header, which costs more than decoding a small picture. What is
recognised here means the same to `tarfile` (owner, mode and time are not looked at); of everything else (directories,
links, extended headers, sizes in base 256, a wrong checksum, the end) this says nothing, and `tarfile` is asked.
"""

import zlib
from typing import NamedTuple

BLOCK_BYTES = 512
_REGULAR = (b"0", b"\0")
_OCTAL = frozenset(b"01234567")


class PlainHeader(NamedTuple):
    """name: with its prefix, decoded as `tarfile` does. num_bytes: of the data that begin right after the header."""

    name: str
    num_bytes: int

    @property
    def num_padded(self) -> int:
        """Bytes from the end of the header to the next header."""
        return -(-self.num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def plain_header(block: bytes) -> PlainHeader | None:
    """Return what a header block says if it is a plain one, else None."""
    if len(block) != BLOCK_BYTES or block[156:157] not in _REGULAR:
        return None
    num_bytes, checksum = _octal(block[124:136]), _octal(block[148:156])
    # the checksum is that of the block with blanks in the place of the checksum
    if num_bytes is None or checksum != _sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name, prefix = _text(block[:100]), _text(block[345:500])
    if not name or name.endswith("/"):  # a directory of old
        return None
    return PlainHeader(f"{prefix}/{name}" if prefix else name, num_bytes)


def _sum(block: bytes) -> int:
    """Sum of a block's bytes; the low half of an Adler checksum is 1 + the sum, exactly so for 256 bytes."""
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


def _octal(field: bytes) -> int | None:
    digits = field.partition(b"\0")[0].strip(b" ")
    return int(digits, 8) if digits and _OCTAL.issuperset(digits) else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
