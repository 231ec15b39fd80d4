"""The set of gradient stabilisers: one nullable field each, so an arm turns one off without touching the others.

They act once per optimiser step, on the gradient summed over micro-batches and averaged over ranks, in this order:

    skip_spikes   decides by the loss and the norm before clipping
    clip_value    clips each coordinate to [-v, v]
    ada_gc        clips each tensor by its own past norms
    z_clip        clips the norm by its own past
    clip_norm     clips the norm to a constant
    (the optimiser's update)
    clip_update   clips each tensor's update by its root mean square
"""

from dataclasses import dataclass, fields

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.optim.gradients.ada_gc import AdaGC
from lightning_moevlm.training.optim.gradients.skip_spikes import SkipSpikes
from lightning_moevlm.training.optim.gradients.z_clip import ZClip


@dataclass(frozen=True)
class GradientStabilisers:
    """Clipping and skipping of gradients and updates; null turns one off.

    Args:
        clip_norm: largest norm of the whole gradient; 1.0 is customary.
        clip_value: largest absolute value of a coordinate.
        z_clip: ZClip, clips norms that are outliers of their own past.
        ada_gc: AdaGC, clips each tensor by its own past norms.
        clip_update: largest root mean square of a tensor's update over its learning rate, weight decay included, for
            any optimiser. ST-MoE (arXiv 2202.08906, section 3) loses quality at 0.1; AdamW's is at most about 1.
        skip_spikes: skips steps whose loss or norm is an outlier or not finite.

    Raises:
        UserError: a threshold of 0 or less.
    """

    clip_norm: float | None = None
    clip_value: float | None = None
    z_clip: ZClip | None = None
    ada_gc: AdaGC | None = None
    clip_update: float | None = None
    skip_spikes: SkipSpikes | None = None

    def __post_init__(self) -> None:
        for name in ("clip_norm", "clip_value", "clip_update"):
            threshold = getattr(self, name)
            if threshold is not None:
                check_number(f"gradient.{name}", threshold, above=0, advice=", or null for none")

    @property
    def any_on(self) -> bool:
        """Whether any is on."""
        return any(getattr(self, entry.name) is not None for entry in fields(self))
