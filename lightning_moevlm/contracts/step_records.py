"""Records of one step that model, training and callbacks exchange."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality, RoutingPlan


class NamedPlan(NamedTuple):
    """A plan with its place in the model.

    source: forward pass that made it, "image", "text" or "pair".
    block: index of the transformer block.
    layer: path of the MoE layer in the backbone.
    modalities: those of its tokens.
    """

    source: str
    block: int
    layer: str
    modalities: tuple[Modality, ...]
    plan: RoutingPlan

    def detach(self) -> "NamedPlan":
        """Return the same plan without gradients, for callbacks."""
        return self._replace(plan=self.plan.detach())


class AttentionLogits(NamedTuple):
    """The largest attention logits of one forward pass, with their place in the model.

    source: forward pass, "image", "text" or "pair".
    block: index of the transformer block.
    layer: path of the attention in the backbone.
    max_H: fp32, the largest logit of each head before any cap, without gradient.
    """

    source: str
    block: int
    layer: str
    max_H: Tensor


class PlanSize(NamedTuple):
    """Divisors of the means of a routing loss, for one plan or all plans of a layer and pass. Sizes add up.

    tokens_A: valid tokens of each modality.
    sequences_A: sequences with such a token.
    sequences: sequences with any valid token, a scalar.
    """

    tokens_A: Tensor
    sequences_A: Tensor
    sequences: Tensor

    @staticmethod
    def of_pass(num_images: Tensor, text_mask_BL: Tensor | None, num_patches: int) -> "PlanSize":
        """Return the size of a pass over so many images, a scalar, and texts; sequences of pairs hold both."""
        num_texts, num_words = torch.zeros_like(num_images), torch.zeros_like(num_images)
        if text_mask_BL is not None:
            num_texts, num_words = text_mask_BL.any(dim=-1).sum(), text_mask_BL.sum()
        sequences_A = torch.stack([num_images, num_texts])
        return PlanSize(torch.stack([num_images * num_patches, num_words]), sequences_A, sequences_A.max())

    def select(self, modalities: Iterable[Modality]) -> "PlanSize":
        """Return the size of a plan with the tokens of these modalities alone."""
        among = set(modalities)
        tokens_A, sequences_A = (
            torch.stack([count_A[modality] * (modality in among) for modality in Modality])
            for count_A in (self.tokens_A, self.sequences_A)
        )
        return PlanSize(tokens_A, sequences_A, self.sequences if len(among) > 1 else sequences_A.sum())


class BatchSize(NamedTuple):
    """Divisors of the means of a batch or of a whole optimiser step. Sizes add up.

    predictions: number of predictions, a scalar for each term of the task.
    passes: size of the sequences, by source.
    """

    predictions: Mapping[str, Tensor]
    passes: Mapping[str, PlanSize]

    def to_vector(self) -> Tensor:
        """Return all numbers as one float64 vector, to add and to divide."""
        values = [*self.predictions.values(), *(value for size in self.passes.values() for value in size)]
        return torch.cat([value.flatten().to(torch.float64) for value in values])

    def from_vector(self, numbers: Tensor) -> "BatchSize":
        """Return a size of the same terms and passes with these numbers, rounded to integers."""
        of_terms, of_passes = (
            numbers.round().to(torch.int64).split([len(self.predictions), len(numbers) - len(self.predictions)])
        )
        kinds = len(Modality)
        sizes = (PlanSize(one[:kinds], one[kinds:-1], one[-1]) for one in of_passes.split(2 * kinds + 1))
        return BatchSize(
            dict(zip(self.predictions, of_terms.unbind(), strict=True)), dict(zip(self.passes, sizes, strict=True))
        )


class Term(NamedTuple):
    """One loss term.

    raw: scalar tensor.
    weight: factor in the total, a tensor if it adapts.
    num_predictions: number that raw is the mean over, for joining batches; None: unknown, batches count by samples.
    in_step: differentiated in place of raw if the step has several parts. Its mean over micro-batches and ranks is the
        raw term of their joined batch. None: raw itself.
    """

    raw: Tensor
    weight: float | Tensor
    num_predictions: int | None = None
    in_step: Tensor | None = None

    @property
    def weighted(self) -> Tensor:
        """raw x weight."""
        return self.raw * self.weight

    @property
    def differentiated(self) -> Tensor:
        """Its part in the loss of the step, which is the mean over micro-batches and ranks."""
        return self.weighted if self.in_step is None else self.in_step * self.weight

    def detach(self) -> "Term":
        """Return the same term without gradient."""
        return self._replace(raw=self.raw.detach(), in_step=None if self.in_step is None else self.in_step.detach())


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
        """Task loss plus weighted auxiliary terms, of this batch alone."""
        return torch.stack([term.weighted for term in (*self.task.values(), *self.auxiliary.values())]).sum()

    @property
    def task_in_step(self) -> Tensor:
        """The task loss whose mean over micro-batches and ranks is that of the joined batch."""
        return torch.stack([term.differentiated for term in self.task.values()]).sum()

    @property
    def differentiated(self) -> Tensor:
        """The total loss whose mean over micro-batches and ranks is that of the joined batch."""
        return torch.stack([term.differentiated for term in (*self.task.values(), *self.auxiliary.values())]).sum()

    def detach(self) -> "LossReport":
        """Return the same report without gradients, for callbacks."""
        task, auxiliary = ({name: term.detach() for name, term in terms.items()} for terms in self)
        return LossReport(task, auxiliary)


class Predictions(NamedTuple):
    """Predicted and true classes at the masked positions of one term, both int64."""

    predicted_M: Tensor
    target_M: Tensor


class SampleLosses(NamedTuple):
    """Losses of the single predictions of one term, kept in evaluation, to compare two ways of running a model.

    keys: of the samples.
    row_M: int64, place of the sample of each prediction in `keys`.
    loss_M: fp32, unweighted; its mean is the term.
    right_M: fp32, how right the prediction is, 0 to 1; None for a term without right answers.
    """

    keys: tuple[str, ...]
    row_M: Tensor
    loss_M: Tensor
    right_M: Tensor | None


class Embeddings(NamedTuple):
    """Features of pairs in one space, kept during an evaluation whose metrics compare samples with each other."""

    keys: tuple[str, ...]  # of the samples
    image_ND: Tensor  # fp32, rows of length 1, on the CPU
    text_ND: Tensor  # likewise
    image_ids: tuple[int, ...]  # equal where the images are equal
    text_ids: tuple[int, ...]  # equal where the texts are equal


class Answered(NamedTuple):
    """Questions of a batch with what the model answers and what people answered."""

    predicted: tuple[str, ...]
    given: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]


class Judged(NamedTuple):
    """Statements of a batch with what the model says of them and their truth."""

    said: tuple[bool, ...]
    truth: tuple[bool, ...]
    kinds: tuple[str, ...]
    text_ids: tuple[int, ...]  # equal where the texts are equal


Match = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Images, texts and their masks, on any device -> the logit that each image and text belong together (B,)."""


