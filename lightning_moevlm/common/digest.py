"""The short name of a text: what runs, baselines and their folders are told apart by."""

import hashlib

DIGITS = 12
"""Hex digits: two of a million texts agree with a chance of 0.2 %."""


def digest_text(text: str) -> str:
    """Return the first hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
