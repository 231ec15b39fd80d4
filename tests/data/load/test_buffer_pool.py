"""Buffers are reused, but never while a part of their batch is referred to, in any process."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.images.allocation import private_bytes, shared_bytes
from lightning_moevlm.data.load.buffer_pool import BatchPacker, BufferPool, unpack
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.load.worker_stream import WorkerStream
from lightning_moevlm.data.read.reader import Cursor, Delivery

NUM_BATCHES = 20  # of 6 in an epoch of 120 samples; more than there are buffers


def _pool(num_buffers: int = 2, num_bytes: int = 1000) -> BufferPool:
    return BufferPool(num_buffers, num_bytes, private_bytes)


def _loader(root: Path, num_workers: int) -> ShardLoader:
    return ShardDataModule(str(root), 6, 32, 24, 400, num_workers=num_workers, shuffle_buffer=30).train_dataloader()


def _tensors(batch: Batch) -> list[Tensor]:
    found = [batch.images_BRYX, batch.text_BL, batch.text_mask_BL]
    assert all(tensor is not None for tensor in found)
    return [tensor for tensor in found if tensor is not None]


def _assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert [batch.keys for batch in some] == [batch.keys for batch in others]
    for one, other in zip(some, others, strict=True):
        assert (one.num_pairs, one.sources) == (other.num_pairs, other.sources)
        for tensor, twin in zip(_tensors(one), _tensors(other), strict=True):
            assert torch.equal(tensor, twin) and tensor.dtype == twin.dtype and tensor.stride() == twin.stride()


def test_a_room_is_free_again_when_the_last_view_of_it_is_gone() -> None:
    pool = _pool()
    buffer = pool.take()
    assert buffer == 0 and pool.num_free == 1
    held = pool.lend(buffer)
    for view in (lambda t: t[10:26], lambda t: t.view(-1, 8).detach(), lambda t: t.numpy(), torch.from_numpy):
        held = view(held)
        gc.collect()
        assert pool.num_free == 1, "still held"
    held[:] = 7
    assert pool.view_buffer(0)[10:26].tolist() == 16 * [7], "a view of the buffer, not a copy"
    del held
    assert pool.num_free == 2 and pool.take() == 0


def test_without_a_free_room_there_is_ordinary_memory() -> None:
    pool = _pool()
    held = [pool.allocate(100).fill_(number) for number in range(4)]
    assert pool.num_free == 0
    assert [int(each.sum()) for each in held] == [0, 100, 200, 300]
    assert len(pool.allocate(5000)) == 5000, "larger than a buffer"
    del held
    assert pool.num_free == 2


def test_a_forked_process_does_not_free_buffers() -> None:
    pool = BufferPool(1, 10, shared_bytes)
    held = [pool.allocate(10)]
    process = multiprocessing.get_context("fork").Process(target=held.clear)
    process.start()
    process.join()
    assert process.exitcode == 0 and pool.num_free == 0
    held.clear()
    assert pool.num_free == 1


@pytest.mark.parametrize("in_room", [True, False])
def test_a_parcel_holds_the_batch_that_was_packed(in_room: bool) -> None:
    pool = _pool()
    packer = BatchPacker(pool, 0)
    images = (packer.allocate if in_room else private_bytes)(2 * 4 * 4 * 3).copy_(torch.arange(96))
    images_BRYX = images.view(2, 4, 4, 3).permute(0, 3, 1, 2)
    before = Batch(images_BRYX, torch.arange(10).view(2, 5), torch.tensor([[True, False]]), ("a", "b"), 2, (2,))
    left, pooled = packer.pack(before)
    assert pooled is not None and (left.images_BRYX, left.text_BL, left.text_mask_BL) == (None, None, None)
    starts = sorted((slot.start, slot.stop) for slot in pooled.slots.values())
    assert starts[0] == (0, 96) and all(start % 64 == 0 for start, _ in starts)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(starts)), "apart"
    after = unpack(left, pooled, [pool])
    _assert_same([after], [before])
    del after
    assert pool.num_free == 2


def test_a_batch_that_does_not_fit_is_sent_unchanged() -> None:
    pool = _pool(1, 100)
    packer = BatchPacker(pool, 0)
    large = Batch(torch.ones(2, 3, 16, 16, dtype=torch.uint8), torch.arange(10).view(2, 5), None, ("a", "b"))
    left, pooled = packer.pack(large)
    assert pooled is not None and list(pooled.slots) == ["text_BL"] and left.images_BRYX is large.images_BRYX
    assert packer.pack(large) == (large, None), "no buffer is free"
    assert packer.allocate(10).is_shared()


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_kept_batches_stay_whole(scenes_root: Path, num_workers: int) -> None:
    copies = [batch._replace(images_BRYX=_tensors(batch)[0].clone()) for batch in _loader(scenes_root, 0)]
    loader = _loader(scenes_root, num_workers)
    _assert_same(list(loader), copies)
    kept = [batch for number, batch in enumerate(_loader(scenes_root, num_workers)) if number % 3 == 0]
    next(iter(loader))  # another epoch begins in other buffers
    _assert_same(kept, copies[::3])
    assert len(copies) == NUM_BATCHES


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_buffers_of_dropped_batches_are_reused(scenes_root: Path, num_workers: int) -> None:
    places = {_tensors(batch)[0].data_ptr() for batch in _loader(scenes_root, num_workers)}
    assert len(places) <= 4 * max(1, num_workers)  # of 20 batches


class _Stream(WorkerStream):
    """As a loader makes it."""

    def __init__(self, loader: ShardLoader, pool: list[BufferPool]) -> None:
        super().__init__(loader._reader, loader._reader.next_epoch(Cursor(-1, 0)), len(loader), pool)


def _same(delivery: Delivery) -> Delivery:
    return delivery


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_workers_however_started_fill_the_rooms(scenes_root: Path, method: str) -> None:
    loader = _loader(scenes_root, 0)
    pool = [BufferPool(4, loader._reader.bytes_per_batch, shared_bytes)]
    arriving: DataLoader[Delivery] = DataLoader(
        _Stream(loader, pool), batch_size=None, num_workers=1, collate_fn=_same, multiprocessing_context=method
    )
    batches: list[Batch] = []
    for delivery in arriving:
        assert (delivery.pooled is not None) == (len(batches) < 4), "as long as there are buffers"
        assert delivery.pooled is None or set(delivery.pooled.slots) == {"images_BRYX", "text_BL", "text_mask_BL"}
        batches.append(unpack(delivery.batch, delivery.pooled, pool) if delivery.pooled else delivery.batch)
    _assert_same(batches, list(loader))


def _shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("torch_*")}  # torch names its files so


def test_a_killed_worker_harms_no_batch_and_leaves_nothing_behind(scenes_root: Path) -> None:
    before = _shared_files()
    batches: Iterator[Batch] = iter(_loader(scenes_root, 2))
    kept = [next(batches) for _ in range(3)]
    (worker, *_) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        kept.extend(batches)
    reference = list(_loader(scenes_root, 0))
    _assert_same(kept, reference[: len(kept)])
    assert 3 <= len(kept) < NUM_BATCHES
    assert not _shared_files() - before
