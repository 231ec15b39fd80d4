"""One split of tars without a manifest, as readers of batches need it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import Lost, SampleFault
from lightning_moevlm.data.format.manifest import ShardEntry
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.plain.options import WebDatasetOptions
from lightning_moevlm.data.plain.pipeline import draw_tars, read_tars
from lightning_moevlm.data.read.collate import Collate, Decoded
from lightning_moevlm.data.read.sample_order import SampleRange, ShardRange, split_by_shard
from lightning_moevlm.data.storage.find_tars import FoundTar


@dataclass(frozen=True)
class PlainSource:
    """Tars of one split.

    Held-out tars have been counted; training draws from its tars, and how many samples they hold is an estimate.
    """

    name: str  # in messages, in the log and in the state
    tars: tuple[FoundTar, ...]
    shards: tuple[ShardEntry, ...]  # their numbers of samples; of training one entry, the samples of an epoch
    collate: Collate
    options: WebDatasetOptions
    is_counted: bool
    tolerant: bool  # whether samples may be lost

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def per_tar(self) -> int:
        """Samples of a tar, about."""
        return max(1, self.num_samples // len(self.tars))

    def draw(self, shuffle_buffer: int, seed: int) -> Iterator[RawSample | Lost]:
        """Yield samples without end."""
        return draw_tars(
            self.tars, self.options, self.collate.wanted, self.per_tar, self.tolerant, shuffle_buffer, seed
        )

    def split_by_shard(self, sample_range: SampleRange, permutation: tuple[int, ...]) -> tuple[ShardRange, ...]:
        """Return the samples of each tar in a sample range."""
        return split_by_shard(sample_range, [shard.num_samples for shard in self.shards], permutation)

    def read(self, ranges: tuple[ShardRange, ...], gone: set[int]) -> Iterator[tuple[int, RawSample | Lost]]:
        """Yield numbered samples in order; a tar that has become shorter loses the rest.

        Raises:
            UserError: of training tars, which are not counted.
        """
        if not self.is_counted:
            raise UserError(
                "the tars of data.urls are not counted, so their samples have no fixed order: make a set of them with "
                "`moevlm data index URLS --out DIR`, and use data.root DIR"
            )
        for shard_range in ranges:
            tar = self.tars[shard_range.shard]
            samples = read_tars([tar], self.options, self.collate.wanted, self.tolerant)
            number = shard_range.first
            for place in range(shard_range.stop):
                sample = next(samples, None)
                if sample is None:
                    sample = Lost(1, "sample_count", f"{tar.place} has fewer samples than when it was counted")
                if place >= shard_range.start:
                    if number not in gone:
                        yield number, sample._replace(num_samples=1) if isinstance(sample, Lost) else sample
                    number += 1

    def decode(self, sample: RawSample | Lost, into: Tensor | None, draw: str = "") -> Decoded | Lost:
        """Decode a sample, its image into a row of a batch; a fault makes it a loss."""
        if isinstance(sample, Lost):
            return sample
        try:
            return self.collate.decode(sample, into, draw)
        except SampleFault as fault:
            return Lost(1, fault.cause, str(fault).partition("; rebuild the set")[0].replace(" in shard ", " in "))
