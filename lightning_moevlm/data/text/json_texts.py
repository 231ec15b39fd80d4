"""Texts in a JSON field: one, or a list of several."""

from lightning_moevlm.data.text.texts import strip_text


def parse_texts(value: object, field: str) -> tuple[str, ...]:
    """Return the texts that a JSON field holds, without surrounding blanks and without those that are blank.

    Raises:
        UnicodeError: if one holds half a character.
        ValueError: if it is neither a text nor a list of texts.

    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    texts = [strip_text(text) for text in values if isinstance(text, str)]
    if len(texts) < len(values):
        raise ValueError(f"field {field!r} is neither a text nor a list of texts")
    for text in texts:
        text.encode("utf-8")
    return tuple(text for text in texts if text)
