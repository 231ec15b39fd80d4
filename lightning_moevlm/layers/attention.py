"""Self-attention shared by all modalities, with optional query-key normalisation.

qk-norm: queries and keys pass an RMS norm per head before their product, which bounds attention logits
(arXiv 2302.05442, section 2; arXiv 2309.14322, section 3.1).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.errors import UserError
from lightning_moevlm.layers.normalise import normalised
from lightning_moevlm.precision import PrecisionPolicy, region
from lightning_moevlm.records import Layout


class Attention(nn.Module):
    """Bidirectional multi-head attention; padding is not attended to.

    Args:
        dim: model width D.
        num_heads: H; must divide D.
        qk_norm: RMS-normalise queries and keys per head.
    """

    precision = PrecisionPolicy()

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"dim {dim} is no multiple of num_heads {num_heads}: change one of them")
        self.dim = dim
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        width = dim // num_heads
        self.query_norm = nn.RMSNorm(width, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(width, eps=1e-6) if qk_norm else None

    def forward(self, tokens_BSD: Tensor, layout: Layout) -> Tensor:
        """Return (B, S, D)."""
        query, key, value = self.query_key_value(tokens_BSD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query_BHSW = self._normalised(query, self.query_norm).transpose(1, 2)
        key_BHSW = self._normalised(key, self.key_norm).transpose(1, 2)
        with region(self.precision, "attention_logits", tokens_BSD.device.type) as cast:
            attended_BHSW = F.scaled_dot_product_attention(
                cast(query_BHSW),
                cast(key_BHSW),
                cast(value.transpose(1, 2)),
                attn_mask=layout.valid_BS[:, None, None, :],
            )
        return self.out(attended_BHSW.to(value.dtype).transpose(1, 2).flatten(2))

    def forward_flops(self, num_tokens: int) -> float:
        """8 S D^2 for the projections and 4 S^2 D for scores and values, for one sequence of S tokens."""
        return 8.0 * num_tokens * self.dim**2 + 4.0 * num_tokens**2 * self.dim

    def _normalised(self, heads: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Apply a norm; unless pinned in its input's dtype: under autocast the fused kernel refuses a fp32 weight."""
        if norm is None:
            return heads
        if self.precision.dtype_of("norms") is None:
            return F.rms_norm(heads, norm.normalized_shape, norm.weight.to(heads.dtype), norm.eps)
        return normalised(norm, heads, self.precision)
