"""Generates captions of held-out images and scores them against all captions of the image."""

from lightning.pytorch import Trainer

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.generation import Decoding
from lightning_moevlm.model.metrics.content_ids import content_ids
from lightning_moevlm.model.metrics.gather import gather_objects
from lightning_moevlm.model.metrics.tasks.caption_scores import score_captions
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.training.callbacks.tasks.parts import HeldOutTask, find_data, find_objective
from lightning_moevlm.training.callbacks.tasks.replies import generate_texts
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_Captions = dict[int, tuple[str, ...]]  # by the content of their image


class CaptionScores(HeldOutTask):
    """Logs BLEU-4, ROUGE-L, chrF and, with the extra `captioning`, CIDEr of generated captions.

    Equal images are one image, and all of their captions are its references. Beside each score stands that of another
    image's caption, which a model that ignores images could give.

    Args:
        decoding: how captions are generated.
        share: of the images that are captioned, chosen by their content; generation takes far longer than the loss.

    Raises:
        UserError: a share outside (0, 1], or an objective without NextToken.
    """

    def __init__(self, decoding: Decoding = Decoding(), share: float = 1.0) -> None:
        check_number("share of CaptionScores", share, above=0, most=1)
        self.decoding = decoding
        self.share = share
        self._generated: dict[int, str] = {}
        self._references: _Captions = {}

    def check(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        """Refuse a model that cannot continue texts."""
        find_objective(module, NextToken, "CaptionScores")
        find_data(trainer, "CaptionScores")

    def add(self, trainer: Trainer, module: VisionLanguageModule, batch: Batch) -> None:
        """Caption the images of a batch."""
        objective = find_objective(module, NextToken, "CaptionScores")
        captioned = module.objective.samples_of(objective, batch)
        pairs = captioned.first(captioned.pairs)
        if pairs.images_BRYX is None or pairs.text_BL is None or pairs.text_mask_BL is None:
            return
        tokenizer = find_data(trainer, "CaptionScores").tokenizer
        images = content_ids(pairs.images_BRYX.cpu())
        further = pairs.further_captions
        known = list(zip(images, pairs.text_BL.tolist(), strict=True))
        if further is not None:
            known += [
                (images[row], text_L) for row, text_L in zip(further.pairs, further.text_ML.tolist(), strict=True)
            ]
        for image, text_L in known:
            self._references[image] = (*self._references.get(image, ()), tokenizer.decode(text_L))
        first = {image: row for row, image in reversed(list(enumerate(images)))}
        chosen = [image for image in first if image < self.share * 2**64]
        rows = sorted(first[image] for image in chosen if image not in self._generated)
        if not rows:
            return
        chosen_pairs = pairs._replace(further_captions=None).select(rows)
        said = generate_texts(trainer, module, objective, chosen_pairs, self.decoding, "CaptionScores")
        self._generated |= {images[row]: caption for row, caption in zip(rows, said, strict=True)}

    def compute(self, trainer: Trainer, module: VisionLanguageModule, stage: str) -> dict[str, float]:
        """Score."""
        everyone = gather_objects((self._generated, self._references))
        self._generated, self._references = {}, {}
        generated: dict[int, str] = {}
        references: _Captions = {}
        for of_rank, given in everyone:
            generated = of_rank | generated
            references |= {image: (*references.get(image, ()), *texts) for image, texts in given.items()}
        if not generated:
            return {}
        images = sorted(generated)
        scored = {metric_keys.CAPTION_SCORE: generated}
        if len(images) > 1:
            others = zip(images, [*images[1:], images[0]], strict=True)
            scored[metric_keys.CAPTION_CHANCE] = {image: references[other][0] for image, other in others}
        return {
            family.key(stage=stage, score=name): value
            for family, captions in scored.items()
            for name, value in score_captions(captions, references).items()
        }
