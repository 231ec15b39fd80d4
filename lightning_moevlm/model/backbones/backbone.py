"""The backbone contract: images, texts or both in, contextual tokens and routing plans out."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Chat, JoinedChats
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.contracts.step_records import AttentionLogits, NamedPlan
from lightning_moevlm.model.backbones.past import Past
from lightning_moevlm.model.initial_weights import Module
from lightning_moevlm.model.layers import Block
from lightning_moevlm.model.precision import PrecisionPolicy


@dataclass(frozen=True)
class BackboneSpec:
    """The dimensions that backbone, objective and data share.

    Args:
        dim: model width D.
        image_size: pixels, height and width.
        patch_size: pixels, height and width.
        vocab_size: V.
        max_text_len: longest text L.
        predicts_text: the backbone has a head for next tokens, see `Backbone.predict_text`.

    Raises:
        UserError: a dimension of 0 or less.
    """

    dim: int
    image_size: int
    patch_size: int
    vocab_size: int
    max_text_len: int
    predicts_text: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        for entry in fields(self)[:-1]:
            check_number(entry.name, getattr(self, entry.name), least=1)

    @property
    def num_patches(self) -> int:
        """P."""
        return (self.image_size // self.patch_size) ** 2


class BackboneOutput(NamedTuple):
    """The result of a backbone.

    tokens_BSD: normalised features.
    layout: spans of the modalities.
    plans: one of every MoE that ran.
    attention: largest logits of every attention that ran, empty unless `measure_attention` is set.
    """

    tokens_BSD: Tensor
    layout: Layout
    plans: tuple[NamedPlan, ...]
    attention: tuple[AttentionLogits, ...] = ()

    @property
    def num_tokens(self) -> int:
        """B x S, padding included."""
        return self.tokens_BSD.shape[0] * self.tokens_BSD.shape[1]

    def features(self, modality: Modality) -> Tensor:
        """Return the features of one modality's span."""
        span = next(span for span in self.layout.spans if span.modality == modality)
        return self.tokens_BSD[:, span.start : span.stop]

    def pool(self, modality: Modality) -> Tensor:
        """Return the mean over the real positions of one modality, (B, D)."""
        span = next(span for span in self.layout.spans if span.modality == modality)
        valid_BS1 = self.layout.valid_BS[:, span.start : span.stop].unsqueeze(-1)
        return (self.features(modality) * valid_BS1).sum(dim=1) / valid_BS1.sum(dim=1).clamp(min=1)

    def read_text(self) -> Tensor:
        """Return the position of each text that has seen all of it, (B, D): the first; if causal, the last real one."""
        features_BLD = self.features(Modality.TEXT)
        if not self.layout.causal:
            return features_BLD[:, 0]
        span = self.layout.spans[-1]
        last_B = self.layout.valid_BS[:, span.start : span.stop].sum(dim=1) - 1
        return features_BLD[torch.arange(len(last_B), device=last_B.device), last_B]


class Backbone(Module):
    """A vision-language trunk for image-only, text-only and pair inputs.

    measure_attention: a mode like `training`, off at first. While on, outputs carry the largest attention logits, for
        one product of queries and keys per block.

    causal: in every pass, text sees earlier text alone.
    """

    path_in_model = "backbone"
    spec: BackboneSpec
    precision = PrecisionPolicy()
    measure_attention: bool = False
    causal: bool = False

    @abstractmethod
    def forward(
        self,
        images_BRYX: Tensor | None = None,
        text_BL: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        image_mask_BP: Tensor | None = None,
        separate: bool = False,
        causal: bool = False,
    ) -> BackboneOutput:
        """Encode images, texts or pairs.

        Args:
            images_BRYX: uint8.
            text_BL: int64 token ids.
            text_mask_BL: True on real tokens.
            image_mask_BP: True on hidden patches.
            causal: text sees patches and earlier text alone, in this pass.
            separate: no attention between image and text of a pair; a mixture of experts still sees both at once.
        """

    def prefill(self, images_BRYX: Tensor | None, text_BL: Tensor, text_mask_BL: Tensor) -> tuple[BackboneOutput, Past]:
        """Encode the beginning of texts that are to be continued, and keep what their next positions need of it.

        Raises:
            UserError: a backbone that cannot.
        """
        raise UserError(
            f"{type(self).__name__} cannot continue texts: give it `prefill` and `extend`, as Trunk has them"
        )

    def read_chats(self, chats: JoinedChats) -> BackboneOutput:
        """Encode conversations that the model's own processor made, with images inside.

        Raises:
            UserError: a backbone that embeds images of one size, before their text.
        """
        raise UserError(
            f"{type(self).__name__} has no processor of its own: set data.chat to null, or choose HuggingFaceModel "
            "with the path of a model"
        )

    def prefill_chats(self, chats: Sequence[Chat]) -> tuple[BackboneOutput, Past]:
        """Encode the beginnings of conversations, as `prefill` does those of texts."""
        raise NotImplementedError

    def extend(self, text_B: Tensor, past: Past) -> Tensor:
        """Return the features of one more token of each text, (B, D); `past` is extended."""
        raise NotImplementedError

    def predict_text(self, features_MD: Tensor) -> Tensor:
        """Return the logits of the token that follows, (M, V), of a backbone whose spec says `predicts_text`."""
        raise NotImplementedError

    @property
    @abstractmethod
    def text_embedding_VD(self) -> Tensor:
        """Token embedding matrix, for heads that share it."""

    @abstractmethod
    def costs(self, num_tokens: Mapping[Modality, int], separate: bool = False) -> Costs:
        """Return the costs of one forward pass of one sample with so many tokens per modality.

        Args:
            num_tokens: at least 1 of each modality that it names.
            separate: as in `forward`.
        """

    @abstractmethod
    def active_parameters(self, modalities: Collection[Modality], separate: bool = False) -> float:
        """Return how many parameters work on samples of these modalities; of experts, those that a token visits."""

    def num_plans(self, modalities: Collection[Modality]) -> int:
        """Return how many plans `forward` makes of sequences of these modalities: those of its feed-forwards."""
        whole = [module for module in self.modules() if isinstance(module, Block)]
        return sum(block.ffn.num_plans(modalities) for block in whole)
