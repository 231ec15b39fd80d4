"""What each expert is needed for, and whether what it serves most needs it.

    needed for a group     switched off, the loss of the group rises (Holm), and more than that of the other samples
                           (Holm)
    needed, not specific   the loss of the group rises, but not shown to rise more than elsewhere
    not seen               no rise is shown: an expert may serve a group that another expert would serve as well
    not tested             the probe has too few samples of the group

An observation ("most of its patches show apples") and an intervention ("without it apples get worse") are two facts.
Only both say that apples need the expert. A removal alone hurts groups that a router knows nothing of: of a router that
looks at positions, those with long texts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lightning_moevlm.atlas.causal.effects import ALPHA, LEAST, Effect, GroupEffect
from lightning_moevlm.atlas.causal.show_effect import show_effect
from lightning_moevlm.study.statistics.paired_tests import format_p


class Need(StrEnum):
    """The result of an expert's removal for a group."""

    SPECIFIC = "needed for it"
    GENERAL = "needed, not specific"
    NOT_SEEN = "not seen"
    NOT_TESTED = "not tested"


class Expert(NamedTuple):
    """An expert of a layer."""

    layer: str
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of {self.layer}"


class Serves(NamedTuple):
    """An observation: what an expert serves more often than chance."""

    expert: Expert
    group: str
    lift: float
    """Share of its choices that are of the group, over that of all choices."""


@dataclass(frozen=True)
class Role:
    """The groups that an expert is needed for, the most specific need first."""

    expert: Expert
    overall: Effect | None
    """On the loss of all samples; None if that group was not tested."""
    needed_for: tuple[GroupEffect, ...]
    """Groups that it serves more often than chance."""
    hurts: tuple[GroupEffect, ...]
    """Other groups whose loss rises more than elsewhere, the largest difference first."""


@dataclass(frozen=True)
class TestedClaim:
    """An observation beside the result of the expert's removal."""

    serves: Serves
    need: Need
    effect: GroupEffect | None
    sentence: str


def rank_roles(
    effects: Mapping[Expert, Sequence[GroupEffect]], observed: Iterable[Serves], every: str
) -> tuple[Role, ...]:
    """Return the roles of experts, those with the largest effect on all samples first.

    Args:
        effects: of switching each expert off, corrected over all of them.
        observed: what experts serve.
        every: name of the group of all samples.
    """
    served = {(each.expert, each.group) for each in observed}
    roles = []
    for expert, found in effects.items():
        overall = next((each.loss for each in found if each.group == every), None)
        specific = sorted((each for each in found if judge(each) is Need.SPECIFIC), key=_excess, reverse=True)
        needed_for = tuple(each for each in specific if (expert, each.group) in served)
        roles.append(Role(expert, overall, needed_for, tuple(each for each in specific if each not in needed_for)))
    return tuple(sorted(roles, key=lambda role: -(role.overall.mean if role.overall is not None else 0.0)))


def _excess(effect: GroupEffect) -> float:
    return 0.0 if effect.more is None else effect.more.mean


def judge(effect: GroupEffect | None) -> Need:
    """Return whether a group needs an expert, from the effect of its removal; None: the group was not tested."""
    if effect is None:
        return Need.NOT_TESTED
    if not (effect.loss.mean > 0 and effect.loss.p_adjusted <= ALPHA):
        return Need.NOT_SEEN
    more = effect.more
    return Need.SPECIFIC if more is not None and more.mean > 0 and more.p_adjusted <= ALPHA else Need.GENERAL


def examine_claims(
    observed: Iterable[Serves], effects: Mapping[Expert, Sequence[GroupEffect]]
) -> tuple[TestedClaim, ...]:
    """Return each observation with what the expert's removal says of it.

    Args:
        observed: what experts serve.
        effects: of switching each expert off, corrected over all of them.
    """
    claims = []
    for serves in observed:
        effect = next((each for each in effects.get(serves.expert, ()) if each.group == serves.group), None)
        need = judge(effect)
        claims.append(TestedClaim(serves, need, effect, _sentence(serves, need, effect)))
    return tuple(claims)


def _sentence(serves: Serves, need: Need, effect: GroupEffect | None) -> str:
    name = str(serves.expert).capitalize()
    says = f"{name} serves {serves.group} {serves.lift:.3g} times as often as chance"
    if effect is None:
        return f"{says}. Whether they need it was not tested: the probe has fewer than {LEAST} samples of them."
    loss, p = show_effect(effect.loss), format_p(effect.loss.p_adjusted, ALPHA)
    off = f"Without it their loss changes by {loss}, p = {p}, {effect.loss.num_samples} samples"
    if need is Need.NOT_SEEN:
        return f"{says}, but its removal is not seen to hurt them. {off}."
    others = "" if effect.elsewhere is None else f"; that of the others changes by {show_effect(effect.elsewhere)}"
    verdict = "and they need it" if need is Need.SPECIFIC else "and they need it, but not shown more than others do"
    return f"{says}, {verdict}. {off}{others}."
