"""Liveness as a whole: training is unchanged, receipts come in time, R_g is right, exit codes."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import Tensor
from torch.optim import AdamW

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.layers import ModelStabilisers, MoEFFN
from lightning_moevlm.model.losses import (
    AuxiliaryLosses,
    ByOverflow,
    Load,
    LoadBalance,
    LossInput,
    RouterZ,
    RoutingLoss,
)
from lightning_moevlm.model.routers import NoisyTopKRouter
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Liveness
from lightning_moevlm.training.optim import GradientStabilisers, SkipSpikes
from tests.routing import loss_of
from tests.small_model import pair_batch, small_vl_moe
from tests.small_run import SMALL, budget
from tests.training.callbacks.asked_run import Tagged, asked, module_of, refused
from tests.training.small_fit import LossesSeen, NoTask, Poison, every_action, fit


def latest_run() -> Run:
    client = MlflowClient("sqlite:///runs/mlflow.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same_bit_for_bit_with_it_and_without(precision: str) -> None:
    def trained(*callbacks: Callback) -> tuple[list[float], dict[str, Any], dict[str, Any], list[str]]:
        torch.manual_seed(5)
        module = VisionLanguageModule(
            small_vl_moe(router=NoisyTopKRouter, stabilisers=ModelStabilisers(qk_norm=False, layer_scale=0.1)),
            losses=AuxiliaryLosses(LoadBalance(ByOverflow(0.1), scope="global"), load=Load()),
            optimizer=partial(AdamW, lr=1e-2),
            gradient=GradientStabilisers(clip_norm=0.5, skip_spikes=SkipSpikes(window=4)),
            actions=every_action(),
            init_std=0.1,
        )
        seen = LossesSeen()
        batches = [pair_batch(seed=seed) for seed in range(6)]
        fit(module, 5, batches=batches, callbacks=[seen, *callbacks], accumulate=2, precision=precision)
        optimizer = module.optimizers(use_pl_optimizer=False)
        assert module.action_runner is not None and isinstance(optimizer, AdamW)
        state = {
            "weights": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "actions": module.action_runner.state_dict(),
            "gradients": {name: p.grad for name, p in module.named_parameters()},
            "random": torch.get_rng_state(),
        }
        requires = [name for name, p in module.named_parameters() if p.requires_grad]
        dispatched = [layer.dispatcher.record() for layer in module.modules() if isinstance(layer, MoEFFN)]
        return seen.losses, state, {"measured": seen.measured}, requires + dispatched

    without, asked_too = trained(), trained(Liveness(every_n_steps=1))
    assert without[0] == asked_too[0] and without[2:] == asked_too[2:]
    one, other = (torch.utils._pytree.tree_leaves(state) for state in (without[1], asked_too[1]))
    assert len(one) == len(other) > 100
    for ours, theirs in zip(one, other, strict=True):
        if isinstance(ours, Tensor):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)  # windows begin as NaN
        else:
            assert ours == theirs


def test_receipts_come_before_the_first_step_every_n_and_before_the_last() -> None:
    tagged: list[int] = []

    class Notes(Tagged):
        def log_tags(self, tags: Mapping[str, str]) -> None:
            tagged.append(int(next(iter(tags.values())).rpartition("(step ")[2].rstrip(")")))

    def steps_of(points: Mapping[str, list[tuple[int, float]]]) -> list[int]:
        return [step for step, _ in points[metric_keys.LIVENESS.key(switch="losses.load_balance")]]

    def module() -> VisionLanguageModule:
        return module_of(AuxiliaryLosses(LoadBalance()))

    _, points = asked(module(), 6, Liveness(every_n_steps=2), Notes(), accumulate_grad_batches=2)
    assert steps_of(points) == [0, 2, 4, 5]
    assert tagged == [0, 5]  # the verdict stayed the same: first and last state
    tagged.clear()
    _, points = asked(module(), 3, Liveness(every_n_steps=None), Notes())
    assert steps_of(points) == [0] and tagged == [0]


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"num_samples": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} of Liveness is 0: choose 1 or more"):
        Liveness(**options)


def test_the_share_of_balance_is_that_of_gradients_by_hand() -> None:
    losses = AuxiliaryLosses(LoadBalance(0.5), RouterZ(0.25))
    module = module_of(losses, objective=NoTask)
    backbone = copy.deepcopy(module.backbone)
    _, points = asked(module, callback=Liveness(num_samples=4))
    batch = pair_batch()
    plans = backbone(batch.images_BRYX, batch.text_BL, batch.text_mask_BL).plans
    balance = 0.5 * torch.stack([loss_of(LoadBalance(), named.plan) for named in plans]).mean()
    z = 0.25 * torch.stack([loss_of(RouterZ(), named.plan) for named in plans]).mean()
    for where in ("router", "all"):
        weights = [p for name, p in backbone.named_parameters() if where == "all" or ".router." in name]
        norms = []
        for value in (balance, balance + z):
            gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None)))
        assert points[metric_keys.BALANCE_GRADIENT_SHARE.key(weights=where)] == [
            (0, pytest.approx(norms[0] / norms[1], rel=1e-4))
        ]


def test_only_balance_gives_a_share_of_one_and_none_gives_none() -> None:
    _, points = asked(module_of(AuxiliaryLosses(LoadBalance(), None), objective=NoTask))
    assert points[metric_keys.BALANCE_GRADIENT_SHARE.key(weights="router")] == [(0, pytest.approx(1.0))]
    _, points = asked(module_of(AuxiliaryLosses(None, RouterZ())))
    assert not any(key.startswith("balance_gradient_share") for key in points)


@dataclass(frozen=True)
class MostProbable(RoutingLoss):
    """Mean of the largest probability, of another package."""

    weight: float = 0.5
    balances: ClassVar[bool] = True

    def __call__(self, inputs: LossInput) -> Tensor:
        return inputs.plan.probs_TE.max(dim=-1).values.mean()


def test_a_loss_from_elsewhere_has_a_receipt_and_a_share_of_the_gradient() -> None:
    losses = AuxiliaryLosses(None, None, others={"most_probable": MostProbable()})
    receipts, points = asked(module_of(losses, objective=NoTask))
    assert receipts["losses.others.most_probable"].startswith("alive: gradient norm ")
    assert points[metric_keys.BALANCE_GRADIENT_SHARE.key(weights="router")] == [(0, pytest.approx(1.0))]


def test_a_loss_from_elsewhere_that_reaches_nothing_ends_the_run() -> None:
    class Detached(MostProbable):
        def __call__(self, inputs: LossInput) -> Tensor:
            return super().__call__(inputs).detach()

    switch = "losses.others.most_probable"
    refused(
        module_of(AuxiliaryLosses(None, None, others={"most_probable": Detached()})), switch, f"model.{switch} to null"
    )


def test_a_loss_that_is_no_number_is_no_verdict() -> None:
    # with its first weight infinite the model would look dead in many places
    receipts, _ = asked(module_of(AuxiliaryLosses()), 2, others=[Poison(at_step=2)])
    assert receipts and all(text.endswith("(step 0)") for text in receipts.values())


def test_the_command_line_names_a_dead_switch_and_ends_with_2(moevlm: Callable[..., str]) -> None:
    told = moevlm("fit", *SMALL, *budget(2), "--model.gradient.clip_norm=1e30", code=2)
    (line,) = [line for line in told.splitlines() if "moevlm: error: " in line]
    assert "gradient.clip_norm is dead before the first step: a gradient of norm 1e+12 on a copy passes it" in line
    assert "Traceback" not in told
    run = latest_run()
    assert run.info.status == "FAILED"
    assert run.data.tags["receipt/gradient.clip_norm"].startswith("dead: ")


def test_receipts_are_tags_and_metrics_of_the_run(moevlm: Callable[..., str]) -> None:
    moevlm("fit", *SMALL, *budget(2))
    run = latest_run()
    tags = {name: text for name, text in run.data.tags.items() if name.startswith("receipt/")}
    assert tags.keys() == {
        f"receipt/{switch}"
        for switch in (
            "losses.load_balance", "losses.router_z", "stabilisers.qk_norm", "gradient.clip_norm", "precision.router",
            "precision.losses", "moe.capacity",
        )
    }  # fmt: skip
    assert tags["receipt/losses.load_balance"].startswith("alive: gradient norm ")
    assert run.data.metrics["liveness/losses.load_balance"] > 0
    assert 0 < run.data.metrics["balance_gradient_share/router"] < 1
