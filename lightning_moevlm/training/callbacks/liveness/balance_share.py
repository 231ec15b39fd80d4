"""R_g: the share of the gradient that comes from losses that balance experts.

    R_g = |gradient of the weighted balance terms| / |gradient of the total loss|

Measured on router weights and on all parameters, with the first samples of the step's first micro-batch on this rank.
Near 1 a router learns little but balance; above 1 the other terms pull against it. LongCat-Flash (arXiv 2509.01322)
keeps a similar ratio, of balance loss to language loss at the experts' mean probabilities, below 0.1.
"""

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.training.callbacks.liveness.loss_proofs import gradients_of, norm_of
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal


def balance_share(rehearsal: Rehearsal) -> dict[str, float]:
    """Return R_g by metric key; empty if no balance loss is on, or no gradient reaches the weights."""
    module, balancing = rehearsal.module, rehearsal.module.losses.balancing
    terms = [term.weighted for name, term in rehearsal.report.auxiliary.items() if name in balancing]
    if not terms:
        return {}
    layers = [layer for layer in module.backbone.modules() if isinstance(layer, Mixture)]
    routers = {id(p) for layer in layers for p in layer.router.parameters()}
    parameters = list(module.parameters())
    # one after the other: of each gradient only norms are kept
    norms = []
    for value in (sum(terms[1:], terms[0]), rehearsal.report.total_loss):
        gradients = gradients_of(value, parameters)
        own = [g for p, g in zip(parameters, gradients, strict=True) if id(p) in routers]
        norms.append({"router": norm_of(own), "all": norm_of(gradients)})
        del gradients, own
    balance, whole = norms
    return {
        metric_keys.BALANCE_GRADIENT_SHARE.key(weights=where): balance[where] / whole[where]
        for where in ("router", "all")
        if whole[where] > 0
    }
