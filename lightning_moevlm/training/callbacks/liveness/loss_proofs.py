"""Proof of an auxiliary loss: its gradient reaches the right weights, and no others.

    reaches    the gradient of the raw loss on router weights that the optimiser trains (output z-loss: on the heads)
               exceeds rounding: |g| > 1e-6 |loss| rms |x| for the tokens x at the routers
    spares     experts of the last sparse block have no gradient, unless the loss says that it is computed through them
    changes    without the term, some bit of the step's gradient on those weights differs
    scale      every layer counted twice gives the same raw loss, and so do doubled counts of the step: the loss does
               not grow with layers, ranks or micro-batches; a loss that draws noise is asked without it
    idle       if the gradient is 0, as at a minimum, plans pushed out of balance have one

Published code had balance gradients that never arrive, ignored coefficients, and losses constant by a mistake in
broadcasting (tests/test_traps.py names it).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.contracts.step_records import Term
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.losses import AdaptiveWeight, LossInput, PlanLoss
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt, Switch
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal, gradients_of

_ROUNDING = 1e-6
_PUSHES = (0.0, 2.0, 8.0)  # on the logits of one expert, beside noise


def loss_receipts(rehearsal: Rehearsal, optimizers: Sequence[Optimizer]) -> list[Receipt]:
    """Return the receipt of every enabled auxiliary loss."""
    terms, rescaled = rehearsal.report.auxiliary, _Rescaled(rehearsal)
    names = rehearsal.module.losses.weights
    return [_Proof(rehearsal, name, optimizers, rescaled).receipt(terms.get(name)) for name in names]


def find_trained_parameters(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """Return the parameters that optimisers train: owned, and at a peak rate above 0."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {p for group in groups if group.get("initial_lr", group["lr"]) > 0 for p in group["params"]}


def norm_of(gradients: Iterable[Tensor | None]) -> float:
    """Return their joint norm, in fp32; None counts as 0."""
    present = [gradient.float() for gradient in gradients if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)))) if present else 0.0


class _Rescaled:
    """The raw losses of the plans as they are, with every layer twice, and with doubled counts; without gradient.

    Computed once for all losses, and once more without noise for those that draw it.
    """

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._known: dict[bool, list[dict[str, Term]]] = {}

    def of(self, name: str, draws: bool) -> list[Tensor]:
        """Return the three values of a loss."""
        if draws not in self._known:
            own = [inputs._replace(training=inputs.training and not draws) for inputs in self._rehearsal.inputs]
            cases = (own, [*own, *own], [_double_counts(inputs) for inputs in own])
            self._known[draws] = [self._terms(inputs) for inputs in cases]
        return [terms[name].raw for terms in self._known[draws]]

    def _terms(self, inputs: Sequence[LossInput]) -> dict[str, Term]:
        with self._rehearsal.in_losses(), torch.no_grad():
            return self._rehearsal.module.losses.terms(inputs, self._rehearsal.output.log_partitions)


def _double_counts(inputs: LossInput) -> LossInput:
    counts = inputs.counts
    if counts is None:
        return inputs
    doubled = {name: 2 * getattr(counts, name) for name in ("chosen_AE", "kept_AE", "token_A")}
    return inputs._replace(counts=counts._replace(**doubled))


