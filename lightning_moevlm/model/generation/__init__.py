"""Continues texts and conversations after their beginnings, and rates given answers."""

from lightning_moevlm.model.generation.continue_texts import (
    Decoding,
    Generated,
    generate,
    generate_replies,
    sample_tokens,
)
from lightning_moevlm.model.generation.likelihood import rate_answers, rate_replies

__all__ = [
    "Decoding",
    "Generated",
    "generate",
    "generate_replies",
    "rate_answers",
    "rate_replies",
    "sample_tokens",
]
