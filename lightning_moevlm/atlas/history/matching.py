"""How much of the division of labour repeats in another seed: experts matched by the tokens that they serve.

    overlap(i, j) = tokens that expert i of one run and expert j of the other both serve
    matching      = the one-to-one assignment with the largest sum of overlaps (Hungarian method)
    agreement     = that sum / choices of the first run
    loads         = agreement after the tokens of the second run are permuted, and matched anew: what loads alone give
    positions     = the same, permuted among tokens at the same position: what loads and positions give
    repeats       = (agreement - mean of a null) / (1 - mean of that null); 0 is chance, 1 the same experts

Numbers of experts mean nothing across seeds, so experts are matched first. The matching is fitted to the data; so is
each draw of a null, which makes the comparison fair.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from lightning_moevlm.atlas.history.settling import Chosen


@dataclass(frozen=True)
class Null:
    """Agreement that chance gives."""

    mean: float
    p: float
    """Share of draws with at least the observed agreement, the observed one counted."""
    repeats: float
    """Agreement beyond chance, as a share of what is possible."""


@dataclass(frozen=True)
class Agreement:
    """Two runs compared in one layer and modality."""

    partner: tuple[int, ...]
    """Expert of the second run for each of the first."""
    shared: tuple[float, ...]
    """Share of each expert's tokens that its partner serves too; 0 for an expert without tokens."""
    agreement: float
    loads: Null
    positions: Null
    num_tokens: int


def match_experts(
    first_TE: Chosen, second_TE: Chosen, position_T: NDArray[np.int64], draws: int = 199, seed: int = 0
) -> Agreement:
    """Match the experts of two runs.

    Args:
        first_TE: choices of one run.
        second_TE: choices of the other, for the same tokens in the same order.
        position_T: position of each token in its sample.
        draws: of each null; the least p is 1 / (draws + 1).
        seed: of the draws.
    """
    assert len(first_TE) == len(second_TE) == len(position_T), "the same tokens"
    generator = np.random.default_rng(seed)
    mine_TE, theirs_TE = first_TE.astype(np.float32), second_TE.astype(np.float32)
    total = max(float(mine_TE.sum()), 1.0)
    overlap_EE = mine_TE.T @ theirs_TE
    rows, columns = linear_sum_assignment(overlap_EE, maximize=True)
    agreement = float(overlap_EE[rows, columns].sum()) / total
    partner_E = np.full(mine_TE.shape[1], -1)
    shared_E = np.zeros(mine_TE.shape[1])
    partner_E[rows] = columns
    shared_E[rows] = overlap_EE[rows, columns] / np.maximum(mine_TE.sum(axis=0)[rows], 1.0)
    order = np.argsort(position_T, kind="stable")

    def null(permute: Callable[[], NDArray[np.int64]]) -> Null:
        return _null(agreement, np.array([_best(mine_TE, theirs_TE[permute()]) / total for _ in range(draws)]))

    loads = null(lambda: generator.permutation(len(mine_TE)))
    positions = null(lambda: _permute(position_T, order, generator))
    return Agreement(tuple(partner_E.tolist()), tuple(shared_E.tolist()), agreement, loads, positions, len(mine_TE))


def _permute(
    position_T: NDArray[np.int64], order: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return a permutation of the tokens that keeps every position. order: tokens sorted by position."""
    shuffled = np.lexsort((generator.random(len(position_T)), position_T))
    found = np.empty_like(order)
    found[order] = shuffled
    return found


def _best(mine_TE: NDArray[np.float32], theirs_TE: NDArray[np.float32]) -> float:
    overlap_EE = mine_TE.T @ theirs_TE
    return float(overlap_EE[linear_sum_assignment(overlap_EE, maximize=True)].sum())


def _null(agreement: float, drawn: NDArray[np.float64]) -> Null:
    mean = float(drawn.mean()) if len(drawn) else 0.0
    p = float((1 + (drawn >= agreement - 1e-9).sum()) / (1 + len(drawn)))
    return Null(mean, p, (agreement - mean) / max(1 - mean, 1e-9))