class _Proof:
    """Asks one loss."""

    def __init__(self, rehearsal: Rehearsal, name: str, optimizers: Sequence[Optimizer], rescaled: _Rescaled) -> None:
        self.rehearsal = rehearsal
        self.rescaled = rescaled
        self.module: VisionLanguageModule = rehearsal.module
        self.name = name
        loss = self.module.losses.enabled[name]
        self.draws, self.reaches_experts = (
            (loss.draws, loss.reaches_experts) if isinstance(loss, PlanLoss) else (False, False)
        )
        self.switch = Switch(self.module.losses.key(name), "loss")
        self.on_routing = name != "output_z"
        self.target = "router weights" if self.on_routing else "the heads"
        moved = find_trained_parameters(optimizers)
        self.every = list(_target_parameters(rehearsal, self.on_routing))
        self.moved = [p for p in self.every if p in moved and p.requires_grad]

    def receipt(self, term: Term | None) -> Receipt:
        return self._declared_off() or (self._missing() if term is None else self._reaches(term))

    def _declared_off(self) -> Receipt | None:
        weight = self.module.current_weights[self.name]
        if float(weight) == 0:
            scheduled = isinstance(self.module.losses.weights[self.name], Ramp)
            return self.switch.is_("off", "its weight is 0 at this step" if scheduled else "its weight is 0", 0.0)
        if self.on_routing and not any(isinstance(layer, Mixture) for layer in self.module.backbone.modules()):
            return self.switch.is_("off", "a dense model has no routers")
        if self.module.trainable is not None and self.every and not any(p.requires_grad for p in self.every):
            return self.switch.is_("off", f"model.trainable keeps {self.target} still")
        freeze = self.module.actions.freeze_router
        if self.on_routing and freeze is not None and self.module.global_step >= freeze.after_steps:
            return self.switch.is_("off", f"actions.freeze_router keeps routers still after step {freeze.after_steps}")
        return None

    def _missing(self) -> Receipt:
        if self.on_routing and not self.rehearsal.output.plans:
            return self.switch.dead(
                "the objective returns no routing plans, and the model has routers",
                "let the objective return the plans of every forward pass",
            )
        return self.switch.is_("unproven", "this batch lacks what the loss is computed from")

    def _reaches(self, term: Term) -> Receipt:
        raw, weight = term.raw, float(term.weight)
        if not self.moved:
            return self.switch.dead(f"{self._explain_frozen()}, so nothing learns from it", self._advice())
        found = gradients_of(raw, [*self.moved, *self._must_not_reach()])
        targets, spared = found[: len(self.moved)], norm_of(found[len(self.moved) :])
        size = norm_of(targets)
        if all(gradient is None for gradient in targets):
            return self.switch.dead(
                f"its gradient reaches none of the {len(self.moved)} tensors of {self.target}: the loss uses "
                "detached values, or values that do not depend on them",
                self._advice(),
            )
        if spared > 0:
            return self.switch.dead(
                f"its gradient has norm {spared:.2g} on experts of the last sparse block, which no loss on routing "
                "may reach",
                self._advice(),
            )
        moves = self._moves_with_scale()
        if moves is not None:
            return self.switch.dead(moves, "take the mean over layers and shares of counts, not sums")
        if size <= _ROUNDING * abs(float(raw.detach())) * self._token_size():
            return self._at_rest()
        return self._changes(targets, weight, size)

    def _changes(self, gradients: list[Tensor | None], weight: float, size: float) -> Receipt:
        changed, total = 0, 0
        for own, parameter in zip(gradients, self.moved, strict=True):
            all_ = self.rehearsal.total_gradient[parameter]
            if own is not None and all_ is not None:
                rest = all_ - weight * own
                changed += int((rest + weight * own != rest).sum())
            total += 0 if all_ is None else all_.numel()
        reached = sum(gradient is not None and bool(gradient.any()) for gradient in gradients)
        what = f"gradient norm {weight * size:.2g} on {self.target} ({reached} of {len(gradients)} tensors)"
        if changed:
            return self.switch.is_(
                "alive", f"{what}; without it {changed / total:.0%} of them get another one", weight * size
            )
        if isinstance(self.module.losses.weights[self.name], Ramp | AdaptiveWeight):
            return self.switch.is_(
                "idle", f"{what}: too little to change a bit of it at weight {weight:.2g}", weight * size
            )
        return self.switch.dead(
            f"{what}: at weight {weight:.2g} the step is the same without it", "choose a larger weight, or null"
        )

    def _at_rest(self) -> Receipt:
        """Ask whether a gradient that is 0 here is 0 everywhere."""
        largest = 0.0
        for push in _PUSHES:
            leaves, inputs = _push(self.rehearsal.inputs, push)
            with self.rehearsal.in_losses():
                partitions = {
                    name: (value_M.detach() + push).requires_grad_()
                    for name, value_M in self.rehearsal.output.log_partitions.items()
                }
                term = self.module.losses.terms(inputs, partitions, self.module.current_weights).get(self.name)
            if term is not None:
                found = gradients_of(term.raw, [*leaves, *partitions.values()])
                relative = norm_of(found) / max(abs(float(term.raw.detach())), 1e-12)
                largest = max(largest, relative if math.isfinite(relative) else 0.0)
        if largest > _ROUNDING:
            return self.switch.is_(
                "idle", f"no gradient on {self.target} here; a plan pushed out of balance has one", 0.0
            )
        return self.switch.dead(
            f"its gradient on {self.target} is 0 here and for plans pushed out of balance: it is constant",
            self._advice(),
        )

    def _moves_with_scale(self) -> str | None:
        """Return how the raw loss moves with layers or counts; None if it does not."""
        if not self.on_routing:
            return None
        raw, twice, counted = self.rescaled.of(self.name, self.draws)
        for change, other in (("every layer counted twice", twice), ("the counts of two equal ranks", counted)):
            if not torch.allclose(other, raw, rtol=1e-4, atol=1e-7):
                return f"its scale moves: {change} turns {float(raw):.4g} into {float(other):.4g}"
        return None

    def _must_not_reach(self) -> list[nn.Parameter]:
        """Return the experts of the last sparse block; other weights may lie between a router and the inputs."""
        if not self.on_routing or self.reaches_experts:
            return []
        last = max(named.block for named in self.rehearsal.output.plans)
        layers = {named.layer for named in self.rehearsal.output.plans if named.block == last}
        return [p for path in layers for p in self.module.backbone.get_submodule(path).experts.parameters()]  # type: ignore[union-attr]

    def _token_size(self) -> float:
        """Return the root mean square of the norms of the routers' tokens; 1 for other losses."""
        seen = [call.args[0] for call in self.rehearsal.calls.values() if isinstance(call.args[0], RoutingInput)]
        if not self.on_routing or not seen:
            return 1.0
        squares = [inputs.tokens_TD.detach().float().square().sum(dim=-1).mean() for inputs in seen]
        return float(torch.stack(squares).mean().sqrt())

    def _explain_frozen(self) -> str:
        if not self.every:
            return "the router has no weights"
        if not any(p.requires_grad for p in self.every):
            return f"{self.target} are frozen (requires_grad is off)"
        return f"no optimiser trains {self.target} (not in its groups, or at learning rate 0)"

    def _advice(self) -> str:
        return f"set model.{self.switch.name} to null, or fix the code that keeps it from {self.target}"


