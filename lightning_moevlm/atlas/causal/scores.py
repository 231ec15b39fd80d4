"""Scores each sample with and without each intervention, while the set is read once.

A batch is read and moved once, then run unchanged and under every intervention, so that memory does not grow with the
set: what is kept of a sample is a few numbers. Masks belong to the sample, so its scores are paired. The loss of a
sample is the weighted sum of its terms, each the mean over the sample's own predictions.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_moevlm.atlas.causal.intervene import intervene
from lightning_moevlm.atlas.causal.interventions import FrozenChoices, Intervention
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput, RoutingPlan
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.objectives import Draws, Objective

Scores = NDArray[np.float64]


class Change(NamedTuple):
    """An intervention and its place.

    choices_of: a model of the same shape, such as an earlier checkpoint, whose choices the layer makes; the
        intervention is then None.
    """

    layer: str
    intervention: Intervention | None = None
    choices_of: Backbone | None = None


class SampleScores(NamedTuple):
    """Scores of N samples; NaN where a sample has no prediction.

    loss_N: task loss.
    of_terms: loss of each term, unweighted (N).
    right: how right predictions are, 0 to 1, for every term that says so (N).
    """

    loss_N: Scores
    of_terms: Mapping[str, Scores]
    right: Mapping[str, Scores]


class ScoredSamples(NamedTuple):
    """Samples in the order of the set, and their scores without and with each change."""

    keys: tuple[str, ...]
    sources: tuple[str, ...]
    unchanged: SampleScores
    changed: Mapping[str, SampleScores]


@torch.no_grad()
def score_samples(
    objective: Objective, backbone: Backbone, batches: Iterable[Batch], draws: Draws, changes: Mapping[str, Change]
) -> ScoredSamples:
    """Run a set of samples unchanged and under every change.

    Args:
        objective: in evaluation mode, as is the backbone.
        backbone: the model.
        batches: on the model's device.
        draws: source of masks.
        changes: by name.

    Raises:
        UserError: an objective without losses of single samples, a model in training, or a layer that is not there.
    """
    kept: dict[str | None, list[SampleScores]] = defaultdict(list)
    keys: list[str] = []
    sources: list[str] = []
    for batch in batches:
        for part in _by_source(batch):
            keys.extend(part.keys)
            sources.extend(part.sources or [""] * part.num_samples)
            if not objective.can_use(part):
                for name in (None, *changes):
                    kept[name].append(SampleScores(np.full(part.num_samples, np.nan), {}, {}))
                continue
            kept[None].append(_rows(objective(backbone, part, draws), part))
            for name, change in changes.items():
                kept[name].append(_rows(_run(objective, backbone, part, draws, change), part))
    joined = {name: _join(rows) for name, rows in kept.items()}
    if not keys or not joined[None].of_terms:
        raise _no_losses(objective)
    unchanged = joined.pop(None)
    return ScoredSamples(
        tuple(keys), tuple(sources), unchanged, {name: each for name, each in joined.items() if name is not None}
    )


@torch.no_grad()
def refuse_unscored(objective: Objective, backbone: Backbone, batches: Iterable[Batch], draws: Draws) -> None:
    """Refuse an objective that gives no losses of single samples, with a UserError.

    It runs on batches until one has losses.
    """
    for batch in batches:
        for part in _by_source(batch):
            if objective.can_use(part) and objective(backbone, part, draws).of_samples:
                return
    raise _no_losses(objective)


def _no_losses(objective: Objective) -> UserError:
    return UserError(
        f"{type(objective).__name__} gives no losses of these samples: choose samples that it is trained on; an "
        "objective of your own sets `of_samples` of its output"
    )


def _by_source(batch: Batch) -> Iterator[Batch]:
    """Yield the samples of each source apart: keys are unique within one. Further captions are left out."""
    batch = batch._replace(further_captions=None)
    for name in dict.fromkeys(batch.sources) or ("",):
        yield batch if len(set(batch.sources)) < 2 else batch.of_sources([name])


def _run(objective: Objective, backbone: Backbone, batch: Batch, draws: Draws, change: Change) -> ObjectiveOutput:
    intervention = change.intervention
    if change.choices_of is not None:
        plans = objective(change.choices_of, batch, draws).plans
        intervention = _Replayed([named.plan for named in plans if named.layer == change.layer])
    assert intervention is not None, "a change has one of the two"
    with intervene(backbone, change.layer, intervention):
        output: ObjectiveOutput = objective(backbone, batch, draws)
    return output


class _Replayed:
    """The choices of another run of the same passes, in their order."""

    reads_identity: ClassVar[bool] = False

    def __init__(self, plans: list[RoutingPlan]) -> None:
        self._plans = plans

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> RoutingPlan:
        choices = self._plans.pop(0)
        if not isinstance(choices, PairPlan):
            raise UserError("soft slots mix tokens and choose no experts, so there are no choices to freeze")
        return FrozenChoices(choices)(plan, inputs)


def _rows(output: ObjectiveOutput, batch: Batch) -> SampleScores:
    row = {key: place for place, key in enumerate(batch.keys)}
    loss_N, has_loss_N = np.zeros(batch.num_samples), np.zeros(batch.num_samples, dtype=np.bool_)
    of_terms: dict[str, Scores] = {}
    right: dict[str, Scores] = {}
    for term, losses in output.of_samples.items():
        place_M = np.array([row[key] for key in losses.keys], dtype=np.int64)[losses.row_M.cpu().numpy()]
        has_N = np.bincount(place_M, minlength=batch.num_samples) > 0
        of_terms[term] = _mean_by(place_M, losses.loss_M, batch.num_samples)
        loss_N += float(output.terms[term].weight) * np.where(has_N, of_terms[term], 0.0)
        has_loss_N |= has_N
        if losses.right_M is not None:
            right[term] = _mean_by(place_M, losses.right_M, batch.num_samples)
    return SampleScores(np.where(has_loss_N, loss_N, np.nan), of_terms, right)


def _mean_by(place_M: NDArray[np.int64], value_M: Tensor, num: int) -> Scores:
    """Return the mean of each sample's values; NaN without any."""
    count_N = np.bincount(place_M, minlength=num)
    total_N = np.bincount(place_M, weights=value_M.double().cpu().numpy(), minlength=num)
    return np.where(count_N > 0, total_N / np.maximum(count_N, 1), np.nan)


def _join(parts: Sequence[SampleScores]) -> SampleScores:
    lengths = [len(each.loss_N) for each in parts]
    return SampleScores(
        np.concatenate([each.loss_N for each in parts]),
        _join_terms([each.of_terms for each in parts], lengths),
        _join_terms([each.right for each in parts], lengths),
    )


def _join_terms(parts: Sequence[Mapping[str, Scores]], lengths: Sequence[int]) -> dict[str, Scores]:
    """Return the scores of every term; a batch without one has none."""
    terms = dict.fromkeys(term for each in parts for term in each)
    return {
        term: np.concatenate([each.get(term, np.full(n, np.nan)) for each, n in zip(parts, lengths, strict=True)])
        for term in terms
    }
