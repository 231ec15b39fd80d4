"""Masked data modelling: one objective on images, texts and pairs (BEiT-3, arXiv 2208.10442, section 2.2; VL-MoE, 3.3).

    text        masked language modelling on texts alone
    image       masked image modelling on images alone
    pair_text   masked words of a text whose image is seen, some patches hidden
    pair_image  masked patches of an image whose text is seen, some words hidden

Pairs are used three times: as images, as texts and as pairs. Images and texts that come alone join those of pairs.
Each term is the mean over its masked positions, in nats for classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import MASK, SPECIAL_TOKENS
from lightning_moevlm.contracts.step_records import (
    AttentionLogits,
    BatchSize,
    NamedPlan,
    ObjectiveOutput,
    PlanSize,
    Predictions,
    SampleLosses,
    Term,
)
from lightning_moevlm.model.backbones import Backbone, BackboneOutput, BackboneSpec
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.objectives.targets.image_targets import (
    ImageTargets,
    PixelTargets,
    TargetLoss,
    cross_entropy,
)
from lightning_moevlm.model.objectives.text_head import TextHead
from lightning_moevlm.model.precision import region


@dataclass(frozen=True)
class TermWeights:
    """Weight of each term in the task loss; null leaves the term, and the forward pass only it needs, out."""

    text: float | None = 1.0
    image: float | None = 1.0
    pair_text: float | None = 1.0
    pair_image: float | None = 1.0


@dataclass(frozen=True)
class MaskRatios:
    """Share of hidden positions, in (0, 1). BEiT-3: 15 % of text alone, 50 % of text in pairs, 40 % of patches."""

    text: float = 0.15
    pair_text: float = 0.5
    image: float = 0.4

    def __post_init__(self) -> None:
        """Refuse ratios that hide nothing or everything."""
        for name, ratio in vars(self).items():
            if not 0 < ratio < 1:
                raise UserError(f"mask ratio {name} is {ratio}: choose a share between 0 and 1, both exclusive")


class MaskedText(NamedTuple):
    """input_BL: ids with [MASK] at hidden positions. hidden_BL: bool."""

    input_BL: Tensor
    hidden_BL: Tensor


class MaskedModelling(Objective):
    """Masked data modelling with pluggable image targets.

    Args:
        spec: the backbone's dimensions.
        image_targets: factory (spec) -> ImageTargets; pixels by default.
        weights: weight of each term.
        ratios: share of hidden positions.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        image_targets: Callable[[BackboneSpec], ImageTargets] = PixelTargets,
        weights: TermWeights = TermWeights(),
        ratios: MaskRatios = MaskRatios(),
    ) -> None:
        super().__init__()
        if all(weight is None for weight in vars(weights).values()):
            raise UserError("every weight of MaskedModelling is null: give at least one term a weight")
        self.spec = spec
        self.weights = weights
        self.pairs_reach_all = None not in vars(weights).values()
        self.ratios = ratios
        self.image_targets = image_targets(spec)
        self.text_head = TextHead(spec.dim, spec.vocab_size)
        self.image_head = nn.Linear(spec.dim, self.image_targets.output_dim)
        self.num_classes = {"text": spec.vocab_size, "pair_text": spec.vocab_size}
        if self.image_targets.num_classes is not None:
            self.num_classes |= dict.fromkeys(("image", "pair_image"), self.image_targets.num_classes)

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a causal backbone: patches do not see the text, and a hidden word would see half of its sentence."""
        if backbone.causal:
            raise UserError(
                f"MaskedModelling cannot train a causal {type(backbone).__name__}, in which a hidden word does not see "
                "the words after it: choose the objective NextToken, or a model that is not causal"
            )

    def can_use(self, batch: Batch) -> bool:
        """Return whether a weighted term has its modality."""
        has_text, has_image = batch.text_BL is not None, batch.images_BRYX is not None
        of_text, of_image = self.weights.text is not None, self.weights.image is not None
        return (has_text and of_text) or (has_image and of_image) or (batch.pairs > 0 and self._uses_pairs())

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Run the passes that have a term; a batch without one modality skips what needs it."""
        step = _Step(self, backbone)
        images, text, text_mask = batch.images_BRYX, batch.text_BL, batch.text_mask_BL
        if text is not None and text_mask is not None and self.weights.text is not None:
            masked = self._masked_text("text", self.ratios.text, text, text_mask, batch.text_keys, draws)
            hidden = _Hidden.find(masked.hidden_BL, batch.text_keys)
            output = step.encode(None, masked.input_BL, text_mask, None)
            step.add_text("text", self.weights.text, output, text, hidden)
        if images is not None and self.weights.image is not None:
            hidden = self._hidden_patches("image", images, batch.image_keys, draws)
            output = step.encode(images, None, None, hidden.mask_BS)
            step.add_image("image", self.weights.image, output, images, hidden)
        pairs = batch.pairs
        if images is not None and text is not None and text_mask is not None and pairs and self._uses_pairs():
            images, text, text_mask, keys = images[:pairs], text[:pairs], text_mask[:pairs], batch.keys[:pairs]
            masked = self._masked_text("pair_text", self.ratios.pair_text, text, text_mask, keys, draws)
            words = None if self.weights.pair_text is None else _Hidden.find(masked.hidden_BL, keys)
            hidden = self._hidden_patches("pair_image", images, keys, draws)
            output = step.encode(images, masked.input_BL, text_mask, hidden.mask_BS)
            if self.weights.pair_text is not None and words is not None:
                step.add_text("pair_text", self.weights.pair_text, output, text, words)
            if self.weights.pair_image is not None:
                step.add_image("pair_image", self.weights.pair_image, output, images, hidden)
        if not step.terms:
            raise UserError(
                "this batch has no modality that a weighted term of MaskedModelling can use: give the terms of the "
                "data's modalities a weight (image-only data: image; text-only data: text)"
            )
        return ObjectiveOutput(
            step.terms,
            step.predictions,
            tuple(step.plans),
            step.num_tokens,
            tuple(step.attention),
            step.log_partitions,
            of_samples=step.of_samples,
        )

    def size(self, batch: Batch) -> BatchSize:
        """Return hidden words and patches by term, and tokens by pass; nothing of them is drawn."""
        pairs, device = batch.pairs, batch.device
        num_images = torch.full((), len(batch.image_keys), device=device)  # torch.tensor would wait for its copy
        num_hidden = _num_hidden_patches(self.spec.num_patches, self.ratios.image)
        words: dict[str, Tensor] = {}
        if batch.text_BL is not None and batch.text_mask_BL is not None:
            word_BL = batch.text_mask_BL & (batch.text_BL >= len(SPECIAL_TOKENS))
            words = {
                "text": _num_hidden_words(word_BL, self.ratios.text).sum(),
                "pair_text": _num_hidden_words(word_BL[:pairs], self.ratios.pair_text).sum(),
            }
        patches = {"image": num_images * num_hidden, "pair_image": torch.full_like(num_images, pairs * num_hidden)}
        none = torch.zeros_like(num_images)
        asked = [name for name, weight in vars(self.weights).items() if weight is not None]
        predictions = {name: (words | patches).get(name, none) for name in asked}
        passes = {
            "text": PlanSize.of_pass(none, batch.text_mask_BL, self.spec.num_patches),
            "image": PlanSize.of_pass(num_images, None, self.spec.num_patches),
            "pair": PlanSize.of_pass(
                torch.full_like(num_images, pairs), batch.first(pairs).text_mask_BL, self.spec.num_patches
            ),
        }
        runs = {"text": "text" in asked, "image": "image" in asked, "pair": self._uses_pairs()}
        return BatchSize(predictions, {source: size for source, size in passes.items() if runs[source]})

    def head_costs(self, predictions: Mapping[str, int]) -> Costs:
        """Those of both heads; a patch keeps its features, its output and its target."""
        words = sum(number for name, number in predictions.items() if name in ("text", "pair_text"))
        patches = sum(predictions.values()) - words
        width, out = self.image_head.in_features, self.image_head.out_features
        image = Costs(
            heads=2.0 * patches * width * out,
            kept_by_norms=2.0 * patches * out,
            kept_by_products=float(patches * width),
        )
        return self.text_head.costs(words) + image

    def text_logits(self, features_MD: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return logits over the vocabulary, sharing the embedding matrix."""
        with region(self.precision, "heads", features_MD.device.type) as cast:
            return self.text_head.logits(cast(features_MD), cast(embedding_VD))

    def image_output(self, features_MD: Tensor) -> Tensor:
        """Return the image targets, per patch."""
        with region(self.precision, "heads", features_MD.device.type) as cast:
            output_MO: Tensor = self.image_head(cast(features_MD))
            return output_MO

    def _masked_text(
        self, term: str, ratio: float, text_BL: Tensor, text_mask_BL: Tensor, keys: Sequence[str], draws: Draws
    ) -> MaskedText:
        noise_BL = draws.uniform(term, keys, text_BL.shape[1]).to(text_BL.device, non_blocking=True)
        return mask_text(text_BL, text_mask_BL, ratio, noise_BL)

    def _hidden_patches(self, term: str, images_BRYX: Tensor, keys: tuple[str, ...], draws: Draws) -> "_Hidden":
        noise_BP = draws.uniform(term, keys, self.spec.num_patches)
        return _Hidden.find(mask_patches(noise_BP, self.ratios.image), keys).to(images_BRYX.device)

    def _uses_pairs(self) -> bool:
        return self.weights.pair_text is not None or self.weights.pair_image is not None


class _Step:
    """Collects what the passes of one step produce."""

    def __init__(self, objective: MaskedModelling, backbone: Backbone) -> None:
        self.objective = objective
        self.backbone = backbone
        self.terms: dict[str, Term] = {}
        self.predictions: dict[str, Predictions] = {}
        self.log_partitions: dict[str, Tensor] = {}
        self.of_samples: dict[str, SampleLosses] = {}
        self.plans: list[NamedPlan] = []
        self.attention: list[AttentionLogits] = []
        self.num_tokens = 0
        self.image_target: Tensor | None = None  # of the batch; two terms need it, and pairs are its first rows

    def encode(
        self, images: Tensor | None, text: Tensor | None, text_mask: Tensor | None, image_mask: Tensor | None
    ) -> BackboneOutput:
        output: BackboneOutput = self.backbone(images, text, text_mask, image_mask)
        self.plans.extend(output.plans)
        self.attention.extend(output.attention)
        self.num_tokens += output.num_tokens
        return output

    def add_text(self, name: str, weight: float, output: BackboneOutput, text_BL: Tensor, hidden: "_Hidden") -> None:
        features_MD = output.features(Modality.TEXT)[hidden.places]
        target_M = text_BL[hidden.places]
        logits_MV = self.objective.text_logits(features_MD, self.backbone.text_embedding_VD)
        with region(self.objective.precision, "losses", logits_MV.device.type) as cast:
            loss = cross_entropy(cast(logits_MV), target_M)
        self.predictions[name] = Predictions(logits_MV.detach().argmax(dim=-1), target_M)
        self._add(name, Term(loss.mean, weight, len(target_M)), loss, hidden)

    def add_image(self, name: str, weight: float, output: BackboneOutput, images: Tensor, hidden: "_Hidden") -> None:
        targets = self.objective.image_targets
        if self.image_target is None:
            self.image_target = targets(images)
        target_M = self.image_target[hidden.places]
        output_MO = self.objective.image_output(output.features(Modality.IMAGE)[hidden.places])
        with region(self.objective.precision, "losses", output_MO.device.type) as cast:
            loss = targets.loss(cast(output_MO), target_M)
        predictions = targets.predictions(output_MO.detach(), target_M)
        if predictions is not None:
            self.predictions[name] = predictions
        self._add(name, Term(loss.mean, weight, len(target_M)), loss, hidden)

    def _add(self, name: str, term: Term, loss: TargetLoss, hidden: "_Hidden") -> None:
        self.terms[name] = term
        if loss.log_partition_M is not None:
            self.log_partitions[name] = loss.log_partition_M
        if self.objective.training or loss.loss_M is None:
            return
        classes = self.predictions.get(name)
        right_M = None if classes is None else (classes.predicted_M == classes.target_M).float()
        self.of_samples[name] = SampleLosses(hidden.keys, hidden.places[0], loss.loss_M.detach(), right_M)


class _Hidden(NamedTuple):
    """Hidden positions of a pass.

    mask_BS: bool.
    places: sample and position of each of the M that are hidden, int64 (M,) both.
    keys: of the samples.
    """

    mask_BS: Tensor
    places: tuple[Tensor, Tensor]
    keys: tuple[str, ...]

    @staticmethod
    def find(mask_BS: Tensor, keys: tuple[str, ...]) -> "_Hidden":
        """Find the places once for all that read them: off the CPU the host waits for their number."""
        sample_M, position_M = mask_BS.nonzero(as_tuple=True)
        return _Hidden(mask_BS, (sample_M, position_M), keys)

    def to(self, device: torch.device) -> "_Hidden":
        """Return them on another device."""
        mask_BS, sample_M, position_M = (each.to(device, non_blocking=True) for each in (self.mask_BS, *self.places))
        return _Hidden(mask_BS, (sample_M, position_M), self.keys)


def mask_text(text_BL: Tensor, text_mask_BL: Tensor, ratio: float, noise_BL: Tensor) -> MaskedText:
    """Hide words: in each text round(ratio x words) of them, at least one; special tokens and padding never.

    A hidden word becomes [MASK] always; BERT's 80/10/10 mixture is not used. noise_BL: uniform in [0, 1); the words
    with the least are hidden.
    """
    word_BL = text_mask_BL & (text_BL >= len(SPECIAL_TOKENS))
    rank_BL = torch.where(word_BL, noise_BL, 2.0).argsort(dim=-1, stable=True).argsort(dim=-1)
    hidden_BL = word_BL & (rank_BL < _num_hidden_words(word_BL, ratio).unsqueeze(-1))
    return MaskedText(torch.where(hidden_BL, MASK, text_BL), hidden_BL)


def mask_patches(noise_BP: Tensor, ratio: float) -> Tensor:
    """Hide round(ratio x P) patches of each image, at least one, those with the least noise: bool (B, P)."""
    rank_BP = noise_BP.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank_BP < _num_hidden_patches(noise_BP.shape[1], ratio)


def _num_hidden_words(word_BL: Tensor, ratio: float) -> Tensor:
    """Return how many words of each text are hidden, int64 (B,): at least one, where there is one."""
    num_B = word_BL.sum(dim=-1)
    return (num_B.float() * ratio).round().long().clamp(min=1).minimum(num_B)


def _num_hidden_patches(num_patches: int, ratio: float) -> int:
    return max(1, round(ratio * num_patches))