def _target_parameters(rehearsal: Rehearsal, on_routing: bool) -> Iterable[nn.Parameter]:
    """Return the weights that a loss must reach: routers that ran, or the heads and the embedding that they share."""
    module = rehearsal.module
    if not on_routing:
        shared = module.backbone.text_embedding_VD
        return [*module.objective.parameters(), *([shared] if isinstance(shared, nn.Parameter) else [])]
    layers: Mapping[str, None] = dict.fromkeys(named.layer for named in rehearsal.output.plans)
    return [p for path in layers for p in module.backbone.get_submodule(path).router.parameters()]  # type: ignore[union-attr]


def _push(inputs: Iterable[LossInput], push: float) -> tuple[list[Tensor], list[LossInput]]:
    """Return plans with noise on their logits and the first expert's raised, and their new leaves.

    A push above 0 also gives the first expert the choices of the last one: where loads are equal by chance, a loss on
    loads times probabilities is constant. If each token uses all experts, they are always equal, and stay so.

    Logits are scaled to a root mean square of 1 at most: in a saturated router every probability is 0 or 1, and no
    push would give a loss on them a gradient. Rows of the router are scaled alike, and each moves to the next expert:
    experts that answer strongest to their own rows would leave a coupling loss at 0.
    """
    leaves: list[Tensor] = []
    pushed: list[LossInput] = []
    generator = torch.Generator().manual_seed(0)

    def noisy(values: Tensor) -> Tensor:
        return values.detach() + torch.randn(values.shape, generator=generator).to(values)

    for one in inputs:
        plan = one.plan
        moves = push > 0 and isinstance(plan, PairPlan) and len(plan.token_N) < plan.num_tokens * plan.num_experts
        size = plan.logits_TE.detach().float().square().mean().sqrt().clamp(min=1.0)
        logits_TE = noisy(plan.logits_TE / size.to(plan.logits_TE))
        logits_TE[:, 0] += push
        leaves.append(logits_TE.requires_grad_())
        probs_TE = logits_TE.softmax(dim=-1)
        plan = plan._replace(logits_TE=logits_TE, probs_TE=probs_TE)
        if isinstance(plan, PairPlan):
            if moves:
                plan = plan._replace(expert_N=plan.expert_N % (plan.num_experts - 1))
            plan = plan._replace(weight_N=probs_TE[plan.token_N, plan.expert_N])
            if plan.noisy_logits_TE is not None:
                plan = plan._replace(noisy_logits_TE=logits_TE + (plan.noisy_logits_TE - one.plan.logits_TE).detach())
        rows = None
        if one.rows is not None:
            size = one.rows.detach().float().square().mean().sqrt().clamp(min=1.0)
            rows = noisy(one.rows.roll(1, dims=0) / size.to(one.rows)).requires_grad_()
            leaves.append(rows)
        counts = one.counts
        if moves and counts is not None:
            counts = counts._replace(chosen_AE=_give_to_first(counts.chosen_AE), kept_AE=_give_to_first(counts.kept_AE))
        pushed.append(one._replace(plan=plan, rows=rows, counts=counts))
    return leaves, pushed


def _give_to_first(load_AE: Tensor) -> Tensor:
    """Return loads where the first expert has those of the last one too."""
    moved_AE = load_AE.clone()
    moved_AE[:, -1] = 0
    moved_AE[:, 0] += load_AE[:, -1]
    return moved_AE
