"""Recall of image-text retrieval over a whole set, as COCO and Flickr30k report it (arXiv 1411.2539, section 4).

    recall@k = share of the queries that have one of their own answers among the k most similar candidates

Every text of an image is an answer to it, and every image of a text. A candidate that ties with the best answer ranks
before it, so features that are all alike recall nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import Embeddings, ObjectiveOutput, Term
from lightning_moevlm.model.metrics.gather import gather_objects
from lightning_moevlm.model.metrics.measure import Measure, Measured

AT = (1, 5, 10)
_QUERIES = 1024  # at a time


class Recall(NamedTuple):
    """Recall of one direction at one k, with what ranking at random would reach."""

    direction: str
    at: int
    recall: float
    chance: float


class RetrievalRecalls(Measure):
    """Keeps the embeddings of an epoch and compares all of them.

    Args:
        terms: terms of the task over the whole set.
    """

    alone = "retrieval over the whole evaluation set"

    def __init__(self, terms: Callable[[Embeddings], Mapping[str, Term]]) -> None:
        self._terms = terms
        self._own: list[Embeddings] = []

    def update(self, output: ObjectiveOutput) -> None:
        """Keep the embeddings of one batch."""
        if output.embeddings is not None:
            self._own.append(output.embeddings)

    def compute(self, stage: str) -> Measured:
        """Return the recalls beside chance, and the terms."""
        embeddings = gather_embeddings(self._own)
        if embeddings is None:
            return Measured()
        values: dict[str, float] = {}
        for found in retrieval_recalls(embeddings):
            where: dict[str, str | int] = {"stage": stage, "k": found.at, "direction": found.direction}
            values[metric_keys.RECALL.key(**where)] = found.recall
            values[metric_keys.CHANCE_RECALL.key(**where)] = found.chance
        return Measured(values, self._terms(embeddings))

    def reset(self) -> None:
        """Forget all batches."""
        self._own = []


def retrieval_recalls(embeddings: Embeddings) -> list[Recall]:
    """Return recalls both ways; equal images count as one candidate, as do equal texts."""
    image_MD, image_N = _select_unique(embeddings.image_ids, embeddings.image_ND)
    text_MD, text_N = _select_unique(embeddings.text_ids, embeddings.text_ND)
    pairs = sorted(set(zip(image_N, text_N, strict=True)))
    images, texts = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return [
        *_direction("image_to_text", image_MD, text_MD, images, texts),
        *_direction("text_to_image", text_MD, image_MD, texts, images),
    ]


def join_embeddings(parts: Sequence[Embeddings]) -> Embeddings:
    """Return the samples of all parts in the order of their keys, each once."""
    keys = [key for part in parts for key in part.keys]
    place = {key: index for index, key in enumerate(keys)}
    order = [place[key] for key in sorted(place)]
    image_ids = [each for part in parts for each in part.image_ids]
    text_ids = [each for part in parts for each in part.text_ids]
    return Embeddings(
        tuple(keys[index] for index in order),
        torch.cat([part.image_ND for part in parts])[order],
        torch.cat([part.text_ND for part in parts])[order],
        tuple(image_ids[index] for index in order),
        tuple(text_ids[index] for index in order),
    )


def gather_embeddings(own: Sequence[Embeddings]) -> Embeddings | None:
    """Return the embeddings of all ranks, or None; all ranks must call it together."""
    parts = [part for of_rank in gather_objects(list(own)) for part in of_rank]
    return join_embeddings(parts) if parts else None


def _select_unique(ids: Sequence[int], values_ND: Tensor) -> tuple[Tensor, list[int]]:
    """Return one row per id, and the row of each sample."""
    row = {each: index for index, each in enumerate(dict.fromkeys(ids))}
    first = {each: index for index, each in reversed(list(enumerate(ids)))}
    return values_ND[[first[each] for each in row]], [row[each] for each in ids]


def _direction(name: str, query_QD: Tensor, candidate_CD: Tensor, queries: Tensor, answers: Tensor) -> list[Recall]:
    """queries, answers: rows of query and candidate that belong together, each pair once."""
    rank_Q = torch.empty(len(query_QD), dtype=torch.int64)
    for start in range(0, len(query_QD), _QUERIES):
        similarity = query_QD[start : start + _QUERIES] @ candidate_CD.T
        here = (queries >= start) & (queries < start + _QUERIES)
        is_answer = torch.zeros_like(similarity, dtype=torch.bool)
        is_answer[queries[here] - start, answers[here]] = True
        best = similarity.masked_fill(~is_answer, -torch.inf).amax(dim=1, keepdim=True)
        rank_Q[start : start + _QUERIES] = ((similarity >= best) & ~is_answer).sum(dim=1)
    num_answers = torch.bincount(queries, minlength=len(query_QD)).tolist()
    chance = [sum(_chance(len(candidate_CD), num, k) for num in num_answers) / len(num_answers) for k in AT]
    return [
        Recall(name, k, float((rank_Q < k).double().mean()), by_luck) for k, by_luck in zip(AT, chance, strict=True)
    ]


def _chance(num_candidates: int, num_answers: int, at: int) -> float:
    """Return the probability that `at` candidates drawn at random hold an answer."""
    at = min(at, num_candidates)
    return 1 - math.comb(num_candidates - num_answers, at) / math.comb(num_candidates, at)
