"""All captions of an image count in evaluation, as if each were a sample with a copy of the image."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.read.join_batches import join_batches
from lightning_moevlm.data.write.convert.sources.benchmarks.karpathy import KarpathyCaptions
from lightning_moevlm.model.generation import Decoding
from lightning_moevlm.model.objectives import Contrastive, Joint, Matching, NextToken
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import CaptionScores, UnigramPerplexity
from tests.data.benchmarks import karpathy_source
from tests.data.sources import write_set
from tests.training.callbacks.test_caption_scores import captioner

CAPTIONS_OF = {"matching": Matching, "caption": NextToken}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 validation images with 3 captions each."""
    folder = tmp_path_factory.mktemp("karpathy")
    write_set(KarpathyCaptions(karpathy_source(folder), folder, None), folder / "set")
    return folder / "set"


def data_of(root: Path, batch_size: int = 8, num_workers: int = 0) -> ShardDataModule:
    return ShardDataModule(str(root), batch_size, 32, 24, 400, num_workers)


def a_sample_each(batches: list[Batch]) -> list[Batch]:
    """The same captions as one sample each, two a batch."""
    samples: list[Batch] = []
    for batch in batches:
        further, images, texts, masks = batch.further_captions, batch.images_BRYX, batch.text_BL, batch.text_mask_BL
        assert further is not None and images is not None and texts is not None and masks is not None
        for row, key in enumerate(batch.keys):
            own = [place for place, pair in enumerate(further.pairs) if pair == row]
            said = [(texts[row], masks[row]), *((further.text_ML[m], further.text_mask_ML[m]) for m in own)]
            for number, (text_L, mask_L) in enumerate(said):
                name = key if number == 0 else f"{key}#{number}"
                samples.append(Batch(images[row : row + 1], text_L[None], mask_L[None], (name,), 1, ("set",)))
    joined = [samples[start : start + 2] for start in range(0, len(samples), 2)]
    return [
        Batch(
            *(torch.cat([getattr(each, name) for each in part]) for name in ("images_BRYX", "text_BL", "text_mask_BL")),
            tuple(each.keys[0] for each in part),
            len(part),
            ("set",) * len(part),
        )
        for part in joined
    ]


class Apart(ShardDataModule):
    """Hands out a sample for each caption."""

    def val_dataloader(self) -> DataLoader[Batch]:  # type: ignore[override]
        return DataLoader(a_sample_each(list(super().val_dataloader())), batch_size=None)  # type: ignore[arg-type]


def validated(data: ShardDataModule) -> dict[str, float]:
    callbacks = [CaptionScores(Decoding(max_new_tokens=6)), UnigramPerplexity()]
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks
    )
    trainer.validate(captioner(partial(Joint, parts=CAPTIONS_OF)), data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_every_metric_is_that_of_a_sample_for_each_caption(root: Path) -> None:
    expected = validated(Apart(str(root), 8, 32, 24, 400))
    assert {
        "val/recall_at_1/image_to_text", "val_loss/matching_contrastive", "val/matching_accuracy",
        "val/perplexity/caption_caption", "val/unigram_perplexity/caption",
        "val/caption/bleu4", "val/caption_chance/rouge_l",
    } <= expected.keys()  # fmt: skip
    for batch_size in (8, 1):
        found = validated(data_of(root, batch_size))
        of_routing = {"val_loss/load_balance", "val_loss/router_z", "val/total_loss"}  # of the passes of images once
        alike = expected.keys() - of_routing
        assert {key: found[key] for key in alike} == pytest.approx({key: expected[key] for key in alike}, rel=2e-5)


def test_retrieval_equals_a_double_loop_over_images_and_captions(root: Path) -> None:
    module = captioner(Contrastive)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(module, data_of(root, 2), verbose=False)
    images, texts = [], []  # (image, feature)
    with torch.no_grad():
        for batch in a_sample_each(list(data_of(root).val_dataloader())):
            output = module.eval().backbone(*batch[:3], separate=True)
            assert isinstance(module.objective, Contrastive)
            image_BD = module.objective.embed_images(output.pool(Modality.IMAGE))
            text_BD = module.objective.embed_texts(output.pool(Modality.TEXT))
            for key, image_D, text_D in zip(batch.keys, image_BD, text_BD, strict=True):
                texts.append((key.partition("#")[0], text_D))
                images += [] if "#" in key else [(key, image_D)]
    assert (len(images), len(texts)) == (3, 9)

    def recall(queries: list[tuple[str, torch.Tensor]], candidates: list[tuple[str, torch.Tensor]], k: int) -> float:
        hits = 0
        for query, query_D in queries:
            ranked = sorted(candidates, key=lambda one: float(query_D @ one[1]), reverse=True)
            hits += query in [image for image, _ in ranked[:k]]
        return hits / len(queries)

    for k in (1, 5, 10):
        assert float(trainer.callback_metrics[f"val/recall_at_{k}/image_to_text"]) == pytest.approx(
            recall(images, texts, k)
        )
        assert float(trainer.callback_metrics[f"val/recall_at_{k}/text_to_image"]) == pytest.approx(
            recall(texts, images, k)
        )
    # 9 texts, of which 3 are right: 1 - 6/9
    assert float(trainer.callback_metrics["val/chance_recall_at_1/image_to_text"]) == pytest.approx(1 / 3)


def test_workers_send_them_and_training_has_one_caption_alone(root: Path) -> None:
    (here,), (sent,) = (list(data_of(root, 8, workers).val_dataloader()) for workers in (0, 1))
    assert here.further_captions is not None and sent.further_captions is not None
    assert here.further_captions.pairs == sent.further_captions.pairs == (0, 0, 1, 1, 2, 2)
    assert torch.equal(here.further_captions.text_ML, sent.further_captions.text_ML)
    assert all(batch.further_captions is None for batch in data_of(root).train_dataloader())


def test_joined_sources_keep_them(root: Path) -> None:
    (first,), (second,) = (list(data_of(root).val_dataloader()) for _ in range(2))
    joined = join_batches({0: first, 1: second}, ["a", "b"])
    assert joined.further_captions is not None and joined.num_samples == 6
    assert joined.further_captions.pairs == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    parts = [joined.of_sources({name}).further_captions for name in ("a", "b")]
    assert all(torch.equal(part.text_ML, first.further_captions.text_ML) for part in parts)  # type: ignore[union-attr]


def test_a_training_objective_ignores_them(root: Path) -> None:
    (batch,) = data_of(root).val_dataloader()
    module = VisionLanguageModule(captioner().backbone, partial(Joint, parts=CAPTIONS_OF)).train()
    found = [module.compute_losses(each, 0)[1].task for each in (batch, batch._replace(further_captions=None))]
    assert {name: float(term.raw) for name, term in found[0].items()} == {
        name: float(term.raw) for name, term in found[1].items()
    }
