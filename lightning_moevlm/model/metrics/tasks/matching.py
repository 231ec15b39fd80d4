"""Accuracy and AUC of image-text matching on a fixed part of a set, with hard negatives from all of that part.

The part are the pairs whose keys have the smallest hashes, so it depends neither on the batch size nor on the ranks.
Every pair gives one decision that it matches, and two that it does not: with a negative text and a negative image. The
majority baseline says no to everything. AUC is the probability that a match scores above a mismatch; it is 0.5 by
chance.
"""

import heapq
from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import Embeddings, Match, ObjectiveOutput, Term
from lightning_moevlm.model.metrics.gather import gather_objects, own_share
from lightning_moevlm.model.metrics.measure import Measure, Measured

_ROWS = 32  # pairs judged at a time; three passes each


class _Kept(NamedTuple):
    """A pair on the CPU."""

    key: str
    image_RYX: Tensor
    text_L: Tensor
    text_mask_L: Tensor
    image_D: Tensor
    text_D: Tensor
    image_id: int
    text_id: int


class MatchingScores(Measure):
    """Keeps pairs during an epoch, and matches them at its end.

    Args:
        num_pairs: largest number to keep.
        negatives: of each pair the row of a text, the row of an image, and whether it has any.
        term: name and term of the task over the kept pairs, of logits (3, N) and whether a pair has negatives.
    """

    alone = "image-text matching"

    def __init__(
        self,
        num_pairs: int,
        negatives: Callable[[Embeddings], tuple[Tensor, Tensor, Tensor]],
        term: Callable[[Tensor, Tensor], tuple[str, Term]],
    ) -> None:
        self._num_pairs = num_pairs
        self._negatives = negatives
        self._term = term
        self._kept: dict[int, _Kept] = {}  # by hash of the key
        self._match: Match | None = None

    def update(self, output: ObjectiveOutput) -> None:
        """Keep the pairs of one batch whose hashes are among the smallest so far."""
        matchable, embeddings = output.matchable, output.embeddings
        if matchable is None or embeddings is None:
            return
        pairs, self._match = matchable
        images, texts, masks = pairs.images_BRYX, pairs.text_BL, pairs.text_mask_BL
        assert images is not None and texts is not None and masks is not None
        hashes = {_hash(key): row for row, key in enumerate(embeddings.keys)}
        smallest = set(heapq.nsmallest(self._num_pairs, [*self._kept, *hashes]))
        self._kept = {number: pair for number, pair in self._kept.items() if number in smallest}
        for number in smallest & hashes.keys():
            row = hashes[number]
            self._kept[number] = _Kept(
                embeddings.keys[row],
                images[row].cpu().clone(),
                texts[row].cpu().clone(),
                masks[row].cpu().clone(),
                embeddings.image_ND[row].clone(),
                embeddings.text_ND[row].clone(),
                embeddings.image_ids[row],
                embeddings.text_ids[row],
            )

    @torch.no_grad()
    def compute(self, stage: str) -> Measured:
        """Return the scores and the loss; nothing without pairs."""
        hashes = [number for of_rank in gather_objects(list(self._kept)) for number in of_rank]
        smallest = set(heapq.nsmallest(self._num_pairs, hashes))
        chosen = {number: pair for number, pair in self._kept.items() if number in smallest}
        everyone = {number: pair for of_rank in gather_objects(chosen) for number, pair in of_rank.items()}
        if not everyone:
            return Measured()
        pairs = [everyone[number] for number in sorted(everyone)]
        keys, images, texts, masks, image_D, text_D, image_ids, text_ids = zip(*pairs, strict=True)
        text_N, image_N, has_negative_N = self._negatives(
            Embeddings(keys, torch.stack(image_D), torch.stack(text_D), image_ids, text_ids)
        )
        own: dict[int, Tensor] = {}
        rows = own_share(range(len(pairs)), able=self._match is not None)
        for start in range(0, len(rows), _ROWS):
            asked = rows[start : start + _ROWS]
            with_texts = [*asked, *text_N[asked].tolist(), *asked]
            with_images = [*asked, *asked, *image_N[asked].tolist()]
            assert self._match is not None
            logits_3B = self._match(
                torch.stack([images[row] for row in with_images]),
                torch.stack([texts[row] for row in with_texts]),
                torch.stack([masks[row] for row in with_texts]),
            ).view(3, -1)
            own |= dict(zip(asked, logits_3B.float().cpu().unbind(dim=1), strict=True))
        found = {row: logits_3 for of_rank in gather_objects(own) for row, logits_3 in of_rank.items()}
        logits_3N = torch.stack([found[row] for row in range(len(pairs))], dim=1)
        name, term = self._term(logits_3N, has_negative_N)
        values = {family.key(stage=stage): value for family, value in _scores(logits_3N, has_negative_N).items()}
        return Measured(values, {name: term})

    def reset(self) -> None:
        """Forget all batches."""
        self._kept, self._match = {}, None


def _scores(logits_3N: Tensor, has_negative_N: Tensor) -> dict[metric_keys.MetricKey, float]:
    matching_N, other_M = logits_3N[0], logits_3N[1:, has_negative_N].flatten()
    number = len(matching_N) + len(other_M)
    right = int((matching_N > 0).sum() + (other_M <= 0).sum())
    truth = torch.cat([torch.ones_like(matching_N), torch.zeros_like(other_M)]).long()
    values = {
        metric_keys.MATCHING_ACCURACY: right / number,
        metric_keys.MATCHING_MAJORITY: max(len(matching_N), len(other_M)) / number,
    }
    if len(other_M):
        values[metric_keys.MATCHING_AUC] = float(binary_auroc(torch.cat([matching_N, other_M]), truth))
    return values


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
