"""A step that can be undone on the device: its outcome is a tensor, so the host need not wait to know it.

Two ways, one meaning: parameters and optimiser state of a skipped step are bit for bit what they were.

- Fused optimisers of torch leave out the update themselves where `found_inf` is 1, the way that GradScaler tells them.
  It costs nothing.
- For any other, values are copied before the update and put back where the step is skipped. It costs a copy of
  parameters and state. State that the update created was not there before: zero, which is where each of torch's
  optimisers and of ours begins.

torch's unfused AdamW keeps its step count on the host, which then waits for the decision: on CUDA set `fused: true`.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer


class UndoableStep:
    """One step of an optimiser, from before its update to after it.

    Args:
        optimizer: with gradients in place.
        skip: bool scalar on the parameters' device; True leaves the step out.
    """

    def __init__(self, optimizer: Optimizer, skip: Tensor) -> None:
        self._optimizer = optimizer
        self._skip = skip
        self._is_fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._old: dict[Tensor, Tensor] = {}
        self._old_state: dict[tuple[Tensor, str], Tensor] = {}
        if self._is_fused:
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            return
        params = _moved_by(optimizer)
        self._old = dict(zip(params, _copies(params), strict=True))
        state = {(p, name): value for p in params for name, value in optimizer.state.get(p, {}).items()}
        self._old_state = dict(zip(state, _copies(list(state.values())), strict=True))

    @torch.no_grad()
    def finish(self) -> None:
        """Put back, after the update, what was before it, where the step is to be skipped."""
        if self._is_fused:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
            return
        for p, old in self._old.items():
            _restore_(p, old, self._skip)
            for name, value in self._optimizer.state[p].items():
                _restore_(value, self._old_state.get((p, name)), self._skip)


def _moved_by(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _restore_(value: Tensor, old: Tensor | None, skip: Tensor) -> None:
    before = torch.zeros_like(value) if old is None else old
    value.copy_(torch.where(skip.to(value.device), before, value))
