"""The transformer block: attention, then a feed-forward, each added to the residual stream.

With n a norm and f a branch, `norm_placement` says where the norms stand:

    pre       x + f(n(x))          the default; arXiv 2002.04745 says why it needs no warm-up
    post      n(x + f(x))          Vaswani et al. 2017 (arXiv 1706.03762)
    sandwich  x + n(f(n(x)))       CogView (arXiv 2105.13290, section 2.4)
    output    x + n(f(x))          Swin v2 (arXiv 2111.09883, section 3.2), OLMo 2 (arXiv 2501.00656, section 3.2)

`layer_scale` multiplies f by a learned factor per channel. DeepNorm is n(alpha x + f(x)) with alpha = (2 N)^(1/4) for N
blocks (DeepNet, arXiv 2203.00555, section 4.1); its smaller start, beta, is in init_scheme.py.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.contracts.step_records import AttentionLogits, NamedPlan
from lightning_moevlm.model.initial_weights import InitialScale, Module
from lightning_moevlm.model.layers.attention import Attention, KeyValues, allowed_keys
from lightning_moevlm.model.layers.depth import Depth, deepnorm_alpha
from lightning_moevlm.model.layers.feed_forward.feed_forward import FeedForward, RoutedPlan, count_parameters
from lightning_moevlm.model.layers.init_scheme import scales_in_block
from lightning_moevlm.model.layers.layer_scale import LayerScale
from lightning_moevlm.model.layers.norms import make_norm, normalise
from lightning_moevlm.model.layers.stabilisers import ModelStabilisers
from lightning_moevlm.model.precision import PrecisionPolicy, region


class BlockOutput(NamedTuple):
    """The result of a block.

    tokens_BSD: same shape as the input.
    plans: plans of the MoEs inside.
    logit_max_H: see `AttentionOutput`.
    """

    tokens_BSD: Tensor
    plans: tuple[RoutedPlan, ...]
    logit_max_H: Tensor | None


class Block(Module):
    """A block with any feed-forward.

    Args:
        dim: model width D.
        attention: shared by the modalities.
        ffn: dense, MoE or multiway.
        stabilisers: norms, layer scale and residual scaling act here, and the initial scale of all that is inside.
        depth: where the block stands; initial scales and DeepNorm depend on it.
    """

    precision = PrecisionPolicy()

    def __init__(
        self,
        dim: int,
        attention: Attention,
        ffn: FeedForward,
        stabilisers: ModelStabilisers = ModelStabilisers(),
        depth: Depth = Depth(0, 1),
    ) -> None:
        super().__init__()
        self.stabilisers = stabilisers
        self.depth = depth
        placement = stabilisers.norm_placement
        has_norm, has_out_norm = placement != "output", placement in ("sandwich", "output")
        self.attention_norm = make_norm(stabilisers.norm, dim) if has_norm else None
        self.attention = attention
        self.attention_out_norm = make_norm(stabilisers.norm, dim) if has_out_norm else None
        self.ffn_norm = make_norm(stabilisers.norm, dim) if has_norm else None
        self.ffn = ffn
        self.ffn_out_norm = make_norm(stabilisers.norm, dim) if has_out_norm else None
        value = stabilisers.layer_scale
        self.attention_scale = None if value is None else LayerScale(dim, value)
        self.ffn_scale = None if value is None else LayerScale(dim, value)
        self.residual_weight = deepnorm_alpha(depth) if stabilisers.residual_scaling == "deepnorm" else 1.0
        self.norms_sum = placement == "post"

    def forward(
        self,
        tokens_BSD: Tensor,
        layout: Layout,
        measure: bool = False,
        past: KeyValues | None = None,
        allowed: Tensor | None = None,
    ) -> BlockOutput:
        """Return tokens of the same shape, plans of the MoEs inside and, with `measure`, the largest attention logits.

        With `past`, the tokens are the last positions of the layout; see `Attention`, also for `allowed`.
        """
        if self.precision.trunk is None:
            return self._transform(tokens_BSD, layout, measure, past, allowed)
        with region(self.precision, "trunk", tokens_BSD.device.type):
            return self._transform(tokens_BSD, layout, measure, past, allowed)

    def _transform(
        self, tokens_BSD: Tensor, layout: Layout, measure: bool, past: KeyValues | None, allowed: Tensor | None
    ) -> BlockOutput:
        attended = self.attention(self._input(tokens_BSD, self.attention_norm), layout, measure, past, allowed)
        layout = layout if past is None else layout.last(tokens_BSD.shape[1])
        tokens_BSD = self._add(
            tokens_BSD, attended.tokens_BSD, self.attention_out_norm, self.attention_scale, self.attention_norm
        )
        output = self.ffn(self._input(tokens_BSD, self.ffn_norm), layout)
        tokens_BSD = self._add(tokens_BSD, output.tokens_BSD, self.ffn_out_norm, self.ffn_scale, self.ffn_norm)
        return BlockOutput(tokens_BSD, output.plans, attended.logit_max_H)

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Costs of one sequence; of each token the inputs of the norms are kept."""
        norms = (self.attention_norm, self.attention_out_norm, self.ffn_norm, self.ffn_out_norm)
        kept = sum(norm is not None for norm in norms) * sum(num_tokens.values()) * self.attention.dim
        attention = self.attention.costs(sum(num_tokens.values()))
        return attention + self.ffn.costs(num_tokens, separate) + Costs(kept_by_norms=float(kept))

    def initial_scales(self, std: float) -> dict[str, InitialScale]:
        """Return the scale of every matrix inside, by its name in the block."""
        return scales_in_block(self, std)

    def _input(self, tokens_BSD: Tensor, norm: nn.Module | None) -> Tensor:
        return tokens_BSD if self.norms_sum else normalise(tokens_BSD, norm, self.precision)

    def _add(
        self,
        tokens_BSD: Tensor,
        branch_BSD: Tensor,
        out_norm: nn.Module | None,
        scale: LayerScale | None,
        norm: nn.Module | None,
    ) -> Tensor:
        branch_BSD = normalise(branch_BSD, out_norm, self.precision)
        if scale is not None:
            branch_BSD = scale(branch_BSD)
        if self.residual_weight != 1.0:
            tokens_BSD = tokens_BSD * self.residual_weight
        total_BSD = tokens_BSD + branch_BSD
        return normalise(total_BSD, norm, self.precision) if self.norms_sum else total_BSD


