"""The transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_moevlm.layers.attention import Attention
from lightning_moevlm.layers.feed_forward import FeedForward, FFNOutput
from lightning_moevlm.layers.normalise import normalised
from lightning_moevlm.plans import Modality
from lightning_moevlm.precision import PrecisionPolicy, region
from lightning_moevlm.records import Layout


class Block(nn.Module):
    """Pre-norm block with any feed-forward.

    Args:
        dim: model width D.
        attention: shared by the modalities.
        ffn: dense, MoE or multiway.
    """

    precision = PrecisionPolicy()

    def __init__(self, dim: int, attention: Attention, ffn: FeedForward) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = ffn

    def forward(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        """Return tokens of the same shape, and the plans of the MoEs inside."""
        if self.precision.trunk is None:
            return self._transform(tokens_BSD, layout)
        with region(self.precision, "trunk", tokens_BSD.device.type):
            return self._transform(tokens_BSD, layout)

    def _transform(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        tokens_BSD = tokens_BSD + self.attention(normalised(self.attention_norm, tokens_BSD, self.precision), layout)
        output: FFNOutput = self.ffn(normalised(self.ffn_norm, tokens_BSD, self.precision), layout)
        return FFNOutput(tokens_BSD + output.tokens_BSD, output.plans)

    def forward_flops(self, num_tokens: Mapping[Modality, int]) -> float:
        """Active matrix FLOPs of one sequence."""
        return self.attention.forward_flops(sum(num_tokens.values())) + self.ffn.forward_flops(num_tokens)
