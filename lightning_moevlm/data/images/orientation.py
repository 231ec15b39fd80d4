"""Reads the EXIF orientation of images, by one rule for all readers.

Cameras store pixels in the order of the sensor, with a note on how to rotate them. Decoders ignore the note, so it is
read from the bytes: a JPEG's first Exif segment, a PNG's `eXIf` chunk or a WebP's `EXIF` chunk. Without a valid note an
image is upright. XMP is ignored, as in browsers and torchcodec.
Source: Exif 2.32 (CIPA DC-008), 4.6.4 A, tag Orientation; TIFF 6.0 for the layout.
"""

import struct

from PIL import Image

UPRIGHT = 1
_TAG = 0x0112
_EXIF = b"Exif\0\0"
_EXIF_SEGMENT, _STARTS_OF_PIXELS = 0xE1, (0xDA, 0xD9)
TRANSPOSED, FLIPPED_DOWN, FLIPPED_ACROSS = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)
"""Orientations with rows and columns exchanged; and, after that is undone, upside down or mirrored."""
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of an encoded image, 1 (upright) to 8."""
    try:
        if data[:2] == b"\xff\xd8":
            return _read_orientation_tag(_find_jpeg_exif(data))
        if data[:4] == b"\x89PNG":
            return _read_orientation_tag(_find_png_exif(data))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _read_orientation_tag(_find_webp_exif(data))
    except struct.error:  # an offset points outside the bytes
        pass
    return UPRIGHT


def turn_image(image: Image.Image, turn: int) -> Image.Image:
    """Set a Pillow image upright. turn: its EXIF orientation."""
    return image if turn == UPRIGHT else image.transpose(_METHODS[turn])


def upright_size(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Return (width, height) upright. turn: the EXIF orientation."""
    return (size[1], size[0]) if turn in TRANSPOSED else size


def _find_jpeg_exif(data: bytes) -> bytes:
    """Return the TIFF structure of the first Exif segment before the pixels; empty if there is none."""
    place = 2
    while data[place : place + 1] == b"\xff":
        _, marker, length = struct.unpack_from(">BBH", data, place)
        if marker in _STARTS_OF_PIXELS:
            break
        content = data[place + 4 : place + 2 + length] if marker == _EXIF_SEGMENT else b""
        if content.startswith(_EXIF):
            return content
        place += 2 + length
    return b""


def _find_png_exif(data: bytes) -> bytes:
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"eXIf":
            return data[place + 8 : place + 8 + length]
        place += 12 + length  # plus a checksum
    return b""


def _find_webp_exif(data: bytes) -> bytes:
    place = 12
    while place + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        if name == b"EXIF":
            return data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
    return b""


def _read_orientation_tag(exif: bytes) -> int:
    tiff = exif.removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return UPRIGHT
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * num_entries, 12):
        tag, _, _, found = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == _TAG:
            return found if found in _METHODS else UPRIGHT
    return UPRIGHT
