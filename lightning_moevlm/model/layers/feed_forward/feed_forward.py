"""The feed-forward contract: FeedForward = DenseFFN | MoEFFN | MultiwayFFN.

Multiway and MoE compose, so VL-MoE, LIMoE, MoMa and their dense twins are arrangements of one block.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality, RoutingPlan
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.layers.norms import NormKind


class RoutedPlan(NamedTuple):
    """A plan, the layer that made it (its path in the backbone) and the modalities that occur among its tokens."""

    layer: str
    modalities: tuple[Modality, ...]
    plan: RoutingPlan


class FFNOutput(NamedTuple):
    """The result of a feed-forward.

    tokens_BSD: same shape and dtype as the input.
    plans: one of every MoE that ran, none for a dense layer.
    """

    tokens_BSD: Tensor
    plans: tuple[RoutedPlan, ...]


class FeedForward(Module):
    """Position-wise map D -> D over a sequence whose layout says which modality lies where."""

    @abstractmethod
    def forward(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        """Apply the feed-forward."""

    @abstractmethod
    def add_hidden_norm(self, kind: NormKind) -> None:
        """Normalise the hidden units before the last matrix (Sub-LN, Magneto, arXiv 2210.06423, section 2.2)."""

    @abstractmethod
    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Return the costs of one forward pass over a sequence of so many tokens; separate: as in its layout."""

    def active_parameters(self, modalities: Collection[Modality], separate: bool = False) -> float:
        """Return how many parameters work on a sequence of these modalities; of experts, those that a token visits."""
        parts = [part for part in self.children() if isinstance(part, FeedForward)]
        own = count_parameters(self) - sum(count_parameters(part) for part in parts)
        return own + sum(part.active_parameters(modalities, separate) for part in parts)

    def num_plans(self, modalities: Collection[Modality]) -> int:
        """Return how many plans `forward` makes of sequences of these modalities: here those of its parts."""
        return sum(part.num_plans(modalities) for part in self.children() if isinstance(part, FeedForward))


def count_parameters(module: nn.Module) -> int:
    """Return the number of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
