"""Training of named parts: the others stay as they are, whatever acts on the model."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.layers import ModelStabilisers
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance, RouterZ
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import SigmoidBiasRouter
from lightning_moevlm.training import Actions, VisionLanguageModule
from lightning_moevlm.training.actions import QKClip, ReviveDeadExperts
from lightning_moevlm.training.callbacks import Telemetry
from lightning_moevlm.training.callbacks.liveness import Liveness
from lightning_moevlm.training.optim.named_parts import is_in
from tests.small_model import pair_batch, small_decoder
from tests.training.small_fit import fit

CONNECTOR = ("backbone.connector",)
EXPERTS = ("backbone.blocks.*.ffn", "backbone.connector.ffn")


def module(trainable: tuple[str, ...] | None, **options: object) -> VisionLanguageModule:
    backbone = small_decoder(
        top_k=2, router=partial(SigmoidBiasRouter, update_rate=0.1), stabilisers=ModelStabilisers(qk_norm=False)
    )
    chosen = {"losses": AuxiliaryLosses(None, None), "optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)}
    return VisionLanguageModule(backbone, NextToken, trainable=trainable, **(chosen | options))  # type: ignore[arg-type]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        ("backbone.blocks.1.ffn.up.weight", "backbone.blocks.*.ffn", True),
        ("backbone.blocks.1.ffn_norm.weight", "backbone.blocks.*.ffn", False),
        ("backbone.blocks.1.ffn.up.weight", "backbone.*.1.ffn", False),  # blocks is no number
        ("backbone.norm.weight", "backbone.norm.weight", True),
        ("backbone.norm", "backbone.norm.weight", False),
        ("backbone.vision.norm.weight", "backbone.norm", False),
    ],
)
def test_names_of_parts(name: str, part: str, expected: bool) -> None:
    assert is_in(name, part) is expected


@pytest.mark.parametrize("parts", [CONNECTOR, EXPERTS])
def test_the_other_parts_stay_as_they_are_whatever_acts_on_them(parts: tuple[str, ...]) -> None:
    actions = Actions(ReviveDeadExperts(idle_steps=1, every_n_steps=1)) if parts == EXPERTS else Actions()
    model = module(parts, actions=actions)
    before = state(model)
    fit(model, 3, batches=[pair_batch(seed=seed) for seed in range(3)])
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(any(is_in(name, part) for part in parts) for name in moved)
    trained = {name for name, _ in model.named_parameters() if any(is_in(name, part) for part in parts)}
    assert trained <= moved | {name for name in trained if ".router." in name}
    assert "backbone.connector.ffn.router.bias_AE" in moved  # of balancing; that of frozen routers stands still


def test_frozen_parts_have_no_optimiser_state_and_no_gradient() -> None:
    model = module(CONNECTOR)
    grouped = {id(p) for group in model.build_optimizer().param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if id(p) in grouped} == {
        name for name in named if name.startswith("backbone.connector.")
    }
    _, report = model.train().compute_losses(pair_batch(), 0)
    report.total_loss.backward()
    assert {name for name, p in named.items() if p.grad is not None} <= {
        name for name in named if name.startswith("backbone.connector.")
    }


def test_a_trained_part_takes_the_step_that_it_takes_with_all_others() -> None:
    """The first step of plain descent on a part does not depend on the rest being trained."""
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    alone, whole = module(CONNECTOR, **options), module(None, **options)
    for each in (alone, whole):
        fit(each, 1, batches=[pair_batch()])
    for name, value in alone.backbone.connector.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, whole.backbone.connector.state_dict()[name]), name  # type: ignore[union-attr]


@pytest.mark.usefixtures("one_rank")
def test_data_parallel_training_is_the_same() -> None:
    found = []
    for strategy in ("ddp", "auto"):
        model = module(EXPERTS)
        fit(model, 3, batches=[pair_batch()] * 3, strategy=strategy, use_distributed_sampler=False)
        found.append(state(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    batches = [pair_batch()] * 4
    whole, first, second = (module(EXPERTS) for _ in range(3))
    fit(whole, 4, batches=batches)
    fit(first, 2, batches=batches, save_to=tmp_path / "half.ckpt")
    fit(second, 4, batches=batches, resume_from=tmp_path / "half.ckpt")
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(second).items())


def test_receipts_and_the_summary_say_what_is_still(caplog: pytest.LogCaptureFixture) -> None:
    losses = AuxiliaryLosses(LoadBalance(0.1), RouterZ(0.1))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        for parts, told in (
            (("backbone.blocks",), "alive: gradient norm"),
            (("backbone.text",), "off: model.trainable keeps router weights still"),
        ):
            liveness = Liveness()
            model = module(parts, losses=losses)
            fit(model, 1, batches=[pair_batch()], callbacks=[Telemetry(), liveness])
            for name in ("load_balance", "router_z"):
                assert liveness._tags[f"receipt/losses.{name}"].startswith(told)
            assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M trained" in caplog.text


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (
            ("backbone.conector",),
            r"no backbone.conector; did you mean 'backbone.connector'\? name one of backbone.vision,",
        ),
        (("connector",), r"no connector; did you mean 'backbone.connector'\?"),
        (("backbone.blocks.*.feed",), r"has no backbone.blocks.\*.feed"),
        ((), r"model.trainable is \[\], which holds no parameter that is trained"),
    ],
)
def test_what_names_no_part_is_refused(parts: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        module(parts)


def test_a_batch_that_no_trained_part_acts_on_is_refused() -> None:
    with pytest.raises(UserError, match=r"this batch uses none of it, such as a connector when there is no image"):
        fit(module(CONNECTOR), 1, batches=[pair_batch()._replace(images_BRYX=None, num_pairs=0)])


@pytest.mark.parametrize(
    ("actions", "told"),
    [
        (Actions(qk_clip=QKClip()), "keeps every attention still"),
        (Actions(revive_dead_experts=ReviveDeadExperts()), "keeps routers or experts still"),
    ],
)
def test_an_action_on_frozen_parts_alone_is_refused(actions: Actions, told: str) -> None:
    with pytest.raises(UserError, match=told):
        module(("backbone.text",), actions=actions)
