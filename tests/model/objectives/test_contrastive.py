"""Contrast of images and texts: the losses by hand, the towers apart, the whole set in evaluation."""

import math
from functools import partial
from typing import Literal

import pytest
import torch

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.objectives import Contrastive, Draws
from lightning_moevlm.model.objectives.contrastive import sigmoid_contrast, softmax_contrast
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import cut, pair_batch, small_limoe, small_vl_moe, uneven_batch
from tests.training.test_evaluation import measured

Kind = Literal["softmax", "sigmoid"]


def test_softmax_by_hand() -> None:
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits at scale 2: images to texts [[2, 1.2], [0, 1.6]], texts to images the transpose
    to_text = [math.log(1 + math.exp(1.2 - 2)), math.log(1 + math.exp(0 - 1.6))]
    to_image = [math.log(1 + math.exp(0 - 2)), math.log(1 + math.exp(1.2 - 1.6))]
    loss = softmax_contrast(image, text, image, text, torch.tensor(2.0))
    assert float(loss) == pytest.approx(sum(to_text + to_image) / 4)


def test_sigmoid_by_hand() -> None:
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    logits = {(0, 0): 2 - 1, (0, 1): 1.2 - 1, (1, 0): 0 - 1, (1, 1): 1.6 - 1}
    terms = [math.log(1 + math.exp(-logit if i == j else logit)) for (i, j), logit in logits.items()]
    loss = sigmoid_contrast(image, text, torch.tensor(2.0), torch.tensor(-1.0))
    assert float(loss) == pytest.approx(sum(terms) / 2)


def test_rows_of_a_larger_set_add_up_to_its_loss() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(7, 4), dim=1) for _ in range(2))
    scale, bias = torch.tensor(3.0), torch.tensor(-2.0)
    parts = [slice(0, 2), slice(2, 7)]
    soft = [softmax_contrast(image[p], text[p], image, text, scale, p.start) * (p.stop - p.start) for p in parts]
    assert float(sum(soft) / 7) == pytest.approx(float(softmax_contrast(image, text, image, text, scale)))
    yes_no = [sigmoid_contrast(image[p], text, scale, bias, p.start) * (p.stop - p.start) for p in parts]
    assert float(sum(yes_no) / 7) == pytest.approx(float(sigmoid_contrast(image, text, scale, bias)))


@pytest.mark.parametrize("build", [small_limoe, small_vl_moe])
@pytest.mark.parametrize("causal", [False, True])
def test_image_and_text_of_a_pair_do_not_see_each_other(build: type, causal: bool) -> None:
    backbone = build(causal=causal).eval()
    batch, other = pair_batch(4), pair_batch(4, seed=1)
    with torch.no_grad():
        own = backbone(*batch[:3], separate=True)
        exchanged = backbone(other.images_BRYX, batch.text_BL, batch.text_mask_BL, separate=True)
        together = backbone(other.images_BRYX, batch.text_BL, batch.text_mask_BL)
    num_patches = 4
    assert torch.allclose(own.tokens_BSD[:, num_patches:], exchanged.tokens_BSD[:, num_patches:], atol=1e-6)
    assert not torch.allclose(own.tokens_BSD[:, num_patches:], together.tokens_BSD[:, num_patches:], atol=1e-3)
    assert {plan.source for plan in own.plans} == {"pair"}


@pytest.mark.parametrize("build", [small_limoe, small_vl_moe])
def test_a_pair_apart_is_an_image_alone_and_a_text_alone(build: type) -> None:
    backbone, batch = build().eval(), uneven_batch(5)
    with torch.no_grad():
        pair = backbone(*batch[:3], separate=True)
        image, text = backbone(batch.images_BRYX), backbone(None, batch.text_BL, batch.text_mask_BL)
    assert torch.allclose(pair.pool(Modality.IMAGE), image.pool(Modality.IMAGE), atol=1e-5)
    assert torch.allclose(pair.pool(Modality.TEXT), text.pool(Modality.TEXT), atol=1e-5)


def test_a_shared_mixture_routes_images_and_texts_at_once() -> None:
    objective = Contrastive(small_limoe().spec)
    output = objective(small_limoe(), pair_batch(4), Draws(0))
    assert all(len(plan.modalities) == 2 for plan in output.plans)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_evaluation_is_over_the_whole_set_for_every_batch_size(kind: Kind) -> None:
    module = VisionLanguageModule(small_limoe(), partial(Contrastive, kind=kind), init_std=0.3)
    whole = uneven_batch(25)
    expected = measured(module, [whole])
    recalls = [key for key in expected if "recall_at" in key]
    assert "val/recall_at_1/image_to_text" in recalls and len(recalls) == 12
    for size in (1, 4, 10):
        assert measured(module, cut(whole, size)) == pytest.approx(expected, rel=2e-5)


def test_it_starts_as_published() -> None:
    clip, siglip = (Contrastive(small_limoe().spec, kind=kind) for kind in ("softmax", "sigmoid"))
    assert clip.log_scale.value.item() == pytest.approx(math.log(1 / 0.07)) and clip.logit_bias is None
    assert siglip.log_scale.value.item() == pytest.approx(math.log(10))
    assert siglip.logit_bias is not None and siglip.logit_bias.value.item() == -10.0


def test_every_parameter_has_a_gradient() -> None:
    module = VisionLanguageModule(small_limoe(), partial(Contrastive, kind="sigmoid"), init_std=0.3)
    module.train()
    _, report = module.compute_losses(pair_batch(8), 0)
    report.task_loss.backward()
    without = [name for name, each in module.objective.named_parameters() if each.grad is None or not each.grad.any()]
    assert without == []


def test_a_batch_without_pairs_is_refused() -> None:
    texts = pair_batch(4)._replace(images_BRYX=None, num_pairs=0)
    with pytest.raises(UserError, match="needs images with their texts"):
        Contrastive(small_limoe().spec)(small_limoe(), texts, Draws(0))
