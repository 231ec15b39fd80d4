"""Tests whether experts of a layer prefer values of a label, and by how much.

    share       tokens of a value among those of an expert
    base        tokens of that value among all that the layer saw: what a blind expert has
    lift        share / base, with a 95 % interval that takes samples as clusters (Taylor linearisation of the log,
                Binder 1983), since tokens of one sample are not independent
    NMI, p      of "is it this expert?" and the label; p is the largest over the label's null models

A token counts once for each expert that it chose.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_moevlm.atlas.labels.label import OTHER, UNKNOWN, Label, Null
from lightning_moevlm.atlas.routing.trace import Trace, TracedLayer
from lightning_moevlm.atlas.statistics.information import Floats, entropy, mutual_information, normalise
from lightning_moevlm.atlas.statistics.null_models import (
    BlockPairs,
    Shape,
    draw_samples,
    draw_shifts,
    draw_units,
    tabulate,
)
from lightning_moevlm.atlas.statistics.p_values import permutation_p

BLOCK = 64
"""Samples among which labels move."""
MOST_TESTED = 128
"""Values of a label; the rarest share one."""
_QUANTILE = float(stats.norm.ppf(0.975))
_AT_ONCE = 4_000_000  # cells of null tables


@dataclass(frozen=True)
class Specialisation:
    """What the experts of a layer have to do with a label; E experts, V values."""

    label: Label
    values: tuple[str, ...]
    counts_EV: Floats
    """Weight of chosen pairs."""
    lift_EV: Floats
    low_EV: Floats
    high_EV: Floats
    """The interval of the lift; NaN where an expert has no token of the value."""
    nmi: float
    """Of the layer's experts and the label."""
    nmi_by_chance: float
    """The largest mean of a null model."""
    p: float
    """Of the layer."""
    nmi_E: Floats
    bits_E: Floats
    """Information of "is it this expert?" and the label, over the layer's tokens that have the label."""
    p_E: Floats
    """Not corrected."""
    p_of_null: dict[Null, Floats]
    """By null model, (E,)."""


