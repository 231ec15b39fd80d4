"""Counts which experts serve the same tokens, within a layer and in two layers."""

from collections.abc import Mapping
from itertools import combinations_with_replacement

import numpy as np

from lightning_moevlm.atlas.routing.trace import Trace
from lightning_moevlm.atlas.statistics.information import Floats
from lightning_moevlm.atlas.statistics.specialisation import BLOCK


def count_together(trace: Trace) -> Mapping[tuple[int, int], Floats]:
    """Return, for each pair of layers (by number, the first no later), the tokens of each two experts, (E, E').

    The diagonal of a layer with itself has the tokens of each expert. Tokens that one of the layers does not see do not
    count.
    """
    pairs = list(combinations_with_replacement(range(len(trace.layers)), 2))
    found = {(i, j): np.zeros((trace.layers[i].num_experts, trace.layers[j].num_experts)) for i, j in pairs}
    for rows in trace.blocks(BLOCK):
        chosen = [trace.chosen(layer, rows).reshape(-1, layer.num_experts) for layer in trace.layers]
        seen = [trace.seen(layer, rows).ravel() for layer in trace.layers]
        for i, j in pairs:
            both = seen[i] & seen[j]
            found[i, j] += chosen[i][both].T @ chosen[j][both]
    return found
