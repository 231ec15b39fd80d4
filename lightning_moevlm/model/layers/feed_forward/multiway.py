"""Multiway feed-forward: every modality has its own (BEiT-3, arXiv 2208.10442; VLMo, arXiv 2111.02358).

With a `pair` branch, sequences of several modalities go through that one whole (the vision-language feed-forward in
the top blocks of VLMo and VL-MoE), while sequences of a single modality keep their own path.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_moevlm.contracts.model_card import Costs, add_costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.model.layers.feed_forward.feed_forward import FeedForward, FFNOutput
from lightning_moevlm.model.layers.norms import NormKind


class MultiwayFFN(FeedForward):
    """A feed-forward per modality, and optionally one for sequences that mix them.

    Args:
        image: for image patches.
        text: for text tokens.
        pair: for whole sequences of patches and text; None sends each modality its own way.
    """

    def __init__(self, image: FeedForward, text: FeedForward, pair: FeedForward | None = None) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.pair = pair

    def forward(self, tokens_BSD: Tensor, layout: Layout) -> FFNOutput:
        """Split by span, run each branch, join."""
        if self.pair is not None and len(layout.spans) > 1 and not layout.separate:
            output: FFNOutput = self.pair(tokens_BSD, layout)
            return output
        outputs: list[FFNOutput] = [
            self.branch(span.modality)(tokens_BSD[:, span.start : span.stop], layout.select(span))
            for span in layout.spans
            if span.stop > span.start  # the image of a text that is being generated lies in the past
        ]
        tokens = torch.cat([output.tokens_BSD for output in outputs], dim=1)
        return FFNOutput(tokens, tuple(plan for output in outputs for plan in output.plans))

    def add_hidden_norm(self, kind: NormKind) -> None:
        """Give one to every branch."""
        for branch in (self.image, self.text, self.pair):
            if branch is not None:
                branch.add_hidden_norm(kind)

    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Sum over the branches that these tokens take."""
        if self.pair is not None and len(num_tokens) > 1 and not separate:
            return self.pair.costs(num_tokens)
        return add_costs(self.branch(modality).costs({modality: count}) for modality, count in num_tokens.items())

    def active_parameters(self, modalities: Collection[Modality], separate: bool = False) -> float:
        """Sum over the branches that these modalities take."""
        if self.pair is not None and len(modalities) > 1 and not separate:
            return self.pair.active_parameters(modalities)
        return sum(self.branch(modality).active_parameters((modality,)) for modality in modalities)

    def num_plans(self, modalities: Collection[Modality]) -> int:
        """Sum over the branches that these modalities take."""
        if self.pair is not None and len(modalities) > 1:
            return self.pair.num_plans(modalities)
        return sum(self.branch(modality).num_plans((modality,)) for modality in modalities)

    def branch(self, modality: Modality) -> FeedForward:
        """Return the feed-forward of one modality."""
        return self.image if modality == Modality.IMAGE else self.text
