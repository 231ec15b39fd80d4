"""Finds layers whose output for a sample depends on the other samples of its batch in evaluation.

A limit on the experts drops tokens by the load of other samples, and some routers let the tokens of a batch compete.
Metrics and features then depend on the batch.
"""

from torch import nn

from lightning_moevlm.model.layers.feed_forward.mixture import Mixture


def batch_dependence(backbone: nn.Module) -> tuple[str, ...]:
    """Describe the causes, each with its remedy; empty if every output is a function of its sample alone."""
    layers = [module for module in backbone.modules() if isinstance(module, Mixture)]
    found = [
        cause for layer in layers for cause in (_explain_router(layer), _explain_capacity(layer)) if cause is not None
    ]
    return tuple(dict.fromkeys(found))


def find_evaluation_limits(backbone: nn.Module) -> tuple[str, ...]:
    """Return the paths of the MoE layers that may drop tokens in evaluation."""
    layers = ((path, module) for path, module in backbone.named_modules() if isinstance(module, Mixture))
    return tuple(path for path, layer in layers if _limit(layer) is not None)


def _explain_router(layer: Mixture) -> str | None:
    if not layer.router.crosses_samples:
        return None
    return f"{type(layer.router).__name__} lets the tokens of a batch compete; TopKRouter decides token by token"


def _explain_capacity(layer: Mixture) -> str | None:
    limit = _limit(layer)
    if limit is None or (layer.capacity is not None and layer.capacity.group_size == 1):
        return None
    return f"capacity.eval_factor is {limit}, so samples share the places of experts; null is dropless"


def _limit(layer: Mixture) -> str | None:
    return None if layer.capacity is None or layer.router.mixes else layer.capacity.evaluation_limit
