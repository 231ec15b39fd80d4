"""Keeps, for every expert, the patches and words that it is given the largest weight for.

At most one patch of an image, one word of a sample, and two of a word, so that a gallery shows what an expert takes and
not one image of it. Equal weights, as of a hash router, are drawn.
"""

import zlib
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.atlas.labels.words import Words
from lightning_moevlm.atlas.routing.route import LayerChoices, RoutedBatch
from lightning_moevlm.contracts.routing_plan import Modality

SHOWN = 12
_OF_A_WORD = 2
_AROUND = 6  # words


class TopPatch(NamedTuple):
    """A patch of a gallery."""

    weight: float
    draw: float
    source: str
    key: str
    """Of the sample."""
    patch: int
    caption: str
    image: int
    """Checksum of its pixels: several questions may be about one image."""


class TopWord(NamedTuple):
    """A word in its context."""

    weight: float
    draw: float
    source: str
    key: str
    before: str
    word: str
    after: str


@dataclass
class TopTokens:
    """Those of one expert, best first."""

    patches: list[TopPatch]
    words: list[TopWord]


class TopTokenKeeper:
    """Keeps the best tokens over the batches of a probe.

    Args:
        patches: number of positions of an image.
        seed: draws between equal weights.
    """

    def __init__(self, patches: int, seed: int) -> None:
        self._patches, self._random = patches, Random(f"gallery/{seed}")
        self._kept: dict[tuple[str, int], TopTokens] = {}

    def add(self, routed: RoutedBatch) -> None:
        """Look at a batch."""
        modality_S = torch.from_numpy(routed.labels.modality_S)
        for layer in routed.layers:
            for modality in Modality:
                seen_BS = layer.seen_BS & (modality_S == modality)
                if seen_BS.any():
                    self._add(routed, layer, modality, seen_BS)

    def of_expert(self, layer: str, expert: int) -> TopTokens:
        """Return the best tokens of an expert."""
        return self._kept.get((layer, expert), TopTokens([], []))

    def shown_samples(self) -> set[tuple[str, str]]:
        """Return source and key of every sample whose image is shown."""
        return {(each.source, each.key) for kept in self._kept.values() for each in kept.patches}

    def _add(self, routed: RoutedBatch, layer: LayerChoices, modality: Modality, seen_BS: Tensor) -> None:
        weight_BSE = torch.where(seen_BS.unsqueeze(-1) & (layer.chosen_BSE > 0), layer.weight_BSE, -1.0)
        best_BE, position_BE = weight_BSE.max(dim=1)
        batch, source = routed.probe.batch, routed.probe.source
        for expert in range(best_BE.shape[1]):
            kept = self._kept.setdefault((layer.layer, expert), TopTokens([], []))
            pool: list[TopPatch] | list[TopWord] = kept.patches if modality == Modality.IMAGE else kept.words
            least = pool[-1].weight if len(pool) == SHOWN else -0.5
            for row in (best_BE[:, expert] >= max(least, 0.0)).nonzero().flatten().tolist():
                weight, position = float(best_BE[row, expert]), int(position_BE[row, expert])
                key, draw, text = batch.keys[row], self._random.random(), routed.probe.texts[row]
                if modality == Modality.IMAGE:
                    assert batch.images_BRYX is not None
                    image = zlib.crc32(batch.images_BRYX[row].numpy().tobytes())
                    kept.patches.append(TopPatch(weight, draw, source, key, position, text, image))
                else:
                    words = routed.labels.words[row]
                    assert words is not None
                    kept.words.append(TopWord(weight, draw, source, key, *_context(words, position - self._patches)))
            kept.patches.sort(reverse=True)
            kept.words.sort(reverse=True)
            kept.patches = one_of_each_image(kept.patches)
            kept.words = _varied(kept.words)


def one_of_each_image(patches: list[TopPatch]) -> list[TopPatch]:
    """Return the first of each image, as many as are shown."""
    first: dict[int, TopPatch] = {}
    for each in patches:
        first.setdefault(each.image, each)
    return [*first.values()][:SHOWN]


def _varied(words: list[TopWord]) -> list[TopWord]:
    said = Counter[str]()
    chosen = []
    for each in words:
        said[each.word] += 1
        if said[each.word] <= _OF_A_WORD:
            chosen.append(each)
    return chosen[:SHOWN]


def _context(words: Words, position: int) -> tuple[str, str, str]:
    """Return the words before a token's word, the word, and those after it."""
    number = words.of_token[position]
    if number is None:  # a control token or an answer: what stands around it are tokens
        before, after = words.tokens[max(0, position - _AROUND) : position], words.tokens[position + 1 :]
        return " ".join(before), words.tokens[position], " ".join(after[:_AROUND])
    before, after = words.words[max(0, number - _AROUND) : number], words.words[number + 1 :]
    return " ".join(before), words.words[number], " ".join(after[:_AROUND])
