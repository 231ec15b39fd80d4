"""A loader that knows where it is: sized, resumable to the batch, in a new order every epoch.

Its state is a cursor (epoch, batches handed out), kept in the main process and counted when a batch is
handed out. What workers have prefetched beyond it is simply not part of it, so there is no state to collect
from workers, none that can run ahead of the training, and the same cursor serves every rank. Lightning
saves and restores it with the training state, because it offers `state_dict` and `load_state_dict` and has
a length.

An iteration that hands out nothing does not count as an epoch, and a state saved after an epoch's last
batch goes on with the next epoch.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch.utils.data import DataLoader

from lightning_moevlm.errors import UserError
from lightning_moevlm.records import Batch
from lightning_moevlm.shards.reader import BatchStream, Cursor, Failure, ShardReader

LoaderState = dict[str, int | str]
"""A cursor and all that the order of batches depends on, as plain values."""


class ShardLoader:
    """Iterates over a reader's batches, with `num_workers` processes or none.

    batches_per_epoch: where an epoch ends if the trainer uses fewer batches than there are.
    """

    def __init__(self, reader: ShardReader, num_workers: int, batches_per_epoch: int | None = None) -> None:
        self._reader = reader
        self._num_workers = num_workers
        self._batches_per_epoch = min(reader.num_batches, batches_per_epoch or reader.num_batches)
        self._cursor = Cursor(0, 0)
        self._resume_here = True

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        return self._reader.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Hand out the rest of a resumed epoch, else the next epoch.

        Raises:
            UserError: if a shard is missing or altered, or a sample cannot be decoded.

        """
        self._cursor = self._next_start()
        self._resume_here = False
        epoch = self._cursor.epoch
        loader: DataLoader[Batch | Failure] = DataLoader(
            BatchStream(self._reader, self._cursor),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_unchanged,
        )
        for handed_out, batch in enumerate(loader, self._cursor.batch + 1):
            if isinstance(batch, Failure):
                raise UserError(batch.message)
            self._cursor = Cursor(epoch, handed_out)
            yield batch

    def _next_start(self) -> Cursor:
        finished = self._cursor.batch >= self._batches_per_epoch
        if finished or (self._cursor.batch > 0 and not self._resume_here):
            return Cursor(self._cursor.epoch + 1, 0)
        return self._cursor

    def state_dict(self) -> LoaderState:
        """Return the cursor, and all that the order of batches depends on."""
        return {**asdict(self._cursor), **self._order()}

    def load_state_dict(self, state_dict: LoaderState) -> None:
        """Go on from a saved cursor.

        Raises:
            UserError: if the order of batches would not be the one that the cursor counts in.

        """
        for name, now in self._order().items():
            then = state_dict.get(name)
            if then != now:
                raise UserError(
                    f"cannot resume the data: {name} was {then} in the checkpoint, now it is {now}, "
                    "and batches would come in another order; restore it, or start from the weights alone"
                )
        self._cursor = Cursor(int(state_dict["epoch"]), int(state_dict["batch"]))
        self._resume_here = True

    def _order(self) -> LoaderState:
        reader = self._reader
        return {
            "manifest_digest": reader.manifest.digest,
            "split": reader.split,
            "batch_size": reader.batch_size,
            "shuffle_buffer": reader.shuffle_buffer,
            "seed": reader.seed,
            "world_size": reader.rank.world_size,
            "num_streams": max(1, self._num_workers),
        }


def _unchanged(batch: Any) -> Any:
    return batch  # the default would turn the tuple of keys into a list
