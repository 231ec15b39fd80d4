"""Simulates optimiser state in a narrow format: the state is rounded after each step.

State in 8 bits is studied in arXiv 2110.02861. In plain bf16 a second moment with beta 0.999 stops moving, because 0.1
% of it is below half a step of bf16 (2^-9). torch stores state in the dtype of the parameters, so it is rounded here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_moevlm.model.precision import PrecisionPolicy, rounded


def round_state(optimizer: Optimizer, policy: PrecisionPolicy) -> None:
    """Round an optimiser's state after every step if the policy simulates a narrow format.

    Floating-point state of more than one element is rounded; step counts are not.
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
                    # in fp32: the scale of fp8 is beyond float16, which may be the dtype of state
                    value.copy_(rounded(value.float(), dtype, scale))

    optimizer.register_step_post_hook(after_step)
