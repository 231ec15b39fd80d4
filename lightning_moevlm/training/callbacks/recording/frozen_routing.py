"""Lets the weights of an earlier step choose the experts, while the current weights learn: routing's part in an event.

Before each batch a copy of the backbone, as it was in that step, runs on the same batch with the same masks and noise.
Its choices replace those of the current routers, whose scores still weigh them:

    experts = choose(theta_frozen, x)        weight_e = the router's own rule on p_e(theta_now, x)

Choices by older weights are DeepSeek-V4's anticipatory routing (section 4.2.3), where the delay is constant; here the
step is. The rule of the weights is found by comparing the router's own weights with those that its scores give; they
need not sum to 1. Layers that gradient checkpointing runs again in the backward pass choose as they did before.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingPlan
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.checks.trainer_checks import SHARDING

_CLOSE = 1e-4


class FrozenRouting(Callback):
    """From the step after the given one on, experts are chosen by the weights that the given step began with.

    Args:
        step: optimiser step, from 1; a training that starts later takes the weights that it starts with.

    Raises:
        UserError: a step below 1; on start routers without choices to freeze, or sharded weights.
    """

    def __init__(self, step: int) -> None:
        check_number("step of FrozenRouting", step, least=1)
        self.step = step
        self._frozen: Backbone | None = None
        self._choices: dict[str, list[PairPlan]] = {}  # of the current batch, by layer, in the order of the passes
        self._used: dict[str, list[PairPlan]] = {}  # likewise
        self._collects = self._runs_again = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no choices to freeze, and listen to the routers."""
        assert isinstance(pl_module, VisionLanguageModule)
        if isinstance(trainer.strategy, SHARDING):
            raise UserError(f"routing cannot be frozen: {type(trainer.strategy).__name__} shards the weights")
        for layer in pl_module.backbone.modules():
            if not isinstance(layer, Mixture):
                continue
            if layer.router.mixes or layer.router.competes:
                raise UserError(
                    f"routing cannot be frozen: {type(layer.router).__name__} does not choose experts for each token"
                )
            self._hooks.append(layer.router.register_forward_hook(self._replace_choices(layer)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Copy the backbone when its step begins; later let the copy choose for this batch."""
        assert isinstance(pl_module, VisionLanguageModule)
        step = trainer.global_step + 1
        if self._frozen is None and step >= self.step:
            self._frozen = copy.deepcopy(pl_module.backbone).requires_grad_(False)
        if self._frozen is None or step <= self.step:
            return
        pl_module.seed_noise(pl_module.micro_step(batch_idx))
        self._choices, self._used, self._collects = {}, {}, True
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            pl_module.objective(self._frozen, batch, pl_module.draws("train", trainer.global_step))
        self._collects = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Leave other passes alone, but for layers that run again."""
        self._choices, self._runs_again = {}, True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave other passes alone."""
        self._used, self._runs_again = {}, False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the routers."""
        for hook in self._hooks:
            hook.remove()

    def _replace_choices(self, layer: Mixture) -> Callable[[nn.Module, object, RoutingPlan], RoutingPlan | None]:
        rules: list[_Rule] = []

        def hook(router: nn.Module, inputs: object, plan: RoutingPlan) -> RoutingPlan | None:
            assert isinstance(plan, PairPlan)
            if router is not layer.router:  # a copy has the hook too
                if self._collects:
                    self._choices.setdefault(layer.path, []).append(plan)
                return None
            used = self._used.setdefault(layer.path, [])
            if self._runs_again:
                return impose_choices(plan, used.pop(), rules[0]) if used else None  # the last pass is the first again
            if not self._choices:
                return None
            if not rules:
                rules.append(find_rule(plan, type(router).__name__))
            used.append(self._choices[layer.path].pop(0))
            return impose_choices(plan, used[-1], rules[0])

        return hook


_Rule = Callable[[PairPlan], Tensor]
"""Returns the weights of the plan's pairs (N) from its scores."""


def impose_choices(plan: PairPlan, choices: PairPlan, rule: _Rule) -> PairPlan:
    """Return the plan with the pairs of another one, weighed by its own scores."""
    chosen = plan._replace(
        token_N=choices.token_N, expert_N=choices.expert_N, chosen_N=choices.chosen_N, kept_N=choices.chosen_N
    )
    return chosen._replace(weight_N=rule(chosen))


def _from_probs(plan: PairPlan) -> Tensor:
    return plan.probs_TE[plan.token_N, plan.expert_N]


def _from_shares(plan: PairPlan) -> Tensor:
    """Return the probabilities divided by their sum over the chosen experts of the token; as they are on padding, which
    chooses none and which adopted models run.
    """
    probs_N = _from_probs(plan)
    sum_T = probs_N.new_zeros(plan.num_tokens).index_add(0, plan.token_N, probs_N * plan.chosen_N)
    return probs_N / torch.where(sum_T > 0, sum_T, 1.0)[plan.token_N].clamp(min=1e-20)


def _from_sigmoid(plan: PairPlan) -> Tensor:
    return plan.logits_TE[plan.token_N, plan.expert_N].sigmoid()


def _from_even(plan: PairPlan) -> Tensor:
    """Return 1 / K, of routers without scores."""
    count_T = plan.logits_TE.new_zeros(plan.num_tokens).index_add(0, plan.token_N, plan.chosen_N.to(plan.logits_TE))
    return 1.0 / count_T[plan.token_N].clamp(min=1)


_RULES: Mapping[str, _Rule] = {
    "probabilities": _from_probs,
    "shares": _from_shares,
    "sigmoid": _from_sigmoid,
    "even": _from_even,
}


@torch.no_grad()
def find_rule(plan: PairPlan, router: str) -> _Rule:
    """Return the rule that a router's weights follow, or follow times a constant, as DeepSeek-V3's times 2.5.

    Args:
        plan: of the router, with its own choices.
        router: its name, for messages.

    Raises:
        UserError: they follow none.
    """
    used_N = plan.weight_N * plan.chosen_N
    # weights of a narrow router are its rule's, rounded
    close = _CLOSE if bool((used_N.bfloat16() != used_N).any()) else torch.finfo(torch.bfloat16).eps
    scaled: list[_Rule] = [
        partial(_scale, rule, used_N.sum() / (rule(plan) * plan.chosen_N).sum()) for rule in _RULES.values()
    ]
    for rules in (list(_RULES.values()), scaled):
        errors = [float(((rule(plan) - plan.weight_N) * plan.chosen_N).abs().amax()) for rule in rules]
        best = min(range(len(rules)), key=errors.__getitem__)
        if errors[best] <= close * max(1.0, float(used_N.amax())):
            return rules[best]
    raise UserError(f"routing cannot be frozen: the weights of {router} do not follow from its scores alone")


def _scale(rule: _Rule, factor: Tensor, plan: PairPlan) -> Tensor:
    return factor * rule(plan)
