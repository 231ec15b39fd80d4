"""Features and metrics of a sample do not depend on its batch; if they do, the run reports it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.step_records import NamedPlan, ObjectiveOutput
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.dispatch import Capacity, ModalityFactors
from lightning_moevlm.model.layers import batch_dependence
from lightning_moevlm.model.metrics import DropRates
from lightning_moevlm.model.routers import ExpertChoiceRouter, SoftRouter, TopKRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.routing import limited, top_1_plan
from tests.small_model import pair_batch, small_limoe, small_moma, small_vl_moe
from tests.small_run import BACKBONE, SMALL

CAPACITY = f"{BACKBONE}.moe.init_args.capacity"


def features(backbone: Backbone, batch_size: int) -> dict[str, Tensor]:
    """Of 16 pairs, predicted in batches of this size."""
    module = VisionLanguageModule(backbone, init_std=0.3).eval()
    whole = pair_batch(16)
    parts = [
        whole._replace(
            images_BRYX=None if whole.images_BRYX is None else whole.images_BRYX[start : start + batch_size],
            text_BL=None if whole.text_BL is None else whole.text_BL[start : start + batch_size],
            text_mask_BL=None if whole.text_mask_BL is None else whole.text_mask_BL[start : start + batch_size],
            keys=whole.keys[start : start + batch_size],
        )
        for start in range(0, 16, batch_size)
    ]
    with torch.no_grad():
        predicted = [module.predict_step(part, 0) for part in parts]
    return {name: torch.cat([each[name] for each in predicted]) for name in predicted[0]}


def largest_difference(backbone: Backbone) -> float:
    """Of a feature, between batches of 2 and of 16."""
    few, many = features(backbone, 2), features(backbone, 16)
    assert few.keys() == many.keys() == {"image", "text", "pair"}
    return max(float((few[name] - many[name]).abs().max()) for name in few)


@pytest.mark.parametrize("build", [small_vl_moe, small_limoe, small_moma])
def test_features_do_not_depend_on_the_batch_size_by_default(build: Callable[..., Backbone]) -> None:
    assert largest_difference(build(capacity=Capacity())) < 1e-4
    assert largest_difference(build(capacity=Capacity(0.5, 0.5))) > 1e-2  # so that this test could see it
    assert largest_difference(build(capacity=Capacity(0.5, 0.5, group_size=1))) < 1e-4


def test_a_model_names_the_causes_of_batch_dependence() -> None:
    def causes(capacity: Capacity | None = None, router: type = TopKRouter) -> tuple[str, ...]:
        return batch_dependence(small_vl_moe(capacity=capacity, router=router))

    shared = ", so samples share the places of experts; null is dropless"
    assert causes() == causes(Capacity()) == causes(Capacity(1.0, 1.0, group_size=1)) == ()
    assert causes(Capacity(1.0, 1.5)) == (f"capacity.eval_factor is 1.5{shared}",)
    assert causes(Capacity(1.0, ModalityFactors(None, 1.5))) == (f"capacity.eval_factor is text 1.5{shared}",)
    assert causes(Capacity(1.0, ModalityFactors(None, None))) == causes(Capacity(1.0, 1.5), SoftRouter) == ()
    (competing,) = causes(router=ExpertChoiceRouter)
    assert competing.startswith("ExpertChoiceRouter lets the tokens of a batch compete")


def test_drop_rates_by_hand() -> None:
    # 4 image tokens, all to expert 0 of 2; factor 0.5: ceil(0.5 * 4 / 2) = 1 place, so 3 of 4 are dropped. A second
    # batch of 6 tokens over both experts in turn, 3 each; ceil(0.5 * 6 / 2) = 2 places: 2 of 6. Together 5 of 10.
    one = limited(top_1_plan(torch.zeros(4, 2)), 0.5)
    even = top_1_plan(torch.zeros(6, 2))._replace(expert_N=torch.tensor([0, 1] * 3))
    text = top_1_plan(torch.zeros(4, 2), modality=Modality.TEXT)
    rates = DropRates(["blocks.1.image", "blocks.1.text"])
    passed_over = named("blocks.3.image", one)
    for plans in (
        [named("blocks.1.image", one), named("blocks.1.text", text), passed_over],
        [named("blocks.1.image", limited(even, 0.5))],
    ):
        rates.update(ObjectiveOutput({}, {}, tuple(plans), 0))
    assert rates.rates() == {(1, Modality.IMAGE): 0.5, (1, Modality.TEXT): 0.0}


def named(layer: str, plan: object) -> NamedPlan:
    return NamedPlan("pair", 1, layer, (Modality.IMAGE,), plan)  # type: ignore[arg-type]


def test_drop_rates_of_evaluation_are_logged_where_a_limit_holds(caplog: pytest.LogCaptureFixture) -> None:
    def validated(capacity: Capacity) -> tuple[dict[str, float], str]:
        module = VisionLanguageModule(small_vl_moe(capacity=capacity), init_std=0.3)
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.validate(module, DataLoader([pair_batch()] * 2, batch_size=None), verbose=False)  # type: ignore[arg-type]
        rates = {key: float(rate) for key, rate in trainer.callback_metrics.items() if "drop_rate" in key}
        return rates, caplog.text

    rates, told = validated(Capacity(0.5))
    assert rates == {} and "data.batch_size" not in told
    rates, told = validated(Capacity(None, 0.5))
    assert set(rates) == {"val/drop_rate/block1/image", "val/drop_rate/block1/text"}
    assert all(0 < rate < 1 for rate in rates.values())
    assert "Metrics of a sample depend on its batch, so data.batch_size changes them: capacity.eval_factor" in told


def test_predict_reports_batch_dependent_features(
    moevlm: Callable[..., str], workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = "--trainer.callbacks=[lightning_moevlm.training.callbacks.FeatureWriter]"

    def metadata(*options: str) -> tuple[str, dict[str, str]]:
        moevlm("predict", *SMALL, writer, "--trainer.limit_predict_batches=1", *options)
        with safe_open(workplace / "runs/features/features-0000-000000.safetensors", "pt") as file:
            return caplog.text, file.metadata()

    told, kept = metadata()
    assert "Features" not in told and "depends_on_batch" not in kept
    told, kept = metadata(f"{CAPACITY}.eval_factor=1.5")
    assert "Features of a sample depend on its batch, so data.batch_size changes them: capacity.eval" in told
    assert kept["depends_on_batch"].startswith("capacity.eval_factor is 1.5")
