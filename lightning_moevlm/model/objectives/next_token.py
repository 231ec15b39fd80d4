"""Next-token prediction: captions after their image, and texts alone.

    caption   every token of a text but its first, from the image and the tokens before it (prefix language model,
              SimVLM, arXiv 2108.10904, section 3.1: patches see patches, text sees patches and earlier text)
    text      every token of a text without an image, from the tokens before it

With `answers_only`, a text is a question, [EOS] and its answer (`data.append_answer`), and what follows the first [EOS]
alone is predicted (LLaVA, arXiv 2304.08485, section 4.2). Of conversations of a model's own processor (`data.chat`)
always answers alone are, those of all turns.

Each term is the mean over predicted tokens, [EOS] included, in nats. Evaluation predicts every caption of an image. A
backbone with a head of its own predicts by it. It needs no `causal: true`: the mask is that of this pass. Its routers
must not look ahead all the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch, JoinedChats, join_chats
from lightning_moevlm.contracts.model_card import Costs
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.special_tokens import EOS, PAD
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
from lightning_moevlm.model.layers import check_causal
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.metrics.tasks.perplexity import Perplexity
from lightning_moevlm.model.objectives.draws import Draws
from lightning_moevlm.model.objectives.objective import Objective
from lightning_moevlm.model.objectives.targets.image_targets import cross_entropy
from lightning_moevlm.model.objectives.text_head import TextHead
from lightning_moevlm.model.precision import region


class NextToken(Objective):
    """Predicts each token from its image and the tokens before it; images alone are left out.

    Args:
        spec: the backbone's dimensions.
        caption_weight: of the term in the task loss; null leaves it and its forward pass out.
        text_weight: likewise.
        answers_only: predict what follows the first [EOS] of a text alone; null predicts the whole text.

    Raises:
        UserError: no term has a weight.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        caption_weight: float | None = 1.0,
        text_weight: float | None = 1.0,
        answers_only: bool | None = None,
    ) -> None:
        super().__init__()
        weights = {"caption": caption_weight, "text": text_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight is not None}
        if not self.weights:
            raise UserError("both weights of NextToken are null: set caption_weight or text_weight to a number")
        self.answers_only = bool(answers_only)
        self.num_patches = spec.num_patches
        self.text_head = None if spec.predicts_text else TextHead(spec.dim, spec.vocab_size)
        self.head_size = spec.dim * spec.vocab_size
        self.num_classes = dict.fromkeys(self.weights, spec.vocab_size)

    def can_use(self, batch: Batch) -> bool:
        """Return whether a weighted term has a text to predict."""
        return bool(self._parts(batch))

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse routers and capacities that look ahead."""
        check_causal(backbone)

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        """Run the passes that have a term."""
        terms: dict[str, Term] = {}
        predictions: dict[str, Predictions] = {}
        log_partitions: dict[str, Tensor] = {}
        of_samples: dict[str, SampleLosses] = {}
        plans: list[NamedPlan] = []
        attention: list[AttentionLogits] = []
        num_tokens = 0
        for name, part in self._parts(batch).items():
            output, features_MD, target_M, row_M = self._read(backbone, part)
            if not len(target_M):
                raise UserError(
                    "NextToken predicts answers only, and no text of this batch has one: set data.append_answer to "
                    "true, and data.annotation to answers; or set answers_only to null"
                )
            logits_MV = self.logits(backbone, features_MD)
            with region(self.precision, "losses", logits_MV.device.type) as cast:
                loss = cross_entropy(cast(logits_MV), target_M)
            terms[name] = Term(loss.mean, self.weights[name], len(target_M))
            predictions[name] = Predictions(logits_MV.detach().argmax(dim=-1), target_M)
            if loss.log_partition_M is not None:
                log_partitions[name] = loss.log_partition_M
            if not self.training and loss.loss_M is not None:
                right_M = (predictions[name].predicted_M == target_M).float()
                of_samples[name] = SampleLosses(part.keys, row_M, loss.loss_M.detach(), right_M)
            plans.extend(output.plans)
            attention.extend(output.attention)
            num_tokens += output.num_tokens
        if not terms:
            raise UserError(
                "this batch has no text that a weighted term of NextToken can use: set text_weight for texts alone, "
                "caption_weight for pairs; images alone need another objective, such as MaskedModelling"
            )
        return ObjectiveOutput(
            terms, predictions, tuple(plans), num_tokens, tuple(attention), log_partitions, of_samples=of_samples
        )

    def logits(self, backbone: Backbone, features_MD: Tensor) -> Tensor:
        """Return the logits of the token that follows, (M, V)."""
        if self.text_head is None:
            return backbone.predict_text(features_MD)
        with region(self.precision, "heads", features_MD.device.type) as cast:
            return self.text_head.logits(cast(features_MD), cast(backbone.text_embedding_VD))

    def size(self, batch: Batch) -> BatchSize:
        """Return predicted tokens by term, and tokens by pass."""
        none = torch.zeros((), dtype=torch.int64, device=batch.device)
        predictions, passes = {}, {}
        parts = self._parts(batch)
        for name in self.weights:
            source, part = "pair" if name == "caption" else "text", parts.get(name)
            if part is not None and part.chats is not None:
                joined = join_chats(part.chats)
                predictions[name], passes[source] = joined.answer_BS[:, 1:].sum(), _size_of_chats(joined)
                continue
            mask_BL = None if part is None else part.text_mask_BL
            predictions[name] = none if part is None else self._predicted(part).sum()
            num_images = none if mask_BL is None or name == "text" else none + len(mask_BL)
            passes[source] = PlanSize.of_pass(num_images, mask_BL, self.num_patches)
        return BatchSize(predictions, passes)

    def costs(self, backbone: Backbone, batch: Batch) -> Costs | None:
        """Return the costs of a batch; texts without an answer, where one is predicted, end in one of one token.

        Data decide how long answers are. Each token more costs one more of the text head, and nothing else.
        """
        if self.answers_only and batch.text_BL is not None and not bool((batch.text_BL[:, :-1] == EOS).any()):
            text_BL = batch.text_BL.clone()
            text_BL[:, -3] = EOS
            batch = batch._replace(text_BL=text_BL)
        return super().costs(backbone, batch)

    def head_costs(self, predictions: Mapping[str, int]) -> Costs | None:
        """Those of the text head, or of the backbone's matrix for it."""
        count = sum(predictions.values())
        return Costs(heads=2.0 * self.head_size * count) if self.text_head is None else self.text_head.costs(count)

    def measures(self, prefix: str = "", weight: float = 1.0) -> list[Measure]:
        """Add perplexity."""
        return [*super().measures(prefix, weight), Perplexity(f"{prefix}{name}" for name in self.weights)]

    def prompts(self, text_BL: Tensor, text_mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the beginnings that are given, with their mask: [BOS], or the whole question."""
        if not self.answers_only:
            return text_BL[:, :1], text_mask_BL[:, :1]
        is_end_BL = text_BL == EOS
        given_BL = text_mask_BL & (is_end_BL.cumsum(dim=1) - is_end_BL.long() == 0)
        return torch.where(given_BL, text_BL, PAD), given_BL

    def _read(self, backbone: Backbone, part: Batch) -> tuple[BackboneOutput, Tensor, Tensor, Tensor]:
        """Return the output, the features before each predicted token (M, D), these tokens and their rows, (M,)."""
        if part.chats is not None:
            joined = join_chats(part.chats)
            output = backbone.read_chats(joined)
            features_BSD, ids_BS, predicted_BS = output.tokens_BSD, joined.ids_BS, joined.answer_BS[:, 1:]
        else:
            assert part.text_BL is not None and part.text_mask_BL is not None
            output = backbone(*part[:3], causal=True)
            features_BSD, ids_BS, predicted_BS = output.features(Modality.TEXT), part.text_BL, self._predicted(part)
        row_M, place_M = predicted_BS.nonzero(as_tuple=True)  # off the CPU the host waits for their number, once
        return output, features_BSD[row_M, place_M], ids_BS[row_M, place_M + 1], row_M

    def _predicted(self, part: Batch) -> Tensor:
        """Return which tokens after the first are predicted, bool (B, L - 1)."""
        assert part.text_BL is not None and part.text_mask_BL is not None
        after_first_BL = part.text_mask_BL[:, 1:]
        if not self.answers_only:
            return after_first_BL
        return after_first_BL & ~self.prompts(part.text_BL, part.text_mask_BL)[1][:, 1:]

    def _parts(self, batch: Batch) -> dict[str, Batch]:
        """Return what each term is computed on, where there is any: the pairs, and the texts that come alone."""
        pairs, text_BL, mask_BL = batch.pairs, batch.text_BL, batch.text_mask_BL
        parts: dict[str, Batch] = {}
        if pairs and "caption" in self.weights:
            parts["caption"] = batch.first(pairs) if self.training else batch.first(pairs).each_caption()
        if text_BL is not None and mask_BL is not None and len(text_BL) > pairs and "text" in self.weights:
            chats = None if batch.chats is None else batch.chats[pairs:]
            parts["text"] = Batch(None, text_BL[pairs:], mask_BL[pairs:], batch.text_keys[pairs:], chats=chats)
        return parts


def _size_of_chats(joined: JoinedChats) -> PlanSize:
    """Return the size of a pass over conversations."""
    of_BAS = torch.stack([joined.valid_BS & (joined.modality_BS == int(modality)) for modality in Modality], dim=1)
    sequences_A = of_BAS.any(dim=2).sum(dim=0)
    return PlanSize(of_BAS.sum(dim=(0, 2)), sequences_A, joined.valid_BS.any(dim=1).sum())