class StackOutput(NamedTuple):
    """The result of a stack of blocks.

    tokens_BSD: same shape as the input.
    plans: one of every MoE that ran.
    attention: largest logits of every attention that ran, if they are measured.
    """

    tokens_BSD: Tensor
    plans: tuple[NamedPlan, ...] = ()
    attention: tuple[AttentionLogits, ...] = ()


def stack_blocks(
    dim: int,
    num_heads: int,
    num_blocks: int,
    feed_forward: Callable[[int], FeedForward],
    stabilisers: ModelStabilisers,
) -> nn.ModuleList:
    """Return blocks in a row.

    Args:
        dim: model width D.
        num_heads: attention heads H.
        num_blocks: how many.
        feed_forward: index of a block -> its feed-forward.
        stabilisers: switches.

    Raises:
        UserError: no block, or dimensions that do not fit each other.
    """
    check_number("num_blocks", num_blocks, least=1)

    def block(index: int) -> Block:
        ffn = feed_forward(index)
        if stabilisers.sub_norm:
            ffn.add_hidden_norm(stabilisers.norm)
        return Block(dim, Attention(dim, num_heads, stabilisers), ffn, stabilisers, Depth(index, num_blocks))

    return nn.ModuleList(block(index) for index in range(num_blocks))


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens_BSD: Tensor,
    layout: Layout,
    source: str,
    first: int = 0,
    measure: bool = False,
    past: Sequence[KeyValues] | None = None,
) -> StackOutput:
    """Run blocks in a row.

    Args:
        blocks: from the lowest to the highest.
        tokens_BSD: embedded tokens.
        layout: of the sequence.
        source: forward pass that the records name.
        first: number of the lowest block in the model.
        measure: also return the largest attention logits.
        past: keys and values of every block, which are extended.
    """
    plans: list[NamedPlan] = []
    attention: list[AttentionLogits] = []
    allowed = allowed_keys(layout)
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        output = block(tokens_BSD, layout, measure, None if past is None else past[index], allowed)
        tokens_BSD = output.tokens_BSD
        plans.extend(NamedPlan(source, first + index, *plan) for plan in output.plans)
        if output.logit_max_H is not None:
            attention.append(AttentionLogits(source, first + index, block.attention.path, output.logit_max_H))
    return StackOutput(tokens_BSD, tuple(plans), tuple(attention))


def idle_in_blocks(blocks: Iterable[nn.Module], modalities: Collection[Modality], separate: bool = False) -> float:
    """Return how many parameters of the feed-forwards do not work on a sequence of these modalities."""
    ffns = [block.ffn for block in blocks if isinstance(block, Block)]
    return sum(count_parameters(ffn) - ffn.active_parameters(modalities, separate) for ffn in ffns)
