"""What the installed transformers does with its own balance loss, beside what a loss on plans does.

Each test states a fault that users have reported (threads in the docstrings), as it is in the pinned version. One that
fails after an update is mended there: then the guide is to be changed.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.model.backbones.adopted.build import Origin, build, draw
from lightning_moevlm.model.losses import AuxiliaryLosses, CrossLayerBalance, LoadBalance
from lightning_moevlm.training.step.routing_counts import loss_inputs
from tests.model.backbones.adopted.families import tiny
from tests.model.backbones.adopted.small_hugging_face import OLMOE, QWEN, small_hugging_face
from tests.model.backbones.adopted.test_hugging_face import trained
from tests.small_model import pair_batch
from tests.training.callbacks.asked_run import Tagged

IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))


def plain(config: dict[str, Any]) -> Any:
    """Return a model of transformers as it is."""
    model: nn.Module = build(Origin(None, config, "float32", None, None, True, 300))
    draw(model, 0)
    return model


def loss_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, **options).loss
    return loss


def test_a_coefficient_alone_adds_no_loss() -> None:
    """LlamaFactory#10302, #8054: the coefficient is set, the switch is not."""
    model = plain(OLMOE | {"router_aux_loss_coef": 10.0})
    without = loss_of(model, IDS)
    model.router_aux_loss_coef = 0.0
    assert torch.equal(loss_of(model, IDS), without)
    assert model(input_ids=IDS, labels=IDS).aux_loss is None


def test_the_switch_of_a_wrapper_is_dead() -> None:
    """transformers#48885: vision-language wrappers ignore `config.output_router_logits`; their text_config's acts."""
    model = plain(QWEN)
    without = loss_of(model, IDS)
    model.config.output_router_logits = True
    assert torch.equal(loss_of(model, IDS), without)
    model.config.text_config.output_router_logits = True
    assert loss_of(model, IDS) > without


def test_accumulation_multiplies_their_loss_and_not_ours() -> None:
    """transformers#48690: where the Trainer passes num_items_in_batch, each micro-batch or rank adds its whole loss."""
    coefficient = 0.5
    model = plain(OLMOE | {"router_aux_loss_coef": coefficient})
    items = torch.tensor(IDS.numel() - len(IDS))
    parts = IDS.chunk(2)

    def added(batches: list[Tensor]) -> float:
        """Return what the balance loss adds to a step of these micro-batches, as the Trainer sums them."""
        with_it, without = (
            sum(loss_of(model, ids, num_items_in_batch=items, output_router_logits=on) for ids in batches)
            for on in (True, False)
        )
        return float(with_it - without)

    assert added(list(parts)) / added([IDS]) == pytest.approx(2.0, rel=0.02)

    backbone = small_hugging_face(OLMOE)
    losses = AuxiliaryLosses(load_balance=LoadBalance(weight=coefficient), router_z=None)

    def ours(batches: list[Tensor]) -> float:
        """Return the mean over micro-batches, which is what a step differentiates."""
        values = []
        for ids in batches:
            plans = backbone(None, ids, torch.ones_like(ids, dtype=torch.bool)).plans
            values.append(losses.terms(loss_inputs(backbone, plans, {}, training=True), {})["load_balance"].weighted)
        return float(torch.stack(values).mean())

    assert ours(list(parts)) / ours([IDS]) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_families_with_a_bias_have_neither_a_loss_nor_a_moving_bias(family: str) -> None:
    """transformers#48911, LlamaFactory#9208: router logits are never returned, and no step moves the bias."""
    torch.manual_seed(0)
    model: Any = tiny(family).train()
    output = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert getattr(output, "aux_loss", None) is None
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output.loss.backward()
    optimizer.step()
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    assert not any(bool(bias.any()) for bias in biases)


@pytest.mark.parametrize(
    "config", [OLMOE, QWEN, OLMOE | {"model_type": "mixtral"}], ids=["olmoe", "qwen3_vl_moe", "mixtral"]
)
def test_cross_layer_balance_is_their_loss(config: dict[str, Any]) -> None:
    """Value and gradient are those of their own function on the logits that their own model returns."""
    family = config["model_type"]
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    backbone, batch = small_hugging_face(config), pair_batch()
    output = backbone(batch.images_BRYX if config is QWEN else None, batch.text_BL, batch.text_mask_BL)
    rows = [layer.router.rows() for layer in backbone.layers]
    logits = tuple(named.plan.logits_TE for named in output.plans)
    theirs = modeling.load_balancing_loss_func(logits, 4, 2, output.layout.valid_BS.long())
    losses = AuxiliaryLosses(None, None, cross_layer_balance=CrossLayerBalance())
    ours = losses.terms(loss_inputs(backbone, output.plans, {}, training=True))["cross_layer_balance"].raw
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        *(torch.autograd.grad(each, rows, retain_graph=True) for each in (ours, theirs)), strict=True
    ):
        assert bool(one.any())
        torch.testing.assert_close(one, other)


def test_their_loss_by_name_has_a_receipt_and_ours_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = importlib.import_module("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe")
    monkeypatch.setattr(modeling, "load_balancing_loss_func", None)  # so calling it fails: it cannot act twice
    logger = Tagged()
    losses = AuxiliaryLosses(None, None, cross_layer_balance=CrossLayerBalance(0.01))
    trained(small_hugging_face(), 1, logger, losses)
    receipts = {name: tag for name, tag in logger.tags.items() if name.startswith("receipt/losses.")}
    assert list(receipts) == ["receipt/losses.cross_layer_balance"]
    assert receipts["receipt/losses.cross_layer_balance"].startswith("alive")
    assert "loss/load_balance" not in logger.points
