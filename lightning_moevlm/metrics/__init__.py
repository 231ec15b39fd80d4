"""Metrics: pure functions of plans and logits, and torchmetrics classes where state must span batches."""

from lightning_moevlm.metrics.majority import MajorityAccuracy
from lightning_moevlm.metrics.routing import RoutingMetrics, routing_metrics

__all__ = ["MajorityAccuracy", "RoutingMetrics", "routing_metrics"]
