"""Undoes an optimiser step on the device: the decision is a tensor, so the host need not wait.

Parameters and optimiser state of a skipped step stay the same, bit for bit. There are two ways:

- torch's fused optimisers leave out the update if `found_inf` is 1, as for GradScaler. It costs nothing.
- For others, values are copied before the update and put back. It costs a copy of parameters and state. State that the
  update created is set to zero, the initial value of every optimiser of torch and of this package.

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
        params = _with_gradient(optimizer)
        self._old = dict(zip(params, _copies(params), strict=True))
        state = {(p, name): value for p in params for name, value in optimizer.state.get(p, {}).items()}
        self._old_state = dict(zip(state, _copies(list(state.values())), strict=True))

    @torch.no_grad()
    def finish(self) -> None:
        """Put the values from before the update back, if the step is to be skipped."""
        if self._is_fused:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
            return
        for p, old in self._old.items():
            _restore_(p, old, self._skip)
            for name, value in self._optimizer.state[p].items():
                _restore_(value, self._old_state.get((p, name)), self._skip)


def _with_gradient(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _restore_(value: Tensor, old: Tensor | None, skip: Tensor) -> None:
    before = torch.zeros_like(value) if old is None else old
    value.copy_(torch.where(skip.to(value.device), before, value))
