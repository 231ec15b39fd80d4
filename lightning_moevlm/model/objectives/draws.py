"""Draws random numbers by sample, independent of its place in a batch.

    number i of a sample = mix(mix(hash of its key, seed of the draw) + i x golden ratio)

So a mask does not depend on batch size, rank, workers or neighbours. Validation loss is a function of the checkpoint
and the set, and micro-batches hide what the joined batch would.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from lightning_moevlm.model.initial_weights import derive_seed
from lightning_moevlm.model.routers.random_bits import GOLDEN, mix_bits, shift_right


@dataclass(frozen=True)
class Draws:
    """The source of an objective's random choices.

    Args:
        seed: other seeds give other numbers.
    """

    seed: int

    def uniform(self, name: str, keys: Sequence[str], num: int) -> Tensor:
        """Return `num` numbers in [0, 1) for each sample, fp32 (samples, num) on the CPU.

        Args:
            name: purpose; each name has its own numbers.
            keys: keys of the samples.
            num: numbers per sample; a larger num keeps the first ones.
        """
        hashed = [int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big", signed=True) for key in keys]
        start_B = mix_bits(torch.tensor(hashed, dtype=torch.int64) ^ derive_seed(self.seed, name))
        index_N = torch.arange(1, num + 1, dtype=torch.int64)
        bits_BN = mix_bits(start_B.unsqueeze(-1) + index_N * GOLDEN)
        return shift_right(bits_BN, 40).to(torch.float32) / 2**24  # as many bits as fp32 has
