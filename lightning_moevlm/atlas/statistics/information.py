"""Computes entropies and mutual information from counts. In nats, with 0 ln 0 = 0.

    I(E; V)    = sum_ev p(e, v) ln [p(e, v) / (p(e) p(v))]          of experts and the values of a label
    I(1_e; V)  = the same of "is it expert e?" and the values
    NMI        = I / min(H of one, H of the other)                  1: one determines the other; 0: independent

The mean of NMI over null draws is not 0, so it is read beside its p.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Information(NamedTuple):
    """Of counts (..., E, V)."""

    whole: Floats
    """I(E; V), (...)."""
    of_expert_E: Floats
    """I(1_e; V), (..., E)."""


def mutual_information(counts_EV: Floats) -> Information:
    """Return the information in counts (..., E, V), which may be shares of tokens."""
    total = counts_EV.sum(axis=(-2, -1), keepdims=True)
    joint_EV = counts_EV / np.maximum(total, np.finfo(np.float64).tiny)
    expert_E, value_V = joint_EV.sum(-1, keepdims=True), joint_EV.sum(-2, keepdims=True)
    own_EV = _part(joint_EV, expert_E * value_V)
    others_EV = _part(value_V - joint_EV, (1 - expert_E) * value_V)
    return Information(own_EV.sum(axis=(-2, -1)), (own_EV + others_EV).sum(-1))


def entropy(counts: Floats) -> Floats:
    """Return the entropy of counts along the last axis; 0 without counts."""
    share = counts / np.maximum(counts.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    return -_part(share, np.ones_like(share)).sum(-1)


def normalise(information: Floats, first: Floats, second: Floats) -> Floats:
    """Return information over the smaller of two entropies; 0 where that is 0."""
    least = np.minimum(first, second)
    return np.divide(information, least, out=np.zeros_like(np.broadcast_arrays(information, least)[0]), where=least > 0)


def _part(share: Floats, expected: Floats) -> Floats:
    """Return share ln(share / expected), 0 where share is 0."""
    is_there = share > 1e-15
    ratio = np.divide(share, expected, out=np.ones_like(share), where=is_there & (expected > 0))
    return np.where(is_there, share * np.log(ratio), 0.0)
