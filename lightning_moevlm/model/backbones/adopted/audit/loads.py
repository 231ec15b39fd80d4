"""Measures how a model's routers spread the tokens of a sample, layer by layer and modality by modality."""

from collections.abc import Iterable, Sequence

from lightning_moevlm.contracts.routing_plan import Modality, RoutingPlan
from lightning_moevlm.contracts.step_records import NamedPlan
from lightning_moevlm.model.backbones.adopted.audit.records import LayerLoad
from lightning_moevlm.model.metrics import routing_metrics


def measure_loads(passes: Iterable[Sequence[NamedPlan]]) -> tuple[LayerLoad, ...]:
    """Return the loads of every layer for every modality that it got, over all passes together."""
    plans: dict[str, list[RoutingPlan]] = {}
    for named in (each for one in passes for each in one):
        plans.setdefault(named.layer, []).append(named.plan)
    return tuple(load for layer, own in plans.items() for load in _of_layer(layer, own))


def _of_layer(layer: str, plans: Sequence[RoutingPlan]) -> Iterable[LayerLoad]:
    for modality in Modality:
        tokens = sum(int((plan.valid_T & (plan.modality_T == modality)).sum()) for plan in plans)
        if tokens:
            found = routing_metrics(plans, modality)
            loads = tuple(found.load_E.tolist())
            entropy, violation = float(found.load_entropy), float(found.max_violation)
            yield LayerLoad(layer, modality.label, tokens, loads, entropy, violation)
