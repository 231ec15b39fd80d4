"""Effects of interventions on groups of samples, paired by sample: changed minus unchanged.

    effect of a change on a group   mean over the group's samples of (score with - score without), with its t interval
    elsewhere                       the same over the other samples
    more than elsewhere             difference of the two means, with Welch's interval: is the change specific?

p values are corrected by Holm over every change and group that were tested together. A sample without a difference
counts as 0. Groups of fewer than `LEAST` samples are not tested.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_moevlm.atlas.causal.scores import SampleScores, ScoredSamples, Scores
from lightning_moevlm.study.statistics.intervals import Interval, is_constant, t_interval
from lightning_moevlm.study.statistics.paired_tests import holm, paired_p

ALPHA = 0.05
"""Error rate; intervals cover 1 - ALPHA."""
LEAST = 8
"""Samples that a group needs; below, the t interval of losses covers too little."""

Member = NDArray[np.bool_]
Groups = Mapping[str, Member]
"""Membership of each of N samples by name of the group, bool; a sample may be in several."""


@dataclass(frozen=True)
class Effect:
    """A change's effect on a group, in the unit of the score."""

    num_samples: int
    mean: float
    """Changed minus unchanged; of a loss, above 0 is harm."""
    interval: Interval | None
    """t; None for fewer than two samples."""
    p: float
    """Two-sided, of "no effect"; 1 where no sample differs."""
    p_adjusted: float
    """Corrected over the family; equal to p until `adjust`."""


@dataclass(frozen=True)
class GroupEffect:
    """The effects of one change on one group."""

    change: str
    group: str
    loss: Effect
    elsewhere: Effect | None
    """On the loss of the other samples; None if the group is all samples, or too few are left."""
    more: Effect | None
    """By how much the loss of the group changes more than that of the others, Welch; None likewise."""
    right: Mapping[str, Effect]
    """On how right predictions are, by term."""


def group_effects(scored: ScoredSamples, groups: Groups) -> tuple[GroupEffect, ...]:
    """Return the effect of every change on every group, corrected over all of them."""
    found = [
        _effect_of(scored.unchanged, changed, change, group, member_N)
        for change, changed in scored.changed.items()
        for group, member_N in groups.items()
        if _count(scored.unchanged.loss_N, member_N) >= LEAST
    ]
    return _adjusted(found)


def paired_effect(unchanged_N: Scores, changed_N: Scores) -> Effect | None:
    """Return the mean difference with its t interval and p; None without samples that have both scores."""
    difference_N = changed_N - unchanged_N
    differences = tuple(difference_N[np.isfinite(difference_N)].tolist())
    if not differences:
        return None
    p = 1.0 if is_constant(differences) and differences[0] == 0 else paired_p(differences)
    p = 1.0 if p is None else p  # one sample, or the same difference in all: no test
    return Effect(len(differences), float(np.mean(differences)), t_interval(differences, ALPHA), p, p)


def _effect_of(before: SampleScores, after: SampleScores, change: str, group: str, member_N: Member) -> GroupEffect:
    loss = paired_effect(before.loss_N[member_N], after.loss_N[member_N])
    assert loss is not None, "groups without samples are left out"
    elsewhere = more = None
    if _count(before.loss_N, ~member_N) >= LEAST:
        elsewhere = paired_effect(before.loss_N[~member_N], after.loss_N[~member_N])
        difference_N = after.loss_N - before.loss_N
        more = _welch(difference_N[member_N], difference_N[~member_N])
    of_terms = {
        term: paired_effect(right_N[member_N], after.right[term][member_N]) for term, right_N in before.right.items()
    }
    right = {term: effect for term, effect in of_terms.items() if effect is not None}
    return GroupEffect(change, group, loss, elsewhere, more, right)


def _welch(inside: Scores, outside: Scores) -> Effect:
    """Return the difference of two means with Welch's interval and p."""
    inside, outside = inside[np.isfinite(inside)], outside[np.isfinite(outside)]
    mean = float(inside.mean() - outside.mean())
    variances = [float(np.var(each, ddof=1)) / len(each) for each in (inside, outside)]
    error = math.sqrt(sum(variances))
    if error == 0:
        return Effect(len(inside), mean, Interval(mean, mean, "t"), 1.0, 1.0)
    freedom = sum(variances) ** 2 / sum(
        v**2 / (len(each) - 1) for v, each in zip(variances, (inside, outside), strict=True)
    )
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Effect(len(inside), mean, Interval(mean - half, mean + half, "t"), p, p)


def _adjusted(found: list[GroupEffect]) -> tuple[GroupEffect, ...]:
    """Correct the effects on losses, those beyond elsewhere, and those on right predictions, each as one family."""
    loss = holm({str(place): each.loss.p for place, each in enumerate(found)})
    more = holm({str(place): each.more.p for place, each in enumerate(found) if each.more is not None})
    right = holm({f"{place} {term}": e.p for place, each in enumerate(found) for term, e in each.right.items()})

    def with_p(effect: Effect, p: float | None) -> Effect:
        return replace(effect, p_adjusted=effect.p if p is None else p)

    return tuple(
        replace(
            each,
            loss=with_p(each.loss, loss[str(place)]),
            more=None if each.more is None else with_p(each.more, more[str(place)]),
            right={term: with_p(effect, right[f"{place} {term}"]) for term, effect in each.right.items()},
        )
        for place, each in enumerate(found)
    )


def _count(score_N: Scores, member_N: Member) -> int:
    return int(np.isfinite(score_N[member_N]).sum())
