"""Cleans texts of users' files: UTF-8 without a leading byte-order mark and without surrounding blanks.

Editors and exports write the mark (U+FEFF) before a file or a field. It is invisible, and would make another word of
the first word. All readers and conversions use these functions.
"""

BYTE_ORDER_MARK = "\ufeff"


def strip_text(text: str) -> str:
    """Return a text without a leading byte-order mark and without surrounding blanks."""
    return text.strip().removeprefix(BYTE_ORDER_MARK).strip()


def decode_text(data: bytes) -> str:
    """Decode UTF-8, and strip the text.

    Raises:
        UnicodeDecodeError: if the bytes are not UTF-8.
    """
    return strip_text(data.decode("utf-8"))


def parse_texts(value: object, field: str) -> tuple[str, ...]:
    """Return the texts of a JSON field, without surrounding blanks and without blank ones.

    Raises:
        UnicodeError: if one holds half a character (a lone surrogate).
        ValueError: if the value is neither a text nor a list of texts.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    texts = [strip_text(text) for text in values if isinstance(text, str)]
    if len(texts) < len(values):
        raise ValueError(f"field {field!r} is neither a text nor a list of texts")
    for text in texts:
        text.encode("utf-8")
    return tuple(text for text in texts if text)
