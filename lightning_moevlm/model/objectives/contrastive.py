"""Image-text contrast: each image finds its text among those of the batch, and each text its image.

    softmax   mean of both cross-entropies, logits = s <image, text>         (CLIP, arXiv 2103.00020, section 2.3)
    sigmoid   one yes-or-no decision per image and text, logits = s <image, text> + b, summed over the texts of an image
              (SigLIP, arXiv 2303.15343, section 3.2)

Features are means over real positions, projected per modality and scaled to length 1; s = exp(log_scale) is learned.
Image and text are encoded in one pass without attention between them, so a shared mixture of experts routes both at
once, as in LIMoE (arXiv 2206.02770, section 2). Negatives come from the micro-batches of all ranks; gradients flow to
every rank's features. Micro-batches that are accumulated are contrasted each for itself.

In evaluation the loss and the recalls are over the whole set, so they do not depend on the batch size. Every caption of
an image is a pair of it there.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.step_records import (
    BatchSize,
    Embeddings,
    ObjectiveOutput,
    PlanSize,
    SampleLosses,
    Term,
)
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.metrics.content_ids import content_ids
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.metrics.tasks.retrieval import RetrievalRecalls
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.precision import region

Kind = Literal["softmax", "sigmoid"]
TERM = "contrastive"
_LARGEST_SCALE = 100.0  # CLIP, section 2.5
_START = {"softmax": (1 / 0.07, 0.0), "sigmoid": (10.0, -10.0)}  # scale and bias; CLIP section 2.5, SigLIP section 3.2
_ROWS = 1024  # of the similarity matrix at a time, so memory does not grow with the square of the set


class Compared(NamedTuple):
    """Contrasted pairs."""

    output: ObjectiveOutput
    image_BD: Tensor  # fp32, rows of length 1
    text_BD: Tensor  # likewise


class Contrastive(Objective):
    """Contrasts the images and texts of pairs; samples that lack one of the two are left out.

    Args:
        spec: the backbone's dimensions.
        kind: softmax as CLIP, sigmoid as SigLIP.
        embedding_dim: width of the common space; null takes the backbone's width.
        weight: of the term in the task loss.

    Raises:
        UserError: an embedding_dim below 1.
    """

    separate_passes = frozenset({"pair"})

    def __init__(
        self, spec: BackboneSpec, kind: Kind = "softmax", embedding_dim: int | None = None, weight: float = 1.0
    ) -> None:
        super().__init__()
        width = spec.dim if embedding_dim is None else embedding_dim
        check_number("embedding_dim", width, least=1)
        scale, bias = _START[kind]
        self.kind = kind
        self.weight = weight
        self.num_patches = spec.num_patches
        self.image_projection = nn.Linear(spec.dim, width, bias=False)
        self.text_projection = nn.Linear(spec.dim, width, bias=False)
        self.log_scale = _Scalar(math.log(scale))
        self.logit_bias = _Scalar(bias) if kind == "sigmoid" else None
        self.num_classes = {}

    def can_use(self, batch: Batch) -> bool:
        """Return whether a batch holds pairs; while the ranks run the same step, those of all ranks."""
        if not self.spans_ranks:
            return batch.pairs > 0
        has_pairs = torch.tensor(batch.pairs > 0, dtype=torch.int64, device=self.log_scale.value.device)
        dist.all_reduce(has_pairs, op=dist.ReduceOp.MIN)
        return bool(has_pairs)

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Encode the pairs and contrast them."""
        if not self.can_use(batch):
            raise UserError(
                "Contrastive needs images with their texts, and this batch has none: choose a set of pairs, or "
                "MaskedModelling for images or texts alone"
            )
        return self.compare(backbone, batch.first(batch.pairs)).output

    def compare(self, backbone: Backbone, pairs: Batch) -> "Compared":
        """Encode pairs and contrast them; a batch that holds nothing else."""
        output = backbone(*pairs[:3], separate=True)
        image_BD = self.embed_images(output.pool(Modality.IMAGE))
        text_BD = self.embed_texts(output.pool(Modality.TEXT))
        loss = self.loss(image_BD, text_BD)
        terms = ObjectiveOutput(
            {TERM: Term(loss, self.weight, len(image_BD))},
            {},
            output.plans,
            output.num_tokens,
            output.attention,
            embeddings=None if self.training else self._keep(backbone, pairs, image_BD, text_BD),
            of_samples={} if self.training else {TERM: self._of_samples(pairs, image_BD, text_BD)},
        )
        return Compared(terms, image_BD, text_BD)

    def _keep(self, backbone: Backbone, pairs: Batch, image_BD: Tensor, text_BD: Tensor) -> Embeddings:
        """Keep what is compared over a whole set; equal images are one image, equal texts one text.

        Further captions are encoded alone, which gives the features that they have apart from their image.
        """
        further = pairs.further_captions
        if further is not None:
            texts = backbone(None, further.text_ML, further.text_mask_ML)
            image_BD = torch.cat([image_BD, image_BD[list(further.pairs)]])
            text_BD = torch.cat([text_BD, self.embed_texts(texts.pool(Modality.TEXT))])
        every = pairs.each_caption()
        assert every.images_BRYX is not None and every.text_BL is not None and every.text_mask_BL is not None
        words = [text_L[mask_L] for text_L, mask_L in zip(every.text_BL.cpu(), every.text_mask_BL.cpu(), strict=True)]
        return Embeddings(
            every.keys,
            image_BD.detach().cpu(),
            text_BD.detach().cpu(),
            content_ids(every.images_BRYX.cpu()),
            content_ids(words),
        )

    def _of_samples(self, pairs: Batch, image_BD: Tensor, text_BD: Tensor) -> SampleLosses:
        """Return the loss of each pair among those of the batch; right is the share of both ways that find the own."""
        row_B, scale = torch.arange(len(image_BD), device=image_BD.device), self.log_scale.value.exp()
        with region(self.precision, "losses", image_BD.device.type) as cast:
            image_BD, text_BD = cast(image_BD), cast(text_BD)
            similar_BB = image_BD @ text_BD.T
            if self.logit_bias is None:
                logits_BB = scale.clamp(max=_LARGEST_SCALE) * similar_BB
                both = [F.cross_entropy(each_BB, row_B, reduction="none") for each_BB in (logits_BB, logits_BB.T)]
                loss_B = (both[0] + both[1]) / 2
            else:
                loss_B = sigmoid_losses(image_BD, text_BD, scale, self.logit_bias.value)
        found_B = [(each_BB.argmax(dim=1) == row_B).float() for each_BB in (similar_BB, similar_BB.T)]
        return SampleLosses(pairs.keys, row_B, loss_B.detach(), (found_B[0] + found_B[1]) / 2)

    def size(self, batch: Batch) -> BatchSize:
        """Return the number of pairs, and tokens of their pass."""
        pairs = batch.first(batch.pairs)
        num_pairs = torch.full((), pairs.num_samples, device=batch.device)
        return BatchSize({TERM: num_pairs}, {"pair": PlanSize.of_pass(num_pairs, pairs.text_mask_BL, self.num_patches)})

    def measures(self, prefix: str = "", weight: float = 1.0) -> list[Measure]:
        """Add retrieval, with the loss over the whole set."""

        def terms(embeddings: Embeddings) -> dict[str, Term]:
            of_set = Term(self.loss_of_set(embeddings), self.weight * weight, len(embeddings.keys))
            return {prefix + TERM: of_set}

        return [*super().measures(prefix, weight), RetrievalRecalls(terms)]

    def head_costs(self, predictions: Mapping[str, int]) -> Costs:
        """4 D W FLOPs for the projections of a pair, and its products with all others of the batch of one rank."""
        pairs, width = sum(predictions.values()), self.image_projection.out_features
        matrices = 2 if self.kind == "softmax" else 1
        return Costs(
            heads=4.0 * pairs * width * self.image_projection.in_features + 2.0 * matrices * pairs**2 * width,
            kept_by_norms=float(matrices * pairs**2 + 4 * pairs * width),
            kept_by_products=2.0 * pairs * self.image_projection.in_features,
        )

    def embed_images(self, features_BD: Tensor) -> Tensor:
        """Return pooled features of images in the common space, fp32, rows of length 1."""
        return self._embed(features_BD, self.image_projection)

    def embed_texts(self, features_BD: Tensor) -> Tensor:
        """Return pooled features of texts in the common space, fp32, rows of length 1."""
        return self._embed(features_BD, self.text_projection)

    def loss(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """Return the mean over this rank's pairs; in a training step the pairs of all ranks are the negatives."""
        with region(self.precision, "losses", image_BD.device.type) as cast:
            image_BD, text_BD = cast(image_BD), cast(text_BD)
            image_ND, text_ND, first = image_BD, text_BD, 0
            if self.spans_ranks:
                (image_ND, first), (text_ND, _) = _gather(image_BD), _gather(text_BD)
            return self._rows_loss(image_BD, text_BD, image_ND, text_ND, first)

    @torch.no_grad()
    def loss_of_set(self, embeddings: Embeddings) -> Tensor:
        """Return the loss over all pairs of an evaluation, fp64."""
        image_ND, text_ND = (each.to(self.log_scale.value.device) for each in (embeddings.image_ND, embeddings.text_ND))
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(image_ND), _ROWS):
            rows = slice(start, start + _ROWS)
            mean = self._rows_loss(image_ND[rows], text_ND[rows], image_ND, text_ND, start)
            total += mean.double().cpu() * len(image_ND[rows])
        return total / len(image_ND)

    def _rows_loss(self, image_BD: Tensor, text_BD: Tensor, image_ND: Tensor, text_ND: Tensor, first: int) -> Tensor:
        if self.logit_bias is None:
            scale = self.log_scale.value.exp().clamp(max=_LARGEST_SCALE)
            return softmax_contrast(image_BD, text_BD, image_ND, text_ND, scale, first)
        return sigmoid_contrast(image_BD, text_ND, self.log_scale.value.exp(), self.logit_bias.value, first)

    def _embed(self, features_BD: Tensor, projection: nn.Linear) -> Tensor:
        with region(self.precision, "heads", features_BD.device.type) as cast:
            return F.normalize(projection(cast(features_BD)).float(), dim=-1)


