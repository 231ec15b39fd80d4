"""Examines a model: switches off every expert, changes every layer, and says what needs which expert."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_moevlm.atlas.causal.effects import Effect, GroupEffect, Groups, group_effects
from lightning_moevlm.atlas.causal.groups import EVERY
from lightning_moevlm.atlas.causal.interventions import (
    ExpertOff,
    HashedChoices,
    Intervention,
    OtherSample,
    RandomChoices,
    WithoutBest,
)
from lightning_moevlm.atlas.causal.roles import Expert, Role, Serves, TestedClaim, examine_claims, rank_roles
from lightning_moevlm.atlas.causal.scores import Change, score_samples
from lightning_moevlm.atlas.probe.probe_set import ProbeSet
from lightning_moevlm.atlas.routing.route import move_batch
from lightning_moevlm.atlas.routing.trace import TracedLayer
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.progress import track
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.backbones.trunk import Trunk
from lightning_moevlm.model.objectives import Draws, Objective

To = Literal["next", "nothing"]


class LayerChange(NamedTuple):
    """The effect of another routing of a whole layer on the loss of all samples."""

    layer: str
    change: str
    loss: Effect
    right: Mapping[str, Effect]
    """On how right predictions are, by term."""


@dataclass(frozen=True)
class Examination:
    """What experts are needed for."""

    to: To
    """Where the tokens of an expert go that is switched off."""
    num_samples: int
    groups: Mapping[str, int]
    """Samples of each group."""
    effects: Mapping[Expert, tuple[GroupEffect, ...]]
    """Of switching each expert off, corrected over all of them."""
    layers: tuple[LayerChange, ...]
    """Corrected over all of them."""
    roles: tuple[Role, ...]
    """Those with the largest effect first."""
    claims: tuple[TestedClaim, ...]
    """What experts serve, beside whether their removal hurts it."""


def examine(
    backbone: Backbone,
    objective: Objective,
    draws: Draws,
    probe: ProbeSet,
    layers: tuple[TracedLayer, ...],
    groups: Groups,
    observed: tuple[Serves, ...],
    to: To = "next",
    batch_size: int = 32,
) -> Examination:
    """Run the probe once for each expert and for each way to route a layer otherwise.

    Args:
        backbone: the model, in evaluation mode.
        objective: of its training, in evaluation mode.
        draws: source of the masks of its validation.
        probe: the samples.
        layers: those that routed it.
        groups: of the samples of the probe, in its order; EVERY among them.
        observed: what experts serve more often than chance.
        to: where the tokens of an expert go; soft slots go to nothing.
        batch_size: samples of a forward pass. Contrasts, and choices of another sample, depend on it.

    Raises:
        UserError: an objective without losses of single samples, or one that cannot use the probe.
    """
    off = {
        Expert(each.layer, expert): Change(each.layer, ExpertOff(expert, "nothing" if each.is_soft else to))
        for each in layers
        for expert in range(each.num_experts)
    }
    others = {
        (each.layer, name): Change(each.layer, intervention)
        for each in layers
        if not each.is_soft
        for name, intervention in _whole_layer(backbone).items()
    }
    names = {f"off/{number}": key for number, key in enumerate(off)}
    wide = {f"wide/{number}": key for number, key in enumerate(others)}
    changes = {name: off[key] for name, key in names.items()} | {name: others[key] for name, key in wide.items()}
    steps = -(-probe.num_samples // batch_size)
    batches = track(_batches(backbone, probe, batch_size), steps, f"running {len(changes)} interventions")
    scored = score_samples(objective, backbone, batches, draws, changes)
    if len(scored.keys) != len(groups[EVERY]):
        raise UserError("the probe gave other samples when it was read again: do not change the set meanwhile")
    of_off = scored._replace(changed={name: scored.changed[name] for name in names})
    of_wide = scored._replace(changed={name: scored.changed[name] for name in wide})
    effects: dict[Expert, list[GroupEffect]] = {key: [] for key in off}
    for found in group_effects(of_off, groups):
        effects[names[found.change]].append(found)
    layer_changes = tuple(
        LayerChange(*wide[found.change], found.loss, found.right)
        for found in group_effects(of_wide, {EVERY: groups[EVERY]})
    )
    return Examination(
        to,
        len(scored.keys),
        {name: int(member_N.sum()) for name, member_N in groups.items()},
        {key: tuple(found) for key, found in effects.items()},
        layer_changes,
        rank_roles(effects, observed, EVERY),
        examine_claims(observed, effects),
    )


def _whole_layer(backbone: Backbone) -> dict[str, Intervention]:
    found: dict[str, Intervention] = {
        "best expert left out": WithoutBest(),
        "random experts": RandomChoices(),
        "experts of another sample": OtherSample(),
    }
    return found | ({"hashed experts": HashedChoices()} if isinstance(backbone, Trunk) else {})


def _batches(backbone: Backbone, probe: ProbeSet, batch_size: int) -> Iterator[Batch]:
    device = next(backbone.parameters()).device
    for each in probe.batches(batch_size):
        yield move_batch(each.batch, device)
