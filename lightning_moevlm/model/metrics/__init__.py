"""Metrics: pure functions of plans and logits, and measures where state must span batches."""

from lightning_moevlm.model.metrics.drop_rate import DropRates
from lightning_moevlm.model.metrics.routing import RoutingMetrics, capacity_factor, routing_metrics
from lightning_moevlm.model.metrics.routing_shift import RoutingShift, routing_shift

__all__ = [
    "DropRates",
    "RoutingMetrics",
    "RoutingShift",
    "capacity_factor",
    "routing_metrics",
    "routing_shift",
]
