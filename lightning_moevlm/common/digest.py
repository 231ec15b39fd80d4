"""Makes the short digest that identifies runs, baselines and their folders."""

import hashlib

DIGITS = 12
"""Hex digits: two of a million texts agree with a chance of 0.2 %."""


def digest_text(text: str) -> str:
    """Return the first hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