class Matchable(NamedTuple):
    """Pairs of a batch, and how the model judges any image with any text."""

    pairs: Batch
    match: Match


class ObjectiveOutput(NamedTuple):
    """The result of an objective on a batch.

    terms: terms of the task.
    predictions: classes, by term.
    plans: one of every MoE that ran.
    num_tokens: encoded tokens, padding included.
    attention: largest logits of every attention that ran, if the backbone measures them.
    log_partitions: logsumexp of the logits at each masked position, (M,), for every term that predicts classes.
    embeddings: in evaluation, for an objective that compares samples with each other.
    answered: in evaluation, for an objective that answers questions.
    judged: in evaluation, for an objective that judges statements.
    matchable: in evaluation, for an objective that matches images with texts; of the samples of the embeddings.
    of_samples: in evaluation, losses of single samples, for every term that has them.
    """

    terms: dict[str, Term]
    predictions: dict[str, Predictions]
    plans: tuple[NamedPlan, ...]
    num_tokens: int
    attention: tuple[AttentionLogits, ...] = ()
    log_partitions: Mapping[str, Tensor] = MappingProxyType({})
    embeddings: Embeddings | None = None
    answered: Answered | None = None
    judged: Judged | None = None
    matchable: Matchable | None = None
    of_samples: Mapping[str, SampleLosses] = MappingProxyType({})
