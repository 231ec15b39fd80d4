"""Records that cross borders between the parts of the house."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.plans import Modality, RoutingPlan


class Batch(NamedTuple):
    """One collated batch; a modality that no sample has is None.

    Samples are in order of what they hold: pairs, then images alone, then texts alone. So images are those of pairs and
    of images alone, texts those of pairs and of texts alone, and each has its own B.

    images_BRYX: uint8, RGB. text_BL: int64 token ids, padded. text_mask_BL: bool, True on real tokens.
    keys: the samples' WebDataset keys, in order. num_pairs: how many leading images and texts belong together; None
    where every image has its text. per_source: how many samples each source of the data gave, in their order. num_cut:
    texts that have lost their end, of those that were read for the batch.
    """

    images_BRYX: Tensor | None
    text_BL: Tensor | None
    text_mask_BL: Tensor | None
    keys: tuple[str, ...]
    num_pairs: int | None = None
    per_source: tuple[int, ...] = ()
    num_cut: int = 0

    @property
    def num_samples(self) -> int:
        """Samples of any kind."""
        return len(self.keys)

    @property
    def pairs(self) -> int:
        """How many samples have both an image and a text."""
        if self.images_BRYX is None or self.text_BL is None:
            return 0
        return len(self.keys) if self.num_pairs is None else self.num_pairs

    @property
    def image_keys(self) -> tuple[str, ...]:
        """The samples that the images are of, row by row."""
        return () if self.images_BRYX is None else self.keys[: len(self.images_BRYX)]

    @property
    def text_keys(self) -> tuple[str, ...]:
        """The samples that the texts are of, row by row."""
        return () if self.text_BL is None else self.keys[: self.pairs] + self.keys[len(self.image_keys) :]

    def first(self, num_samples: int) -> "Batch":
        """Return the first samples alone; which sources they came from is no longer known."""
        images_BRYX, text_BL, text_mask_BL = self.images_BRYX, self.text_BL, self.text_mask_BL
        num_samples = min(num_samples, self.num_samples)
        pairs = min(num_samples, self.pairs)
        num_images = 0 if images_BRYX is None else min(num_samples, len(images_BRYX))
        num_texts = num_samples - num_images + pairs
        return Batch(
            images_BRYX[:num_images] if images_BRYX is not None and num_images else None,
            text_BL[:num_texts] if text_BL is not None and num_texts else None,
            text_mask_BL[:num_texts] if text_mask_BL is not None and num_texts else None,
            self.keys[:num_samples],
            pairs,
        )


class Span(NamedTuple):
    """Sequence positions start..stop-1 hold tokens of one modality."""

    modality: Modality
    start: int
    stop: int


class Layout(NamedTuple):
    """Where the modalities lie in a sequence, and which positions are real.

    spans: in order and without gaps. valid_BS: bool, False on padding. identity_BS: int64, token ids and patch codes,
    or None where no router asked for them. causal: text sees no later text, and patches see no text.
    """

    spans: tuple[Span, ...]
    valid_BS: Tensor
    identity_BS: Tensor | None = None
    causal: bool = False

    @property
    def modality_S(self) -> Tensor:
        """Modality of each position, int64."""
        pieces = [torch.full((s.stop - s.start,), int(s.modality)) for s in self.spans]
        return torch.cat(pieces).to(self.valid_BS.device, non_blocking=True)

    def select(self, span: Span) -> "Layout":
        """Return the layout of one span alone."""
        inner = Span(span.modality, 0, span.stop - span.start)
        identity_BS = None if self.identity_BS is None else self.identity_BS[:, span.start : span.stop]
        return Layout((inner,), self.valid_BS[:, span.start : span.stop], identity_BS, self.causal)


class NamedPlan(NamedTuple):
    """A plan with its place in the model.

    source: which forward pass made it ("image", "text" or "pair"). block: index of the transformer block.
    layer: path of the MoE layer in the backbone. modalities: those that occur among its tokens.
    """

    source: str
    block: int
    layer: str
    modalities: tuple[Modality, ...]
    plan: RoutingPlan

    def detached(self) -> "NamedPlan":
        """Return the same plan without gradients, for callbacks."""
        return self._replace(plan=self.plan.detached())


class AttentionLogits(NamedTuple):
    """The largest attention logits of one forward pass, with their place in the model.

    source: which forward pass ("image", "text" or "pair"). block: index of the transformer block. layer: path of the
    attention in the backbone. max_H: fp32, the largest logit of each head before any cap; it has no gradient.
    """

    source: str
    block: int
    layer: str
    max_H: Tensor


class Term(NamedTuple):
    """One loss term: raw is a scalar tensor, weight what it is multiplied by in the total, a tensor if it adapts.

    num_predictions: that raw is the mean over, so that means of several batches can be joined; None: unknown, and
    batches count by their samples.
    """

    raw: Tensor
    weight: float | Tensor
    num_predictions: int | None = None

    @property
    def weighted(self) -> Tensor:
        """raw x weight."""
        return self.raw * self.weight

    def detached(self) -> "Term":
        """Return the same term without gradient."""
        return self._replace(raw=self.raw.detach())


class LossReport(NamedTuple):
    """Every term of a step. The task loss never contains auxiliary terms."""

    task: dict[str, Term]
    auxiliary: dict[str, Term]

    @property
    def task_loss(self) -> Tensor:
        """Weighted sum of the task terms."""
        return torch.stack([term.weighted for term in self.task.values()]).sum()

    @property
    def total_loss(self) -> Tensor:
        """Task loss plus weighted auxiliary terms: what is differentiated."""
        return torch.stack([term.weighted for term in (*self.task.values(), *self.auxiliary.values())]).sum()

    def detached(self) -> "LossReport":
        """Return the same report without gradients, for callbacks."""
        task, auxiliary = ({name: term.detached() for name, term in terms.items()} for terms in self)
        return LossReport(task, auxiliary)


class Predictions(NamedTuple):
    """Predicted and true classes at the masked positions of one term, both int64."""

    predicted_M: Tensor
    target_M: Tensor


class ObjectiveOutput(NamedTuple):
    """What an objective makes of a batch.

    terms: of the task. predictions: classes, by term. plans: of every MoE that ran. num_tokens: encoded, padding
    included. attention: the largest logits of every attention that ran, where the backbone was asked for them.
    log_partitions: of every term that predicts classes, the logsumexp of the logits at each masked position, (M,).
    """

    terms: dict[str, Term]
    predictions: dict[str, Predictions]
    plans: tuple[NamedPlan, ...]
    num_tokens: int
    attention: tuple[AttentionLogits, ...] = ()
    log_partitions: Mapping[str, Tensor] = MappingProxyType({})
