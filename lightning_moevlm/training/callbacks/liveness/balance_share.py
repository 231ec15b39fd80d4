"""R_g: which share of the gradient comes from losses that balance experts.

    R_g = |gradient of the weighted balance terms| / |gradient of the total loss|

on router weights, and on all parameters. LongCat-Flash (arXiv 2509.01322) watches such a ratio, of the balance loss to
the language loss and at the experts' mean probabilities, and keeps it below 0.1; here it is that of whole gradients at
the weights. Near 1 a router learns from little but its balance; above 1 the other terms pull against it. Of the first
samples of the step's first micro-batch, on this rank.
"""

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.training.callbacks.liveness.loss_proofs import gradients_of, norm_of
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal


def balance_share(rehearsal: Rehearsal) -> dict[str, float]:
    """Return R_g by metric key; empty where no balance loss is on, or nothing reaches the weights."""
    balancing = rehearsal.module.losses.balancing
    terms = [term.weighted for name, term in rehearsal.report.auxiliary.items() if name in balancing]
    if not terms:
        return {}
    named = dict(rehearsal.module.named_parameters())
    routers = {
        id(p)
        for layer in rehearsal.module.backbone.modules()
        if isinstance(layer, MoEFFN)
        for p in layer.router.parameters()
    }
    parameters = list(named.values())
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
