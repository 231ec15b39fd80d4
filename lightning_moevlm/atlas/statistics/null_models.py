"""Draws tables of experts and values as they are if a claim is not true (`atlas/labels/label.py` says which hold).

samples     Within a block of samples, each gets the labels of another one, at each position among the samples that have
            one there. What positions decide is the same in every draw, and labels of a sample stay together.
shifts      In each sample labels move on by a random number of its tokens, over the end to the beginning
            (the toroidal shift of spatial statistics: Lotwick and Silverman 1982).
units       Token ids, objects or positions: each gets the distribution over experts of another one, at random. What
            follows from a rule by unit, such as a hash, is as likely as what is observed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]


class BlockPairs(NamedTuple):
    """The pairs of token and expert of a block of samples, and the label of each token.

    known_BS: bool, tokens that the layer saw and that have a label.
    code_BS: value of each token.
    row_N, position_N, expert_N: of each pair of a known token.
    weight_N: 1, or the share of a soft slot.
    """

    known_BS: NDArray[np.bool_]
    code_BS: NDArray[np.int64]
    row_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    expert_N: NDArray[np.int64]
    weight_N: Counts


class Shape(NamedTuple):
    """Number of experts and of values."""

    experts: int
    values: int


def tabulate(expert_N: NDArray[np.int64], code_N: NDArray[np.int64], weight_N: Counts, shape: Shape) -> Counts:
    """Return the weight of each expert and value, (E, V)."""
    flat = np.bincount(expert_N * shape.values + code_N, weights=weight_N, minlength=shape.experts * shape.values)
    return np.asarray(flat, np.float64).reshape(shape)


def draw_samples(blocks: Iterable[BlockPairs], shape: Shape, draws: int, generator: np.random.Generator) -> Counts:
    """Draw tables (B, E, V) in which labels move between the samples of a block."""
    total = np.zeros((draws, *shape))
    for block in blocks:
        rank_BS = np.cumsum(block.known_BS, axis=0) - 1
        place_N = rank_BS[block.row_N, block.position_N] * block.known_BS.shape[1] + block.position_N
        for number in range(draws):
            order_B = generator.permutation(len(block.known_BS))
            known_BS, code_BS = block.known_BS[order_B], block.code_BS[order_B]
            if not block.known_BS.all():  # at each position, those that have a label move to the front
                row_M, position_M = np.nonzero(known_BS)
                code_M = code_BS[row_M, position_M]
                code_BS[(np.cumsum(known_BS, axis=0) - 1)[row_M, position_M], position_M] = code_M
            total[number] += tabulate(block.expert_N, code_BS.ravel()[place_N], block.weight_N, shape)
    return total


def draw_shifts(blocks: Iterable[BlockPairs], shape: Shape, draws: int, generator: np.random.Generator) -> Counts:
    """Draw tables (B, E, V) in which labels move along each sample."""
    total = np.zeros((draws, *shape))
    for block in blocks:
        rank_BS, count_B, packed_BS = _pack(block.known_BS, block.code_BS)
        rank_N, count_N = rank_BS[block.row_N, block.position_N], count_B[block.row_N]
        shift_B = generator.integers(np.maximum(count_B, 1), size=(draws, len(count_B)))
        for number in range(draws):
            code_N = packed_BS[block.row_N, (rank_N + shift_B[number, block.row_N]) % count_N]
            total[number] += tabulate(block.expert_N, code_N, block.weight_N, shape)
    return total


def draw_units(by_expert_UE: Counts, by_value_UV: Counts, draws: int, generator: np.random.Generator) -> Counts:
    """Draw tables (B, E, V) in which each unit gets the experts of another one.

    Args:
        by_expert_UE: weight of each unit and expert.
        by_value_UV: tokens of each unit and value.
        draws: B.
        generator: of the draws.
    """
    profile_UE = by_expert_UE / np.maximum(by_expert_UE.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.stack([profile_UE[generator.permutation(len(profile_UE))].T @ by_value_UV for _ in range(draws)])


def _pack(
    known_XY: NDArray[np.bool_], code_XY: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the rank of each known entry within its row, their number, and their codes moved to the left."""
    rank_XY = np.cumsum(known_XY, axis=1) - 1
    order_XY = np.argsort(~known_XY, axis=1, kind="stable")
    return rank_XY, known_XY.sum(axis=1), np.take_along_axis(code_XY, order_XY, axis=1)
