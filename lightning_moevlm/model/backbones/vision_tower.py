"""Turns images into tokens of a language model: a vision tower, then a connector (LLaVA-1.5, arXiv 2310.03744, 3.2).

    tower       patches through blocks of their own width; every patch sees every other; then a norm
    connector   x = W patch + b,   x + f(x),   where f is a dense feed-forward or a mixture of experts

Both may hold experts, as in CuMo (arXiv 2405.05949, section 3.2). Its experts contain the map between the widths; here
they share it, so that any expert stack fits. A patch over capacity keeps its x.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_moevlm.contracts.model_card import Costs, add_costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.contracts.step_records import NamedPlan
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.layers import (
    Block,
    FeedForward,
    FFNOutput,
    ModelStabilisers,
    MoEFFN,
    PatchEmbedding,
    StackOutput,
    count_parameters,
    idle_in_blocks,
    make_norm,
    normalise,
    run_blocks,
    stack_blocks,
)
from lightning_moevlm.model.precision import PrecisionPolicy, region


@dataclass(frozen=True)
class VisionOptions:
    """Shape of the vision tower; the defaults are those of ViT-L.

    Args:
        dim: width.
        num_heads: attention heads H.
        num_blocks: transformer blocks.
        hidden_dim: hidden width of dense feed-forwards.
        moe: factory (dim) -> MoEFFN for every n-th block; null is a dense tower.
        moe_every: every n-th block is sparse, if `moe` is given.
    """

    dim: int = 1024
    num_heads: int = 16
    num_blocks: int = 24
    hidden_dim: int = 4096
    moe: Callable[[int], MoEFFN] | None = None
    moe_every: int = 2


@dataclass(frozen=True)
class ConnectorOptions:
    """Feed-forward of the connector.

    Args:
        hidden_dim: hidden width, if it is dense.
        moe: factory (dim) -> MoEFFN at the width of the language model; null is dense.
    """

    hidden_dim: int = 2560
    moe: Callable[[int], MoEFFN] | None = None


class VisionTower(Module):
    """Encodes images alone.

    Args:
        options: shape.
        image_size: pixels, height and width.
        patch_size: pixels, height and width.
        feed_forward: index of a block -> its feed-forward.
        stabilisers: switches of the trunk.

    Raises:
        UserError: dimensions that do not fit each other.
    """

    precision = PrecisionPolicy()

    def __init__(
        self,
        options: VisionOptions,
        image_size: int,
        patch_size: int,
        feed_forward: Callable[[int], FeedForward],
        stabilisers: ModelStabilisers,
    ) -> None:
        super().__init__()
        self.dim = options.dim
        self.patches = PatchEmbedding(options.dim, image_size, patch_size, stabilisers.freeze_patches)
        self.blocks = stack_blocks(options.dim, options.num_heads, options.num_blocks, feed_forward, stabilisers)
        self.norm = make_norm(stabilisers.norm, options.dim)
        self.num_layers = options.num_blocks + 1
        """Blocks and the connector: where the numbers of the language model's blocks begin."""

    def forward(
        self,
        images_BRYX: Tensor,
        image_mask_BP: Tensor | None,
        identity_BP: Tensor | None,
        source: str,
        measure: bool,
    ) -> StackOutput:
        """Encode uint8 images.

        Args:
            images_BRYX: uint8.
            image_mask_BP: True on hidden patches.
            identity_BP: patch codes, if a router reads them.
            source: forward pass that the records name.
            measure: also return the largest attention logits.
        """
        with region(self.precision, "trunk", images_BRYX.device.type):
            patches_BPD = self.patches(images_BRYX, image_mask_BP)
        layout = _layout_of_patches(patches_BPD, identity_BP)
        output = run_blocks(self.blocks, patches_BPD, layout, source, 0, measure)
        return output._replace(tokens_BSD=normalise(output.tokens_BSD, self.norm, self.precision))

    def costs(self) -> Costs:
        """Costs of one image."""
        patches = {Modality.IMAGE: self.patches.num_patches}
        blocks = add_costs(block.costs(patches) for block in self.blocks if isinstance(block, Block))
        return self.patches.costs() + blocks + Costs(kept_by_norms=float(self.patches.num_patches * self.dim))

    def idle_parameters(self) -> float:
        """Return the parameters that no image needs: experts that a patch does not visit."""
        return idle_in_blocks(self.blocks, (Modality.IMAGE,))

    def num_plans(self) -> int:
        """Return how many plans an image makes."""
        return sum(block.ffn.num_plans((Modality.IMAGE,)) for block in self.blocks if isinstance(block, Block))


class Connector(Module):
    """Brings the tower's tokens to the width of the language model.

    Args:
        vision_dim: width of the tower.
        num_patches: of an image.
        dim: width of the language model.
        ffn: dense or MoE, of that width.
    """

    precision = PrecisionPolicy()

    def __init__(self, vision_dim: int, num_patches: int, dim: int, ffn: FeedForward) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.project = nn.Linear(vision_dim, dim)
        self.ffn = ffn

    def forward(self, tokens_BPD: Tensor, identity_BP: Tensor | None, source: str, block: int) -> StackOutput:
        """Project and transform; `block` is its number in the records."""
        with region(self.precision, "trunk", tokens_BPD.device.type):
            projected_BPD = self.project(tokens_BPD)
            output: FFNOutput = self.ffn(projected_BPD, _layout_of_patches(projected_BPD, identity_BP))
            tokens_BPD = projected_BPD + output.tokens_BSD
        return StackOutput(tokens_BPD, tuple(NamedPlan(source, block, *plan) for plan in output.plans))

    def costs(self) -> Costs:
        """Costs of one image; the projection counts as embedding."""
        values = self.num_patches * self.project.in_features
        project = Costs(embeddings=2.0 * values * self.project.out_features, kept_by_products=float(values))
        return project + self.ffn.costs({Modality.IMAGE: self.num_patches})

    def idle_parameters(self) -> float:
        """Return the parameters that no image needs: experts that a patch does not visit."""
        return count_parameters(self.ffn) - self.ffn.active_parameters((Modality.IMAGE,))

    def num_plans(self) -> int:
        """Return how many plans an image makes."""
        return self.ffn.num_plans((Modality.IMAGE,))


def _layout_of_patches(tokens_BPD: Tensor, identity_BP: Tensor | None) -> Layout:
    batch, length = tokens_BPD.shape[:2]
    valid_BP = torch.ones(batch, length, dtype=torch.bool, device=tokens_BPD.device)
    return Layout((Span(Modality.IMAGE, 0, length),), valid_BP, identity_BP)
