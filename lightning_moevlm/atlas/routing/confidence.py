"""Measures how sure the routers are.

top         mean over tokens of the largest probability
entropy     mean over tokens of H(p) / ln E          1: undecided, 0: certain
histogram   share of tokens by their largest probability, in ten parts of 0 to 1
weight      mean combine weight of the pairs of an expert; above 1 perhaps, where a router scales its weights
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moevlm.atlas.routing.route import RoutedBatch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.metrics.routing import entropy

_PARTS = 10


@dataclass(frozen=True)
class Confidence:
    """Of the tokens of one modality in one layer."""

    num_tokens: int
    top: float
    entropy: float
    histogram: tuple[float, ...]


@dataclass(frozen=True)
class LayerConfidence:
    """Of a layer."""

    of_modality: dict[str, Confidence]
    pairs_E: tuple[float, ...]
    """Chosen pairs of each expert."""
    weight_E: tuple[float, ...]
    """Their mean weight."""


class ConfidenceMeter:
    """Sums over the batches of a probe."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, Modality], Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, routed: RoutedBatch) -> None:
        """Measure a batch."""
        modality_S = torch.from_numpy(routed.labels.modality_S)
        for each in routed.layers:
            num_experts = each.probs_BSE.shape[-1]
            for modality in Modality:
                probs_TE = each.probs_BSE[each.seen_BS & (modality_S == modality)].double()
                if not len(probs_TE):
                    continue
                probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp(min=1e-20)
                top_T = probs_TE.amax(-1)
                part_T = (top_T * _PARTS).long().clamp(0, _PARTS - 1)
                histogram = torch.bincount(part_T, minlength=_PARTS).double()
                share_T = entropy(probs_TE) / max(math.log(num_experts), 1e-12)
                sums = torch.cat([torch.tensor([len(top_T), top_T.sum(), share_T.sum()]).double(), histogram])
                key = (each.layer, modality)
                self._sums[key] = self._sums[key] + sums if key in self._sums else sums
            pair_E, weight_E = each.chosen_BSE.sum((0, 1)).double(), each.weight_BSE.sum((0, 1)).double()
            both = torch.stack([pair_E, weight_E])
            self._weights[each.layer] = self._weights[each.layer] + both if each.layer in self._weights else both

    def of_layer(self, layer: str) -> LayerConfidence:
        """Return the means of a layer."""
        found: dict[str, Confidence] = {}
        for modality in Modality:
            sums = self._sums.get((layer, modality))
            if sums is not None:
                count, top, undecided, *histogram = sums.tolist()
                parts = tuple(each / count for each in histogram)
                found[modality.label] = Confidence(int(count), top / count, undecided / count, parts)
        pair_E, weight_E = self._weights[layer]
        mean_E = weight_E / pair_E.clamp(min=1e-20)
        return LayerConfidence(found, tuple(pair_E.tolist()), tuple(mean_E.tolist()))
