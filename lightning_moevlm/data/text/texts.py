"""Texts from outside: UTF-8, without a byte-order mark at their beginning and without blanks around them.

Editors and exports write the mark (U+FEFF) before a file or a field. Nobody sees it, and as a part of the first word it
would make that another word. Every reader and conversion takes texts through here.
"""

BYTE_ORDER_MARK = "\ufeff"


def strip_text(text: str) -> str:
    """Return a text without a mark at its beginning and without surrounding blanks."""
    return text.strip().removeprefix(BYTE_ORDER_MARK).strip()


def decode_text(data: bytes) -> str:
    """Return the text that bytes hold, bare.

    Raises:
        UnicodeDecodeError: if they are no UTF-8.

    """
    return strip_text(data.decode("utf-8"))
