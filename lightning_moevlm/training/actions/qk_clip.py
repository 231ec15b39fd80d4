"""QK-clip: heads whose attention logits grew too large get smaller query and key weights after the step.

    gamma_h = min(1, threshold / largest logit of head h),   W_q^h and W_k^h  *=  sqrt(gamma_h)

Kimi K2 (arXiv 2507.20534, section 2.1.2): the logits of such a head shrink by gamma_h. Other heads and the gradients
stay unchanged. The largest logit is that of the step's own forward passes, over all micro-batches and ranks.

It needs `model.backbone.init_args.stabilisers.qk_norm: false`. With qk-norm, which is on by default, it has no effect:
the norm removes the scale of the weights, and bounds the logits itself. The two are refused together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Attention
from lightning_moevlm.training.actions.action import Action, StepFacts, Training
from lightning_moevlm.training.optim.named_parts import is_frozen


@dataclass(frozen=True)
class QKClip:
    """Shrinks query and key weights of heads whose attention logits exceed a threshold.

    Args:
        threshold: largest logit without clipping; 100 in Kimi K2.

    Raises:
        UserError: a threshold that is not positive.
    """

    threshold: float = 100.0

    def __post_init__(self) -> None:
        check_number("actions.qk_clip.threshold", self.threshold, above=0, advice="; 100 is customary")

    def check(self, backbone: Backbone) -> None:
        """Refuse a model on which it cannot act.

        Raises:
            UserError: an attention with qk-norm, or none that is trained.
        """
        attentions = [module for module in backbone.modules() if isinstance(module, Attention)]
        for module in attentions:
            if module.query_norm is not None:
                raise UserError(
                    "actions.qk_clip cannot act on a model with qk_norm, which is on by default: the norm removes the "
                    "scale of query and key weights, and bounds the logits itself; set "
                    "model.backbone.init_args.stabilisers.qk_norm to false, or model.actions.qk_clip to null"
                )
        if attentions and is_frozen(*attentions):
            raise UserError(
                "actions.qk_clip cannot act, because model.trainable keeps every attention still: set "
                "model.actions.qk_clip to null, or name parts with attention in model.trainable"
            )


class QKClipper(Action):
    """Rescales heads; counts on the device, so the host never waits.

    Args:
        options: the threshold.
    """

    needs = frozenset({"attention"})

    def __init__(self, options: QKClip) -> None:
        self._options = options
        self._clipped: Tensor | None = None  # int64, on the device; heads since the last logging step

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Clip every attention that is trained."""
        for path, logit_max_H in facts.attention.items():
            attention = training.backbone.get_submodule(path)
            assert isinstance(attention, Attention)
            if is_frozen(attention):
                continue
            clipped = (clip_heads(attention, logit_max_H, self._options.threshold) < 1).sum()
            self._clipped = clipped if self._clipped is None else self._clipped.to(clipped.device) + clipped
        return {}

    def pending(self) -> dict[str, float]:
        """Return the number of heads clipped since the last call."""
        count = 0 if self._clipped is None else int(self._clipped)
        self._clipped = None
        return {metric_keys.QK_CLIPPED_HEADS.key(): float(count)}

    def state_dict(self) -> dict[str, Any]:
        """Return the count that is not logged yet."""
        return {"clipped": self._clipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the count."""
        self._clipped = state["clipped"]


@torch.no_grad()
def clip_heads(attention: Attention, logit_max_H: Tensor, threshold: float) -> Tensor:
    """Rescale the query and key rows of each head in place and return gamma_H; 1 if the logit is not finite."""
    gamma_H = torch.where(logit_max_H.isfinite(), threshold / logit_max_H.clamp(min=threshold), 1.0)
    weight = attention.query_key_value.weight.unflatten(0, (3, attention.num_heads, -1))  # a view: (3, H, W, D)
    weight[:2] *= gamma_H.sqrt().to(weight.dtype)[:, None, None]
    return gamma_H
