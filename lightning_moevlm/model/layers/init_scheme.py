"""Initial scale of the matrices of a block, by scheme, scale and depth.

With s = `init_scale` (Switch: 0.1), N blocks and n the number of a block from 1, a matrix has the std

    truncated_normal, normal   std * sqrt(s)                     std is the model's `init_std`
    fan_in                     sqrt(s / fan-in)                  Switch (arXiv 2101.03961, section 2.4)
    depth_scaled               sqrt(s / fan-in), and where it writes to the residual sqrt(s / (2 n fan-in))
                                                                 Zhang et al. 2019 (arXiv 1908.11365), as in OLMo
    x 1 / sqrt(2 N)            where it writes to the residual, with residual_scaling depth (GPT-2)
    x (8 N)^(-1/4)             values, outputs and feed-forwards, with residual_scaling deepnorm (arXiv 2203.00555);
                               not routers and gates of attention

All are cut at two std but `normal`. Draws depend on the name alone, so that schemes differ by a factor or in the tails.
Embeddings, patches and heads lie outside of blocks and stay truncated normal; a router with an `initial_std` keeps it.
"""

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_moevlm.model.experts import ExpertStack
from lightning_moevlm.model.initial_weights import InitialScale
from lightning_moevlm.model.layers.attention import Attention
from lightning_moevlm.model.layers.depth import deepnorm_beta
from lightning_moevlm.model.layers.feed_forward.dense import DenseFFN

if TYPE_CHECKING:
    from lightning_moevlm.model.layers.block import Block


def scales_in_block(block: "Block", std: float) -> dict[str, InitialScale]:
    """Return the scale of every matrix of a block, by its name in the block."""
    return {
        name: _scale(block, name, parameter, std) for name, parameter in block.named_parameters() if parameter.ndim >= 2
    }


def _scale(block: "Block", name: str, parameter: Tensor, std: float) -> InitialScale:
    switches = block.stabilisers
    writes_residual = any(parameter is output for output in residual_outputs(block))
    if switches.init_scheme in ("fan_in", "depth_scaled"):
        is_stack = any(parameter is stack for stack in _expert_stacks(block))
        std = parameter.shape[1 if is_stack else -1] ** -0.5  # (E, in, out) of a stack, (..., in) of all others
    std *= switches.init_scale**0.5
    if switches.init_scheme == "depth_scaled" and writes_residual:
        std *= (2 * (block.depth.block + 1)) ** -0.5
    if switches.residual_scaling == "depth" and writes_residual:
        std *= (2 * block.depth.num_blocks) ** -0.5
    value_factor = 1.0
    if switches.residual_scaling == "deepnorm":
        beta = deepnorm_beta(block.depth)
        if parameter is block.attention.query_key_value.weight:
            value_factor = beta
        elif ".router." not in name and name != "attention.gate.weight":
            std *= beta
    return InitialScale(std, math.inf if switches.init_scheme == "normal" else 2.0, value_factor)


def residual_outputs(block: nn.Module) -> list[Tensor]:
    """Return the matrices whose product is added to the residual stream: the last one of each branch."""
    outputs: list[Tensor] = []
    for module in block.modules():
        if isinstance(module, Attention):
            outputs.append(module.out.weight)
        elif isinstance(module, DenseFFN):
            outputs.append(module.down.weight)
        elif isinstance(module, ExpertStack):
            outputs.append(module.stacks()[-1])
    return outputs


def _expert_stacks(block: nn.Module) -> list[Tensor]:
    return [stack for module in block.modules() if isinstance(module, ExpertStack) for stack in module.stacks()]
