"""Runs in a loader's worker: reads its logical streams in turns."""

from collections.abc import Iterator, Sequence

from torch.utils.data import IterableDataset, get_worker_info

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.images.allocation import Allocate
from lightning_moevlm.data.load.buffer_pool import BatchPacker, BufferPool
from lightning_moevlm.data.read.reader import Cursor, Delivery, Failure, Reader


class WorkerStream(IterableDataset[Delivery | Failure]):
    """A worker's batches, from a cursor on.

    Args:
        reader: Reads the batches.
        start: Place of the first batch.
        batches: Batches of the epoch.
        pools: Memory for batches, one pool of each worker, or one of this process if there are no workers.
    """

    def __init__(self, reader: Reader, start: Cursor, batches: int, pools: Sequence[BufferPool]) -> None:
        self._reader = reader
        self._start = start
        self._batches = batches
        self._pools = pools

    def __iter__(self) -> Iterator[Delivery | Failure]:
        """Yield this worker's batches. A `UserError` ends them as a `Failure`."""
        worker = get_worker_info()
        try:
            if worker is None:
                yield from self._deliveries(0, 1, self._pools[0].allocate)
                return
            packer = BatchPacker(self._pools[worker.id], worker.id)
            for delivery in self._deliveries(worker.id, worker.num_workers, packer.allocate):
                batch, pooled = packer.pack(delivery.batch)
                yield delivery._replace(batch=batch, pooled=pooled)
        except UserError as error:
            yield Failure(str(error))

    def _deliveries(self, worker_id: int, num_workers: int, allocate: Allocate) -> Iterator[Delivery]:
        streams: dict[int, Iterator[Delivery]] = {}
        # the loader asks worker 0 first, so that worker must have the stream of the next batch
        for batch in range(self._start.batch + worker_id, self._batches, num_workers):
            stream = batch % self._reader.num_streams
            if stream not in streams:
                streams[stream] = self._reader.stream(self._start, stream, allocate)
            yield next(streams[stream])
