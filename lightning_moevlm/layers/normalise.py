"""A norm as a precision region: LayerNorm or RMSNorm in the dtype that the policy has for norms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.precision import PrecisionPolicy, region


def normalised(norm: nn.LayerNorm | nn.RMSNorm, tokens: Tensor, policy: PrecisionPolicy) -> Tensor:
    """Apply a norm over the last axis; pinned, it returns the dtype of its input, else what torch makes of it."""
    if policy.dtype_of("norms") is None:
        result: Tensor = norm(tokens)
        return result
    device_type = tokens.device.type
    with region(policy, "norms", device_type) as cast:
        inputs = cast(tokens)
        # autocast lifts a norm to fp32 on CUDA; a region says itself what it computes in
        with torch.autocast(device_type, enabled=False):
            weight = None if norm.weight is None else norm.weight.to(inputs.dtype)
            if isinstance(norm, nn.RMSNorm):
                result = F.rms_norm(inputs, norm.normalized_shape, weight, norm.eps)
            else:
                bias = None if norm.bias is None else norm.bias.to(inputs.dtype)
                result = F.layer_norm(inputs, norm.normalized_shape, weight, bias, norm.eps)
        return result.to(tokens.dtype)
