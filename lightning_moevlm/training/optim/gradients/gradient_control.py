"""Runs the gradient stabilisers around an optimiser's update, and holds their state.

`before_update` is called with gradients in place, `after_update` after the optimiser's step. Nothing here waits for the
device. All ranks decide alike: they have the same averaged gradient and the same loss.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.optim.gradients.ada_gc import AdaGC, NormAverages
from lightning_moevlm.training.optim.gradients.clip_update import clip_update_
from lightning_moevlm.training.optim.gradients.gradient_norms import GradientNorms
from lightning_moevlm.training.optim.gradients.gradient_stabilisers import GradientStabilisers
from lightning_moevlm.training.optim.gradients.skip_spikes import SpikeWindow
from lightning_moevlm.training.optim.gradients.undoable_step import UndoableStep
from lightning_moevlm.training.optim.gradients.z_clip import NormStatistics
from lightning_moevlm.training.optim.tensor_roles import is_stack, norms


class GradientEvents(NamedTuple):
    """Effects of the stabilisers on a step; scalar tensors on the device."""

    norm: Tensor
    """Norm of the gradient before clipping, fp32."""
    coefficient: Tensor
    """Norm after clipping over the norm before it, fp32."""
    skipped: Tensor | None
    """Whether the step is left out, bool; None if skipping is off."""
    num_skipped: Tensor
    """Steps left out since the start of training, int64."""
    shortened: Mapping[str, Tensor]
    """Whether each enabled clip, by its option, shortened a gradient or an update, bool."""


class GradientControl:
    """The stabilisers of one optimiser.

    Args:
        options: the enabled stabilisers.
        optimizer: over groups of `parameter_groups`, or any.
        norms: keeps the norms of the gradients for others; None if nobody reads them.
    """

    def __init__(self, options: GradientStabilisers, optimizer: Optimizer, norms: GradientNorms | None = None) -> None:
        self.options = options
        self._norms = GradientNorms() if norms is None else norms
        self.events: GradientEvents | None = None
        self._optimizer = optimizer
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        device = self._params[0].device
        num_tensors = sum(len(p) if is_stack(group) else 1 for group in optimizer.param_groups for p in group["params"])
        window = options.skip_spikes.window if options.skip_spikes else 0
        self._statistics = NormStatistics.empty(device)
        self._averages = NormAverages.empty(num_tensors if options.ada_gc else 0, device)
        self._spikes = SpikeWindow.empty(window, device)
        self._undoable: UndoableStep | None = None
        self._old: list[Tensor] | None = None

    @torch.no_grad()
    def before_update(self, loss: Tensor) -> None:
        """Clip the gradients and decide whether to take the step.

        Args:
            loss: task loss of the step, scalar, the mean over its micro-batches and the ranks.
        """
        options = self.options
        gradients = [p.grad for p in self._params if p.grad is not None]
        norm = clipped = self._norms.measure(self._params).float()
        statistics, averages = self._statistics, self._averages
        skip, shortened = None, {}
        if options.skip_spikes is not None:
            skip, self._spikes = options.skip_spikes(loss.float(), norm, self._spikes)
        if options.clip_value is not None:
            clip_grad_value_(self._params, options.clip_value)
            before, clipped = clipped, get_total_norm(gradients).float()
            shortened["clip_value"] = clipped < before
        if options.ada_gc is not None:
            self._clip_tensors(options.ada_gc)
            before, clipped = clipped, get_total_norm(gradients).float()
            shortened["ada_gc"] = clipped < before
        if options.z_clip is not None:
            coefficient, self._statistics = options.z_clip(clipped, self._statistics)
            shortened["z_clip"] = coefficient < 1
            torch._foreach_mul_(gradients, coefficient.to(gradients[0].dtype))
            clipped = clipped * coefficient
        if options.clip_norm is not None:
            clip_grads_with_norm_(self._params, options.clip_norm, clipped.to(gradients[0].dtype))
            shortened["clip_norm"] = clipped > options.clip_norm
            clipped = clipped.clamp(max=options.clip_norm)
        ratio = torch.where(norm > 0, clipped / norm, torch.ones_like(norm))
        self.events = GradientEvents(norm, ratio, skip, self._spikes.num_skipped, shortened)
        if options.clip_update is not None:
            self._old = [p.detach().clone() for p in self._params]
        if skip is not None:
            self._undoable = UndoableStep(self._optimizer, skip)
            self._statistics = NormStatistics(*_unless(skip, self._statistics, statistics))
            self._averages = NormAverages(*_unless(skip, self._averages, averages))

    @torch.no_grad()
    def after_update(self) -> None:
        """Shorten the update, or undo it; does nothing without a preceding `before_update`."""
        if self._old is not None:
            assert self.options.clip_update is not None and self.events is not None
            old, acted = iter(self._old), []
            for group in self._optimizer.param_groups:
                before = [next(old) for _ in group["params"]]
                acted += clip_update_(group["params"], before, group["lr"], self.options.clip_update, is_stack(group))
            none = torch.zeros((), dtype=torch.bool, device=self._params[0].device)
            shortened = torch.stack(acted).any() if acted else none
            self.events = self.events._replace(shortened={**self.events.shortened, "clip_update": shortened})
            self._old = None
        if self._undoable is not None:
            self._undoable.finish()
            self._undoable = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the enabled stabilisers."""
        state: dict[str, Any] = {}
        if self.options.z_clip is not None:
            state["z_clip"] = self._statistics._asdict()
        if self.options.ada_gc is not None:
            state["ada_gc"] = self._averages._asdict()
        if self.options.skip_spikes is not None:
            state["skip_spikes"] = self._spikes._asdict()
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load the state; a stabiliser that was off then starts fresh.

        Raises:
            UserError: averages of a model with other tensors.
        """
        device = self._params[0].device
        memories = {name: {part: value.to(device) for part, value in parts.items()} for name, parts in state.items()}
        if self.options.z_clip is not None and "z_clip" in memories:
            self._statistics = NormStatistics(**memories["z_clip"])
        if self.options.ada_gc is not None and "ada_gc" in memories:
            averages = NormAverages(**memories["ada_gc"])
            if averages.average_G.shape != self._averages.average_G.shape:
                raise UserError(
                    f"the checkpoint has AdaGC averages of {len(averages.average_G)} tensors, this model has "
                    f"{len(self._averages.average_G)}: resume with the model that was trained"
                )
            self._averages = averages
        if self.options.skip_spikes is not None and "skip_spikes" in memories:
            self._spikes = SpikeWindow(**memories["skip_spikes"]).resize(self.options.skip_spikes.window)

    def _clip_tensors(self, ada_gc: AdaGC) -> None:
        """Scale each gradient separately; a missing one counts as zero."""
        gradients: list[Tensor] = []
        sizes: list[Tensor] = []
        nothing = self._averages.average_G.new_zeros(())
        for group in self._optimizer.param_groups:
            present = [p.grad for p in group["params"] if p.grad is not None]
            found = iter(norms(present, is_stack(group)))
            gradients += present
            for p in group["params"]:
                absent = nothing.expand(len(p), 1, 1) if is_stack(group) else nothing
                sizes.append(absent if p.grad is None else next(found))
        coefficient_G, self._averages = ada_gc(torch.cat([size.flatten() for size in sizes]), self._averages)
        pieces = coefficient_G.split([size.numel() for size in sizes])
        scales = [
            piece.view(size.shape)
            for piece, size, p in zip(pieces, sizes, self._params, strict=True)
            if p.grad is not None
        ]
        for gradient, scale in zip(gradients, scales, strict=True):
            gradient.mul_(scale.to(gradient.dtype))


def _unless(skip: Tensor, new: Iterable[Tensor], old: Iterable[Tensor]) -> list[Tensor]:
    return [torch.where(skip, before, after) for after, before in zip(new, old, strict=True)]
