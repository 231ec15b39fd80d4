"""Draws training batches from tars without a manifest.

The samples of a stream depend on seed, rank, stream, epoch and the batch that it starts with. So a run repeats itself,
while one that is resumed draws other samples than an uninterrupted one. Every rank gets equally many batches, because
each draws from all tars.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.faults import Cause, Lost
from lightning_moevlm.data.format.shard_reader import RawSample
from lightning_moevlm.data.images.allocation import Allocate
from lightning_moevlm.data.plain.source import PlainSource
from lightning_moevlm.data.read.collate import Decoded
from lightning_moevlm.data.read.join_batches import join_batches
from lightning_moevlm.data.read.reader import READING, Cursor, Delivery, Reader
from lightning_moevlm.data.read.sample_order import Rank

_MOST_LOST_IN_A_ROW = 10_000


@dataclass(frozen=True)
class DrawReader(Reader):
    """Draws batches of one rank without end; an epoch is a number of them.

    Raises:
        UserError: no batch in an epoch.
    """

    source: PlainSource
    batch_size: int
    rank: Rank
    num_streams: int
    tolerant: bool
    shuffle_buffer: int
    seed: int
    batches_per_epoch: int

    def __post_init__(self) -> None:
        if not self.batches_per_epoch:
            raise UserError(
                f"an epoch of data.urls has {self.source.num_samples} samples, less than a batch of {self.batch_size} "
                f"for each of {self.rank.world_size} ranks: lower data.batch_size, or raise "
                "data.webdataset.epoch_samples"
            )

    @property
    def sources(self) -> tuple[PlainSource, ...]:  # type: ignore[override]  # a field of others
        """The tars."""
        return (self.source,)

    @property
    def num_batches(self) -> int:
        """Batches of one epoch on this rank."""
        return self.batches_per_epoch

    @property
    def order(self) -> dict[str, object]:
        """All that draws depend on; a resumed run may change it, since it draws anew."""
        return {READING: "by draws, without a manifest"}

    def next_epoch(self, before: Cursor) -> Cursor:
        """Return the beginning of the next epoch."""
        return Cursor(before.epoch + 1, 0)

    def stream(self, start: Cursor, stream: int, allocate: Allocate) -> Iterator[Delivery]:
        """Yield the stream's batches.

        Raises:
            UserError: if a sample is lost without tolerance, or very many in a row.
        """
        words = f"plain/{self.seed}/{start.epoch}/{start.batch}/{self.rank.index}/{self.rank.world_size}/{stream}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big")
        arriving = self.source.draw(self.shuffle_buffer, seed)
        first = start.batch + (stream - start.batch) % self.num_streams
        for number in range(first, self.num_batches, self.num_streams):
            yield self._delivery(arriving, f"{words}/{number}", allocate)

    def _delivery(self, arriving: Iterator[RawSample | Lost], draw: str, allocate: Allocate) -> Delivery:
        collate = self.source.collate
        rows = collate.image_rows(self.batch_size, allocate)
        samples: list[Decoded] = []
        lost: Counter[Cause] = Counter()
        last_error = ""
        while len(samples) < self.batch_size:
            sample = self._take(arriving, None if rows is None else rows[len(samples)], draw)
            if isinstance(sample, Decoded):
                samples.append(sample)
                continue
            lost[self._accept_loss(sample).cause] += sample.num_samples
            last_error = sample.message
            if lost.total() > _MOST_LOST_IN_A_ROW:
                raise UserError(f"no batch can be made of data.urls: {lost.total()} samples are lost; {last_error}")
        batch = join_batches({0: collate.make_batch(samples, rows)}, [self.source.name])
        return Delivery(batch, (), dict(lost), last_error, collate.pack_jpegs(samples, len(samples)))

    def _take(self, arriving: Iterator[RawSample | Lost], into: Tensor | None, draw: str) -> Decoded | Lost:
        raw = next(arriving, None)
        if raw is None:
            raise UserError("data.urls gives no sample: its tars hold none with an image and a caption")
        return self.source.decode(raw, into, draw)
