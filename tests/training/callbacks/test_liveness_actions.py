"""Gradient stabilisers and actions prove that they can act, and say when they have."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Attention, ModelStabilisers
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance
from lightning_moevlm.model.objectives import Draws, MaskedModelling
from lightning_moevlm.model.routers import SMEBU, QuantileUpdate, SigmoidBiasRouter, TopKRouter
from lightning_moevlm.training import Actions
from lightning_moevlm.training.actions import AnticipateRouting, FreezeRouter, QKClip, ReviveDeadExperts, Rollback
from lightning_moevlm.training.callbacks import Liveness
from lightning_moevlm.training.callbacks.liveness.rehearsal import replace_attribute
from lightning_moevlm.training.optim import AdaGC, GradientStabilisers, SkipSpikes, ZClip
from tests.training.callbacks.asked_run import asked, module_of, refused
from tests.training.small_fit import every_action

GRADIENT: dict[str, GradientStabilisers] = {
    "clip_norm": GradientStabilisers(clip_norm=1e-3),
    "clip_value": GradientStabilisers(clip_value=1e-6),
    "z_clip": GradientStabilisers(z_clip=ZClip(warmup_steps=2)),
    "ada_gc": GradientStabilisers(ada_gc=AdaGC(warmup_steps=2)),
    "clip_update": GradientStabilisers(clip_update=0.1),
    "skip_spikes": GradientStabilisers(skip_spikes=SkipSpikes(window=4)),
}


@pytest.mark.parametrize("name", GRADIENT)
def test_every_gradient_stabiliser_cuts_a_spike_on_a_copy(name: str) -> None:
    receipts, _ = asked(module_of(gradient=GRADIENT[name]))
    assert receipts[f"gradient.{name}"].startswith("idle: "), receipts  # no step has been made
    assert "on a copy it keeps" in receipts[f"gradient.{name}"]


def test_a_clip_counts_how_often_it_acted() -> None:
    module = module_of(gradient=GradientStabilisers(clip_norm=1e-3))
    receipts, points = asked(module, steps=3)
    assert receipts["gradient.clip_norm"].startswith("alive: 2 of 2 steps shortened; ")
    assert points[metric_keys.LIVENESS.key(switch="gradient.clip_norm")] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    never, _ = asked(module_of(gradient=GradientStabilisers(clip_norm=1e6)), steps=3)
    assert never["gradient.clip_norm"].startswith("idle: 0 of 2 steps shortened; ")


def test_each_of_several_clips_counts_its_own_acts() -> None:
    # AdamW's first updates are about the learning rate, whatever the gradient: rms 1 before weight decay
    options = GradientStabilisers(clip_norm=1e-3, clip_value=1e3, ada_gc=AdaGC(warmup_steps=2), clip_update=0.1)
    receipts, points = asked(module_of(gradient=options), steps=3)
    counts = {
        name: receipts[f"gradient.{name}"].partition(";")[0] for name in ("clip_norm", "clip_value", "clip_update")
    }
    assert counts == {
        "clip_norm": "alive: 2 of 2 steps shortened",
        "clip_value": "idle: 0 of 2 steps shortened",
        "clip_update": "alive: 2 of 2 steps shortened",
    }
    assert points[metric_keys.LIVENESS.key(switch="gradient.clip_update")] == [(0, 0.0), (1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip_norm", GradientStabilisers(clip_norm=1e30)),
        ("clip_value", GradientStabilisers(clip_value=1e30)),
        ("clip_update", GradientStabilisers(clip_update=1e30)),
        ("z_clip", GradientStabilisers(z_clip=ZClip(z=1e30, warmup_steps=2))),
        ("ada_gc", GradientStabilisers(ada_gc=AdaGC(relative=1e30, warmup_steps=2))),
    ],
)
def test_a_clip_that_cannot_act_is_dead(name: str, options: GradientStabilisers) -> None:
    refused(module_of(gradient=options), f"gradient.{name}", "passes it unchanged", f"model.gradient.{name} to null")


def test_clipping_by_lightning_is_named_too() -> None:
    receipts, _ = asked(module_of(), gradient_clip_val=1.0)
    assert receipts["trainer.gradient_clip_val"].startswith("idle: ")
    refused(module_of(), "trainer.gradient_clip_val", "no gradient reaches inf", gradient_clip_val=float("inf"))


NO_QK_NORM = ModelStabilisers(qk_norm=False)


def test_actions_are_idle_until_they_have_cause() -> None:
    actions = Actions(QKClip(1e4), ReviveDeadExperts(), FreezeRouter(2), Rollback(every_n_steps=2))
    module = module_of(stabilisers=NO_QK_NORM, actions=actions)
    receipts, _ = asked(module, steps=2)
    for name in ("qk_clip", "revive_dead_experts", "freeze_router", "rollback"):
        assert receipts[f"actions.{name}"].startswith("idle: "), receipts
    assert "routers stand still after step 2, and the run ends at 2" in receipts["actions.freeze_router"]
    receipts, _ = asked(module_of(stabilisers=NO_QK_NORM, actions=every_action()), steps=10)
    assert receipts["actions.qk_clip"].startswith("alive: ")
    assert receipts["actions.freeze_router"] == "alive: 2 router tensors stand still since step 8 (step 9)"
    assert receipts["actions.rollback"] == "idle: snapshots of step 2, 4, 6, 8 to go back to (step 9)"


def test_the_balancing_state_is_alive_and_off_without_a_rate() -> None:
    receipts, points = asked(module_of(router=SigmoidBiasRouter))
    assert receipts["actions.rebalance"].startswith("alive: state moves by up to 0.0015 a step")
    # signs: the favourite of 4 experts -1, others +1; less their mean of 0.5: -1.5 and 0.5, times 1e-3
    assert points[metric_keys.LIVENESS.key(switch="actions.rebalance")] == [(0, pytest.approx(1.5e-3))]
    for rule in (SMEBU(), QuantileUpdate()):
        receipts, _ = asked(module_of(router=partial(SigmoidBiasRouter, update=rule)))
        assert receipts["actions.rebalance"].startswith("alive: state moves by up to ")
    still, _ = asked(module_of(router=partial(SigmoidBiasRouter, update_rate=0.0)))
    assert still["actions.rebalance"] == "off: the routers' update_rate is 0 (step 0)"


class IgnoresChoices(TopKRouter):
    """Chooses by itself alone."""

    def forward(self, inputs: Any) -> Any:
        return super().forward(inputs._replace(expert_TK=None))


def test_older_routers_are_alive_while_they_choose_and_dead_where_a_router_ignores_them() -> None:
    always = Actions(anticipate_routing=AnticipateRouting(delay=2, num_steps=None))
    fast = partial(AdamW, lr=3e-2)
    receipts, _ = asked(module_of(actions=always, optimizer=fast), steps=4)
    assert receipts["actions.anticipate_routing"].startswith("alive: routers of step 1 choose 0.")
    waiting = Actions(anticipate_routing=AnticipateRouting(delay=2))
    receipts, _ = asked(module_of(actions=waiting, optimizer=fast), steps=4)
    assert receipts["actions.anticipate_routing"].startswith("idle: no spike; routers of step 1 would choose 0.")
    refused(
        module_of(actions=always, router=IgnoresChoices),
        "actions.anticipate_routing",
        "takes other experts than those that were chosen for it",
    )


class StandsStill(SigmoidBiasRouter):
    """Listens to its counts and does nothing."""

    def rebalance(self, load_AE: Tensor, tally: Tensor) -> None:
        self.seen = load_AE


def test_a_balancing_state_that_does_not_move_is_dead() -> None:
    refused(
        module_of(router=StandsStill), "actions.rebalance", "does not move its state when one expert has all tokens"
    )


class IgnoresBias(SigmoidBiasRouter):
    """Moves its bias, and chooses without it."""

    def forward(self, inputs: Any) -> Any:
        with replace_attribute(self, "bias_AE", torch.zeros_like(self.bias_AE)):
            return super().forward(inputs)


def test_a_balancing_state_that_does_not_choose_is_dead() -> None:
    refused(module_of(router=IgnoresBias), "actions.rebalance", "as many tokens as before")


class HandsNothingOn(MaskedModelling):
    """Keeps plans and attention logits to itself."""

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        return super().forward(backbone, batch, draws)._replace(attention=(), plans=())


def test_an_action_that_never_gets_its_input_is_dead() -> None:
    clip = module_of(stabilisers=NO_QK_NORM, actions=Actions(QKClip()), objective=HandsNothingOn)
    refused(clip, "actions.qk_clip", "never gets its input", "attention logits")
    revive = module_of(actions=Actions(revive_dead_experts=ReviveDeadExperts()), objective=HandsNothingOn)
    refused(revive, "actions.revive_dead_experts", "never gets its input", "plan that chooses experts")
    losses = module_of(AuxiliaryLosses(LoadBalance(), None), objective=HandsNothingOn)
    refused(losses, "losses.load_balance", "returns no routing plans")


class NormsQueries(Attention):
    """Takes the scale of queries and keys out without having a norm, so that QK-clip cannot know."""

    def forward(self, *args: Any) -> Any:
        weight = self.query_key_value.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight[: 2 * self.dim] /= weight[: 2 * self.dim].norm()
        output = super().forward(*args)
        with torch.no_grad():
            weight.copy_(before)
        return output


def test_a_clip_of_heads_that_changes_no_logit_is_dead() -> None:
    module = module_of(stabilisers=NO_QK_NORM, actions=Actions(QKClip()))
    for block in module.backbone.blocks:
        block.attention.__class__ = NormsQueries
    module.backbone.requires_grad_(False)  # weights change in forward
    module.objective.requires_grad_(True)
    refused(module, "actions.qk_clip", "attention logits keep")


def test_routers_that_move_after_the_freeze_end_the_run() -> None:
    class Pushes(Liveness):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            if trainer.global_step == 4:
                next(iter(pl_module.backbone.blocks[1].ffn.image.router.parameters())).data += 1.0

    module = module_of(actions=Actions(freeze_router=FreezeRouter(2)))
    refused(
        module,
        "actions.freeze_router",
        "after 4 steps",
        "1 of 2 router tensors moved after step 2",
        steps=6,
        callback=Pushes(every_n_steps=1),
    )
