from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moevlm.shards.order import (
    Piece,
    Stretch,
    pieces,
    rank_stretch,
    shard_permutation,
    shuffled,
    train_batches,
    train_stretch,
)


def test_pieces_by_hand() -> None:
    # shards of 5, 3, 4 samples, read in order 2, 0, 1: the line is 2222 00000 111
    assert pieces(Stretch(2, 10), [5, 3, 4], [2, 0, 1]) == (
        Piece(shard=2, start=2, stop=4, first=0),
        Piece(shard=0, start=0, stop=5, first=2),
        Piece(shard=1, start=0, stop=1, first=7),
    )


def test_streams_by_hand() -> None:
    # 23 samples, batches of 2, 2 ranks: 5 batches each, 3 samples left out; 3 streams: batches 0,3 / 1,4 / 2
    assert train_batches(23, 2, 2) == 5
    assert [train_stretch(5, 2, 0, s, 3) for s in range(3)] == [(0, 4), (4, 8), (8, 10)]
    assert [train_stretch(5, 2, 1, s, 3) for s in range(3)] == [(10, 14), (14, 18), (18, 20)]


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
    order = list(shuffled(length, buffer_size, Random(seed)))
    assert sorted(order) == list(range(length))
    assert all(number < place + buffer_size + 1 for place, number in enumerate(order))


def test_shuffled_mixes() -> None:
    order = list(islice(shuffled(1000, 200, Random(0)), 100))
    assert order != sorted(order)
    assert max(order) > 150


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_fixed_order_gives_every_sample_to_one_rank(world_size: int) -> None:
    stretches = [rank_stretch(20, rank, world_size) for rank in range(world_size)]
    assert [n for stretch in stretches for n in range(stretch.start, stretch.stop)] == list(range(20))
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1