def specialise(
    trace: Trace, layer: TracedLayer, label: Label, names: tuple[str, ...], draws: int, seed: int
) -> Specialisation | None:
    """Test one label in one layer; None where it has fewer than two values or no pair.

    Args:
        trace: labels and choices.
        layer: of the trace.
        label: of the trace.
        names: values of the label by code.
        draws: of each null model.
        seed: of the draws.
    """
    full = _count(_pairs(trace, layer, label, None), Shape(layer.num_experts, max(1, len(names))))
    by_value = full.sum(axis=0)
    order = np.argsort(-by_value, kind="stable")
    kept = order[: np.count_nonzero(by_value)]
    if len(kept) < 2 or layer.num_experts < 2:
        return None
    values = tuple(names[code] for code in kept)
    to_tested = np.full(len(names), -1, np.int64)
    to_tested[kept] = np.minimum(np.arange(len(kept)), MOST_TESTED - 1)
    if len(kept) > MOST_TESTED:
        values = (*values[: MOST_TESTED - 1], OTHER)
    shape = Shape(layer.num_experts, len(values))
    counts_EV = _count(_pairs(trace, layer, label, to_tested), shape)
    found, expert_entropy, value_entropy = (
        mutual_information(counts_EV),
        entropy(counts_EV.sum(1)),
        entropy(counts_EV.sum(0)),
    )
    p_of_null: dict[Null, Floats] = {}
    p_whole, by_chance = 0.0, 0.0
    for place, null in enumerate(label.beyond):
        generator = np.random.default_rng([seed, layer.block, place])
        drawn = _draw(trace, layer, label, to_tested, null, shape, draws, generator)
        step = max(1, _AT_ONCE // (shape.experts * shape.values))
        parts = [mutual_information(drawn[start : start + step]) for start in range(0, draws, step)]
        whole_B, of_expert_BE = (
            np.concatenate([each.whole for each in parts]),
            np.concatenate([each.of_expert_E for each in parts]),
        )
        p_of_null[null] = permutation_p(found.of_expert_E, of_expert_BE)
        p_whole = max(p_whole, float(permutation_p(found.whole, whole_B)))
        by_chance = max(by_chance, float(whole_B.mean()))
    lift_EV, low_EV, high_EV = _lifts(_pairs(trace, layer, label, to_tested), counts_EV, shape)
    least = np.minimum(expert_entropy, value_entropy)
    share_E = counts_EV.sum(1) / counts_EV.sum()
    binary_E = entropy(np.stack([share_E, 1 - share_E], axis=-1))
    return Specialisation(
        label, values, counts_EV, lift_EV, low_EV, high_EV,
        float(normalise(found.whole, expert_entropy, value_entropy)),
        by_chance / float(least) if least > 0 else 0.0,
        p_whole,
        normalise(found.of_expert_E, binary_E, np.broadcast_to(value_entropy, binary_E.shape)),
        found.of_expert_E / np.log(2),
        np.max(list(p_of_null.values()), axis=0),
        p_of_null,
    )  # fmt: skip


def _draw(
    trace: Trace,
    layer: TracedLayer,
    label: Label,
    to_tested: NDArray[np.int64],
    null: Null,
    shape: Shape,
    draws: int,
    generator: np.random.Generator,
) -> Floats:
    if null in (Null.SAMPLES, Null.SHIFTS):
        draw = draw_samples if null == Null.SAMPLES else draw_shifts
        return draw(_pairs(trace, layer, label, to_tested), shape, draws, generator)
    by_expert: dict[int, Floats] = {}
    by_value: dict[int, Floats] = {}
    rows = list(trace.blocks(BLOCK))
    for block, pairs in zip(rows, _pairs(trace, layer, label, to_tested), strict=True):
        units, unit_N = np.unique(trace.unit(null, block)[pairs.row_N, pairs.position_N], return_inverse=True)
        code_N = pairs.code_BS[pairs.row_N, pairs.position_N]
        expert_UE = tabulate(unit_N, pairs.expert_N, pairs.weight_N, Shape(len(units), shape.experts))
        value_UV = tabulate(unit_N, code_N, pairs.weight_N, Shape(len(units), shape.values))
        for unit, expert_E, value_V in zip(units.tolist(), expert_UE, value_UV, strict=True):
            # copies: a row would keep the tables of its whole block
            by_expert[unit] = by_expert[unit] + expert_E if unit in by_expert else expert_E.copy()
            by_value[unit] = by_value[unit] + value_V if unit in by_value else value_V.copy()
    return draw_units(np.stack([*by_expert.values()]), np.stack([*by_value.values()]), draws, generator)


def _pairs(trace: Trace, layer: TracedLayer, label: Label, to_tested: NDArray[np.int64] | None) -> Iterator[BlockPairs]:
    """Yield the pairs of each block. to_tested: the tested value of each code; None: the codes themselves."""
    for rows in trace.blocks(BLOCK):
        code_BS = trace.label(label.name, rows).astype(np.int64)
        known_BS = trace.seen(layer, rows) & (code_BS != UNKNOWN)
        if to_tested is not None:
            code_BS = np.where(known_BS, to_tested[code_BS], 0)
        chosen_BSE = trace.chosen(layer, rows) * known_BS[..., None]
        row_N, position_N, expert_N = np.nonzero(chosen_BSE)
        weight_N = chosen_BSE[row_N, position_N, expert_N].astype(np.float64)
        yield BlockPairs(known_BS, code_BS, row_N, position_N, expert_N, weight_N)


def _count(blocks: Iterator[BlockPairs], shape: Shape) -> Floats:
    total = np.zeros(shape)
    for block in blocks:
        total += tabulate(block.expert_N, block.code_BS[block.row_N, block.position_N], block.weight_N, shape)
    return total


def _lifts(blocks: Iterator[BlockPairs], counts_EV: Floats, shape: Shape) -> tuple[Floats, Floats, Floats]:
    total, expert_E, value_V = counts_EV.sum(), counts_EV.sum(1), counts_EV.sum(0)
    variance_EV, num_samples = np.zeros(shape), 0
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_EV = counts_EV * total / (expert_E[:, None] * value_V)
        for block in blocks:
            code_N = block.code_BS[block.row_N, block.position_N]
            cell_N = (block.row_N * shape.experts + block.expert_N) * shape.values + code_N
            size = len(block.known_BS) * shape.experts * shape.values
            own_BEV = np.bincount(cell_N, weights=block.weight_N, minlength=size).reshape(-1, *shape)
            influence_BEV = (
                own_BEV / counts_EV
                - (own_BEV.sum(2) / expert_E)[:, :, None]
                - (own_BEV.sum(1) / value_V)[:, None]
                + (own_BEV.sum((1, 2)) / total)[:, None, None]
            )
            variance_EV += np.square(influence_BEV).sum(axis=0)
            num_samples += int(block.known_BS.any(axis=1).sum())
        half_EV = _QUANTILE * np.sqrt(variance_EV * num_samples / max(1, num_samples - 1))
        return np.nan_to_num(lift_EV), lift_EV * np.exp(-half_EV), lift_EV * np.exp(half_EV)
