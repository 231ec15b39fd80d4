from itertools import islice
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moevlm.data.read.sample_order import (
    Rank,
    SampleRange,
    ShardRange,
    fixed_batches,
    fixed_number,
    fixed_range,
    running_range,
    shard_permutation,
    shuffle,
    split_by_shard,
    train_batches,
    train_range,
)


def test_pieces_by_hand() -> None:
    # shards of 5, 3, 4 samples, read in order 2, 0, 1: the line is 2222 00000 111
    assert split_by_shard(SampleRange(2, 10), [5, 3, 4], [2, 0, 1]) == (
        ShardRange(shard=2, start=2, stop=4, first=0),
        ShardRange(shard=0, start=0, stop=5, first=2),
        ShardRange(shard=1, start=0, stop=1, first=7),
    )


def test_streams_by_hand() -> None:
    # 23 samples, batches of 2, 2 ranks: 5 batches each, 3 samples left out; 3 streams: batches 0,3 / 1,4 / 2
    assert train_batches(23, 2, 2) == 5
    assert [train_range(5, 2, 0, s, 3) for s in range(3)] == [(0, 4), (4, 8), (8, 10)]
    assert [train_range(5, 2, 1, s, 3) for s in range(3)] == [(10, 14), (14, 18), (18, 20)]


def test_permutation_depends_on_seed_and_epoch() -> None:
    orders = {shard_permutation(10, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert shard_permutation(10, 1, 2) == shard_permutation(10, 1, 2)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 80), buffer_size=st.integers(1, 100), seed=st.integers(0, 5))
def test_shuffled_is_a_permutation_that_never_looks_further_than_its_buffer(
    length: int, buffer_size: int, seed: int
) -> None:
    order = list(shuffle(length, buffer_size, Random(seed)))
    assert sorted(order) == list(range(length))
    assert all(number < place + buffer_size + 1 for place, number in enumerate(order))


def test_shuffled_mixes() -> None:
    order = list(islice(shuffle(1000, 200, Random(0)), 100))
    assert order != sorted(order)
    assert max(order) > 150


def test_running_on_by_hand() -> None:
    # 23 samples, 2 ranks x 3 streams: 3 samples each, 5 left out
    found = [running_range(23, Rank(rank, 2), stream, 3) for rank in range(2) for stream in range(3)]
    assert found == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15), (15, 18)]


def test_fixed_order_by_hand() -> None:
    # 20 samples, 3 ranks: 7 a rank, so 2 batches of up to 4, and 6 batches of 3 or 4 in all
    assert fixed_batches(20, 4, 3) == 2
    ranges = [fixed_range(20, 2, Rank(rank, 3), number) for rank in range(3) for number in range(2)]
    assert ranges == [(0, 3), (3, 6), (6, 10), (10, 13), (13, 16), (16, 20)]
    # 5 batches over 2 streams: stream 0 reads the batches 0, 1, 2 of the line as 0, 2, 4, stream 1 reads 3, 4 as 1, 3
    assert [fixed_number(batch, 5, 2) for batch in range(5)] == [0, 3, 1, 4, 2]
    # 5 samples, 2 ranks, batches of 1: 2 batches each, so one of them must hold 2
    assert fixed_batches(5, 1, 2) == 2
    assert fixed_batches(1, 4, 2) == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_fixed_order_reads_every_sample_once_in_equal_batches(
    num_samples: int, batch_size: int, world_size: int, num_streams: int
) -> None:
    batches = fixed_batches(num_samples, batch_size, world_size)
    if num_samples < world_size:
        assert batches == 0
        return
    assert sorted(fixed_number(batch, batches, num_streams) for batch in range(batches)) == list(range(batches))
    ranges = [
        fixed_range(num_samples, batches, Rank(r, world_size), n) for r in range(world_size) for n in range(batches)
    ]
    assert [n for sample_range in ranges for n in range(sample_range.start, sample_range.stop)] == list(
        range(num_samples)
    )
    sizes = list(map(len, ranges))
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 2 if batch_size == 1 else 0)
