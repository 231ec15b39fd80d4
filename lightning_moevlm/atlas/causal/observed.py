"""Turns the claims of an atlas into observations that a removal can be set beside."""

from lightning_moevlm.atlas.causal.groups import group_kind
from lightning_moevlm.atlas.causal.roles import Expert, Serves
from lightning_moevlm.atlas.labels.label import BY_NAME
from lightning_moevlm.atlas.make_atlas import Atlas


def observed_groups(atlas: Atlas) -> tuple[Serves, ...]:
    """Return what experts serve of what samples differ by, such as categories; positions are left out."""
    found: dict[tuple[Expert, str], Serves] = {}
    for layer in atlas.of_layers:
        for expert, claims in enumerate(layer.claims):
            for claim in claims:
                kind = group_kind(BY_NAME[claim.label])
                if kind is not None:
                    serves = Serves(Expert(layer.layer.layer, expert), f"{kind} {claim.value}", claim.lift)
                    found.setdefault((serves.expert, serves.group), serves)
    return tuple(found.values())
