"""Optimiser state in a narrow format, simulated: what the optimiser remembers is rounded after each step.

State in 8 bits is studied in arXiv 2110.02861; in plain bf16 a second moment with beta 0.999 stops moving, because 0.1
% of it is below half a step of bf16 (2^-9). torch keeps state in the dtype of the parameters, hence rounding and not
storing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_moevlm.model.precision import PrecisionPolicy, rounded


def round_state(optimizer: Optimizer, policy: PrecisionPolicy) -> None:
    """Have the optimiser round its state after every step, where the policy simulates a narrow one; else do nothing.

    Rounded are state tensors of a parameter's shape and, for factored optimisers, of more than one element; step counts
    stay.
    """
    dtype = policy.optimizer_state
    if dtype is None or dtype == "float32" or policy.simulate is None:
        return
    scale = policy.simulate.scale

    @torch.no_grad()
    def after_step(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for state in stepped.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
                    # in fp32: the factor that fp8 is scaled by is beyond float16, in which state may be kept
                    value.copy_(rounded(value.float(), dtype, scale))

    optimizer.register_step_post_hook(after_step)
