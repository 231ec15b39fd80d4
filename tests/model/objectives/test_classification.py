"""Classes of images: the loss by hand, images without a class, and what is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Answers, Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.objectives import Classification, Draws
from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import cut, pair_batch, small_limoe, small_vl_moe
from tests.training.test_evaluation import measured


@pytest.fixture
def classes(tmp_path: Path) -> str:
    path = tmp_path / "classnames.txt"
    path.write_text("cat\ndog\ncar\n")
    return str(path)


def labelled(*labels: str) -> Batch:
    """Pairs with classes; an empty one is none."""
    given = tuple((label,) if label else () for label in labels)
    return pair_batch(len(labels))._replace(answers=Answers(given, ("",) * len(labels)))


@pytest.mark.parametrize("build", [small_limoe, small_vl_moe])
def test_the_loss_by_hand(build: type, classes: str) -> None:
    backbone, batch = build().eval(), labelled("dog", "", "2", "cat")
    objective = Classification(backbone.spec, classes).eval()
    output = objective(backbone, batch, Draws(0))
    pooled = backbone(batch.images_BRYX).pool(Modality.IMAGE)  # the texts are not looked at
    logits = objective.out(objective.norm(pooled))[[0, 2, 3]]
    assert output.terms["class"].num_predictions == 3
    assert torch.allclose(output.terms["class"].raw, F.cross_entropy(logits, torch.tensor([1, 2, 0])))
    assert output.predictions["class"].target_M.tolist() == [1, 2, 0]
    assert torch.allclose(output.log_partitions["class"], logits.logsumexp(dim=1))
    size = objective.size(batch)
    assert int(size.predictions["class"]) == 3 and size.passes["image"].tokens_A.tolist() == [16, 0]


def test_images_without_a_class_train_nothing(classes: str) -> None:
    objective = Classification(small_limoe().spec, classes)
    output = objective(small_limoe(), labelled("", ""), Draws(0))
    assert output.terms["class"].num_predictions == 0 and float(output.terms["class"].raw) == 0.0


def test_evaluation_does_not_depend_on_the_batch_size(classes: str) -> None:
    module = VisionLanguageModule(small_limoe(), partial(Classification, classes=classes), init_std=0.3)
    whole = labelled(*["cat", "dog", "", "car", "dog"] * 5)
    batches = [
        part._replace(answers=whole.answers.select(range(start, start + part.num_samples)))
        for start, part in zip(range(0, 25, 4), cut(whole, 4), strict=True)
    ]
    expected = measured(module, [whole])
    assert {"val/accuracy_class", "val_loss/class"} <= expected.keys() and expected["val/majority_class"] == 0.5
    assert measured(module, batches) == pytest.approx(expected, rel=2e-5)


def test_what_has_no_class_is_refused(classes: str) -> None:
    objective = Classification(small_limoe().spec, classes)
    assert not objective.can_use(pair_batch(2)) and objective.can_use(labelled("cat"))
    with pytest.raises(UserError, match=r"set data\.annotation to the field that names them"):
        objective(small_limoe(), pair_batch(2), Draws(0))
    with pytest.raises(UserError, match="has the class 'bird', which is not one of the 3 names"):
        objective(small_limoe(), labelled("bird"), Draws(0))