def softmax_contrast(
    image_BD: Tensor, text_BD: Tensor, image_ND: Tensor, text_ND: Tensor, scale: Tensor, first: int = 0
) -> Tensor:
    """Return the mean cross-entropy of finding the other half of each of B pairs among N, both ways.

    Args:
        image_BD: of the pairs concerned, rows of length 1, as are all.
        text_BD: of the same.
        image_ND: candidates; the pairs concerned are its rows from `first` on.
        text_ND: candidates.
        scale: of the similarities, a scalar.
        first: row of the first pair concerned.
    """
    target_B = torch.arange(first, first + len(image_BD), device=image_BD.device)
    to_text = F.cross_entropy(scale * image_BD @ text_ND.T, target_B)
    to_image = F.cross_entropy(scale * text_BD @ image_ND.T, target_B)
    return (to_text + to_image) / 2


def sigmoid_contrast(image_BD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
    """Return the mean of `sigmoid_losses`."""
    return sigmoid_losses(image_BD, text_ND, scale, bias, first).mean()


def sigmoid_losses(image_BD: Tensor, text_ND: Tensor, scale: Tensor, bias: Tensor, first: int = 0) -> Tensor:
    """Return for each of B images the sum over N texts of -log sigmoid(z (scale <image, text> + bias)).

    z is 1 where the text is the image's own, else -1. `first` is as in `softmax_contrast`.
    """
    sign_BN = torch.full((len(image_BD), len(text_ND)), -1.0, device=image_BD.device)
    row_B = torch.arange(len(image_BD), device=image_BD.device)
    sign_BN[row_B, first + row_B] = 1.0
    return -F.logsigmoid(sign_BN * (scale * image_BD @ text_ND.T + bias)).sum(dim=1)


class _Scalar(nn.Module):
    """One learned number that starts at a value of its own."""

    def __init__(self, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.value = nn.Parameter(torch.empty(()))


def _gather(own_BD: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, with gradient, and where this rank's begin; ranks may have different numbers."""
    counts = [torch.zeros(1, dtype=torch.int64, device=own_BD.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(own_BD)], device=own_BD.device))
    numbers = [int(count) for count in counts]
    padded = F.pad(own_BD, (0, 0, 0, max(numbers) - len(own_BD)))
    rows = [each[:number] for each, number in zip(all_gather(padded), numbers, strict=True)]
    return torch.cat(rows), sum(numbers[: dist.get_rank()])
