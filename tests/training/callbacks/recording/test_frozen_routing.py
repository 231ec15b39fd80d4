"""Frozen routing: experts are chosen as the weights of one step would, and weighed by the current ones."""

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan
from lightning_moevlm.model.routers import ExpertChoiceRouter, Router, SigmoidBiasRouter, TopKRouter
from lightning_moevlm.training.actions import Actions
from lightning_moevlm.training.callbacks.recording.frozen_routing import FrozenRouting
from tests.small_model import pair_batch
from tests.training.small_fit import Fit, fit, tiny_module

STEPS, FROZEN = 6, 3


class Weights(Callback):
    """The state of the module before each step."""

    def __init__(self) -> None:
        self.before: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.before[trainer.global_step + 1] = {name: each.clone() for name, each in pl_module.state_dict().items()}


def plans(done: Fit, step: int) -> dict[tuple[str, str], PairPlan]:
    found = {(named.layer, named.source): named.plan for named in done.outputs[step - 1]["plans"]}
    assert all(isinstance(plan, PairPlan) for plan in found.values())
    return found  # type: ignore[return-value]


def train(router: Callable[[int, int], Router], *callbacks: Callback) -> Fit:
    batches = [pair_batch(seed=step) for step in range(STEPS)]
    return fit(tiny_module(Actions(), lr=3e-2, router=router), STEPS, batches=batches, callbacks=callbacks)


def sigmoid(dim: int, num_experts: int) -> Router:
    return SigmoidBiasRouter(dim, num_experts, top_k=2)


@pytest.mark.parametrize("router", [TopKRouter, sigmoid])
def test_choices_are_those_of_the_frozen_weights(router: Callable[[int, int], Router]) -> None:
    weights = Weights()
    free, frozen = train(router, weights), train(router, FrozenRouting(FROZEN))
    for step in range(1, FROZEN + 1):
        for place, plan in plans(free, step).items():
            assert torch.equal(plan.expert_N, plans(frozen, step)[place].expert_N)
    # the weights of step 3, given step 5's batch alone
    module = tiny_module(Actions(), router=router)
    module.load_state_dict(weights.before[FROZEN])
    module.train()
    expected = {
        (named.layer, named.source): named.plan
        for named in module.objective(module.backbone, pair_batch(seed=4), module.draws("train", 4)).plans
    }
    differs = False
    for place, plan in plans(frozen, 5).items():
        chosen = expected[place]
        assert isinstance(chosen, PairPlan)
        assert torch.equal(plan.expert_N, chosen.expert_N) and torch.equal(plan.chosen_N, chosen.chosen_N)
        differs |= not torch.equal(plan.weight_N, chosen.weight_N)
        if router is TopKRouter:  # each weight is the current probability
            assert torch.equal(plan.weight_N, plan.probs_TE[plan.token_N, plan.expert_N])
        else:  # two shares
            assert torch.allclose(plan.weight_N.view(2, -1).sum(dim=0)[plan.valid_T], torch.ones(()))
    assert differs
    assert any(
        not torch.equal(plan.expert_N, plans(frozen, 5)[place].expert_N) for place, plan in plans(free, 5).items()
    )


def test_routers_without_choices_of_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="ExpertChoiceRouter does not choose experts for each token"):
        train(ExpertChoiceRouter, FrozenRouting(FROZEN))
