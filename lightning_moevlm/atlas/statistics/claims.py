"""Decides what is said of an expert.

An expert *serves* a value of a label if its p for the label, after Holm over all experts, layers and labels of the
atlas, is at most ALPHA, and the interval of the value's lift lies above 1. Of the values of a label the one that adds
most to the information is named. Of several labels the most general comes first, that is the one that beats the most
null models, as long as it has half of the information that the strongest has over all tokens of the layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_moevlm.atlas.labels.label import BY_NAME
from lightning_moevlm.atlas.statistics.information import Floats
from lightning_moevlm.atlas.statistics.specialisation import Specialisation
from lightning_moevlm.study.statistics.paired_tests import holm

ALPHA = 0.01
"""Chance of any false claim in an atlas."""


class Claim(NamedTuple):
    """A value that an expert serves."""

    label: str
    value: str
    share: float
    base: float
    lift: float
    low: float
    high: float
    nmi: float
    bits: float
    """Information over all tokens of the layer."""
    p: float
    """After Holm."""


def adjust(results: Sequence[Specialisation]) -> list[Floats]:
    """Return the p of every expert in each result, after Holm over all of them."""
    names = {(number, expert): f"{number}/{expert}" for number, each in enumerate(results) for expert in _of(each)}
    adjusted = holm({name: float(results[number].p_E[expert]) for (number, expert), name in names.items()})
    values = {place: adjusted[name] for place, name in names.items()}
    return [
        np.array([1.0 if (p := values[number, expert]) is None else p for expert in _of(each)])
        for number, each in enumerate(results)
    ]


def claims_of(
    expert: int, results: Sequence[Specialisation], adjusted: Sequence[Floats], num_pairs: float
) -> tuple[Claim, ...]:
    """Return what an expert of a layer serves, one claim a label.

    Args:
        expert: its number.
        results: of the layer.
        adjusted: the p of each expert in each result.
        num_pairs: chosen pairs of the layer.
    """
    found: list[Claim] = []
    for each, p_E in zip(results, adjusted, strict=True):
        if p_E[expert] > ALPHA:
            continue
        counts_V = each.counts_EV[expert]
        above = np.nan_to_num(each.low_EV[expert]) > 1
        if not above.any():
            continue
        added = np.where(above, counts_V * np.log(np.maximum(each.lift_EV[expert], 1e-12)), -np.inf)
        best = int(added.argmax())
        total, base_V = each.counts_EV.sum(), each.counts_EV.sum(0)
        found.append(
            Claim(
                each.label.name,
                each.values[best],
                float(counts_V[best] / counts_V.sum()),
                float(base_V[best] / total),
                float(each.lift_EV[expert, best]),
                float(each.low_EV[expert, best]),
                float(each.high_EV[expert, best]),
                float(each.nmi_E[expert]),
                float(each.bits_E[expert] * total / max(num_pairs, 1e-20)),
                float(p_E[expert]),
            )
        )
    strongest = max((claim.bits for claim in found), default=0.0)

    def rank(claim: Claim) -> tuple[bool, int, float]:
        return claim.bits >= strongest / 2, len(BY_NAME[claim.label].beyond), claim.bits

    return tuple(sorted(found, key=rank, reverse=True))


def _of(result: Specialisation) -> range:
    return range(len(result.p_E))
