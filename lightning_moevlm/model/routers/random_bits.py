"""Pseudo-random bits that follow from an index alone: SplitMix64, arithmetic modulo 2^64.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
"""

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as a signed number: int64 wraps around like uint64


def mix_bits(values: Tensor) -> Tensor:
    """Return SplitMix64's finaliser of each int64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        values = (values ^ shift_right(values, shift)) * factor
    return values ^ shift_right(values, 31)


def scramble(values: Tensor, seed: int) -> Tensor:
    """Return a pseudo-random int64 for each int64."""
    offset = (seed + 1) * GOLDEN % 2**64
    return mix_bits(values + (offset - 2**64 if offset >= 2**63 else offset))


def shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros; torch's own shift keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
