"""R_g: the share of the gradient that comes from losses that balance experts.

    R_g = |gradient of the weighted balance terms| / |gradient of the total loss|

Measured on router weights and on all parameters, with the first samples of the step's first micro-batch on this rank.
Near 1 a router learns little but balance; above 1 the other terms pull against it. LongCat-Flash (arXiv 2509.01322)
keeps a similar ratio, of balance loss to language loss at the experts' mean probabilities, below 0.1.
"""

from collections.abc import Collection, Mapping

from torch import Tensor

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.training.callbacks.liveness.loss_proofs import norm_of
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal, gradients_of


def balance_share(rehearsal: Rehearsal) -> dict[str, float]:
    """Return R_g by metric key; empty if no balance loss is on, or no gradient reaches the weights."""
    module, balancing = rehearsal.module, rehearsal.module.losses.balancing
    terms = [term.weighted for name, term in rehearsal.report.auxiliary.items() if name in balancing]
    if not terms:
        return {}
    layers = [layer for layer in module.backbone.modules() if isinstance(layer, Mixture)]
    routers = {p for layer in layers for p in layer.router.parameters()}
    whole = _norms(rehearsal.total_gradient, routers)
    del rehearsal.total_gradient  # computed anew if asked for: two gradients of a large model need not fit
    parameters = list(module.parameters())
    gradients = gradients_of(sum(terms[1:], terms[0]), parameters)
    balance = _norms(dict(zip(parameters, gradients, strict=True)), routers)
    return {
        metric_keys.BALANCE_GRADIENT_SHARE.key(weights=where): balance[where] / whole[where]
        for where in ("router", "all")
        if whole[where] > 0
    }


def _norms(gradients: Mapping[Tensor, Tensor | None], routers: Collection[Tensor]) -> dict[str, float]:
    own = [gradient for parameter, gradient in gradients.items() if parameter in routers]
    return {"router": norm_of(own), "all": norm_of(gradients.values())}
