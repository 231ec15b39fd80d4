"""How routing settles over the checkpoints of a run, on the same tokens.

    saturation(t)    mean over tokens of |experts chosen at t and at the end| / |experts chosen at the end|
                     (OLMoE, arXiv 2409.02060, section 5.1)
    by chance        the same if choices at t and at the end were independent, with the loads that they have
    fluctuation(t)   mean over tokens of the share of the choices at the checkpoint before that are not made at t; with
                     one expert a token, the share of tokens whose expert changed (StableMoE, arXiv 2204.08396)
    death, birth     an expert's load falls below 1 % of the even one, or rises above it, since the checkpoint before

Sums over blocks of tokens, so that memory does not grow with the probe. The values depend on which checkpoints there
are: with more of them, neighbours differ less.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_moevlm.common.errors import UserError

Chosen = NDArray[np.bool_]
"""Choices of tokens, (T, E)."""

DEAD = 0.01
"""Load below which an expert is dead, as a share of the even load 1 / E."""


class Point(NamedTuple):
    """One checkpoint."""

    step: int
    saturation: float
    by_chance: float
    fluctuation: float | None
    """None at the first checkpoint."""
    alive: int
    """Experts that are not dead."""
    load_E: tuple[float, ...]
    """Share of all choices."""


class Turn(NamedTuple):
    """An expert that died or was born between two checkpoints."""

    step: int
    """The later checkpoint."""
    expert: int
    kind: Literal["birth", "death"]


@dataclass(frozen=True)
class Settling:
    """The course of one layer, or of one modality in it."""

    points: tuple[Point, ...]
    turns: tuple[Turn, ...]
    num_tokens: int


def settle(steps: Sequence[int], blocks: Iterable[Sequence[Chosen]]) -> Settling:
    """Return the course of routing.

    Args:
        steps: optimiser steps of the checkpoints, growing; the last is the end.
        blocks: for each block of tokens its choices at every checkpoint.

    Raises:
        UserError: there are no tokens.
    """
    sums: _Sums | None = None
    for block in blocks:
        if sums is None:
            sums = _Sums(len(steps), block[-1].shape[1])
        sums.add(block)
    if sums is None or not sums.num_tokens:
        raise UserError("the probe has no token that this layer routes: choose samples of the modality that it is for")
    loads = sums.load_SE / np.maximum(sums.load_SE.sum(axis=1, keepdims=True), 1)
    is_alive_SE = loads >= DEAD / loads.shape[1]
    points = tuple(
        Point(
            step,
            float(sums.final_S[number]),
            float(sums.chance_S[number]),
            float(sums.changed_S[number]) if number else None,
            int(is_alive_SE[number].sum()),
            tuple(loads[number].tolist()),
        )
        for number, step in enumerate(steps)
    )
    turns = tuple(
        Turn(steps[number], int(expert), "birth" if is_alive_SE[number, expert] else "death")
        for number in range(1, len(steps))
        for expert in np.flatnonzero(is_alive_SE[number] != is_alive_SE[number - 1])
    )
    return Settling(points, turns, sums.num_tokens)


def overlap(chosen_TE: Chosen, reference_TE: Chosen) -> NDArray[np.float64]:
    """Return for each token that has any the share of a reference's choices that are made, (T)."""
    count_T = reference_TE.sum(axis=1)
    return (chosen_TE & reference_TE).sum(axis=1)[count_T > 0] / count_T[count_T > 0]


class _Sums:
    """Sums over tokens, of S checkpoints and E experts."""

    def __init__(self, num_steps: int, num_experts: int) -> None:
        self.load_SE = np.zeros((num_steps, num_experts))
        self.num_tokens = 0
        self._wanted_E = np.zeros(num_experts)
        self._final = np.zeros((num_steps, 2))  # sum and number
        self._kept = np.zeros((num_steps, 2))

    def add(self, block: Sequence[Chosen]) -> None:
        final_TE = block[-1]
        self.num_tokens += len(final_TE)
        count_T1 = final_TE.sum(axis=1, keepdims=True)
        self._wanted_E += (final_TE / np.maximum(count_T1, 1)).sum(axis=0)
        for number, chosen_TE in enumerate(block):
            self.load_SE[number] += chosen_TE.sum(axis=0)
            self._final[number] += _sum_and_number(overlap(chosen_TE, final_TE))
            if number:
                self._kept[number] += _sum_and_number(overlap(chosen_TE, block[number - 1]))

    @property
    def final_S(self) -> NDArray[np.float64]:
        return _means(self._final)

    @property
    def changed_S(self) -> NDArray[np.float64]:
        return 1 - _means(self._kept)

    @property
    def chance_S(self) -> NDArray[np.float64]:
        """Sum over experts of how often the end wants one and how often a token has it, independently."""
        wanted_E = self._wanted_E / max(1.0, self._wanted_E.sum())
        return (self.load_SE / self.num_tokens) @ wanted_E


def _sum_and_number(values: NDArray[np.float64]) -> tuple[float, int]:
    return float(values.sum()), len(values)


def _means(sums_S2: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(sums_S2[:, 1] > 0, sums_S2[:, 0] / np.maximum(sums_S2[:, 1], 1), 1.0)
