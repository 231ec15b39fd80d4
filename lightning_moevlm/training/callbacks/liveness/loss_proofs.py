"""Proof of an auxiliary loss: its gradient reaches what it should, and nothing that it must not.

    reaches    the gradient of the raw loss on router weights that the optimiser moves (of the output z-loss: on the
               heads) is not 0, and more than rounding: |g| > 1e-6 |loss| rms |x| for the tokens x that routers see
    spares     experts of the last sparse block: nothing between them and a loss on routing computes with them
    changes    without the term, some bit of the step's gradient on those weights is another one
    scale      every layer twice gives the same raw loss, and so do counts of the step twice (two ranks, two
               micro-batches alike): it does not move with the number of layers, ranks or micro-batches
    idle       where the gradient is 0, as at a minimum, it is not so for plans pushed out of balance

Balance gradients that never arrive, coefficients that are ignored and losses that are constant by a mistake in
broadcasting have each trained models elsewhere (tests/test_traps.py says where).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.contracts.schedules import Ramp
from lightning_moevlm.contracts.step_records import Term
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.model.losses import AdaptiveWeight, LossInput
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks.liveness.receipt import Receipt
from lightning_moevlm.training.callbacks.liveness.rehearsal import Rehearsal

_ROUNDING = 1e-6
_PUSHES = (0.0, 2.0, 8.0)  # on the logits of one expert, beside noise


class Reach(NamedTuple):
    """Gradients of one term. targets: on the weights that it should reach. spared: on those that it must not."""

    targets: list[Tensor | None]
    spared: list[Tensor | None]


def loss_receipts(rehearsal: Rehearsal, optimizers: Sequence[Optimizer]) -> list[Receipt]:
    """Return the receipt of every enabled auxiliary loss."""
    terms, whole = rehearsal.report.auxiliary, _WholeGradient(rehearsal.report.total_loss)
    names = rehearsal.module.losses.weights
    return [_Proof(rehearsal, name, optimizers, whole).receipt(terms.get(name)) for name in names]


def find_trained_parameters(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """Return the parameters that optimisers move: owned, and at a peak rate above 0."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {p for group in groups if group.get("initial_lr", group["lr"]) > 0 for p in group["params"]}


def gradients_of(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient on each parameter, None where the value does not depend on it; `.grad` stays as it is."""
    wanted = [p for p in parameters if p.requires_grad]
    if not value.requires_grad or not wanted:
        return [None] * len(parameters)
    found = iter(torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in parameters]


def norm_of(gradients: Iterable[Tensor | None]) -> float:
    """Return the norm of all of them together, in fp32; those that are None count as 0."""
    present = [gradient.float() for gradient in gradients if gradient is not None]
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)))) if present else 0.0


class _WholeGradient:
    """The gradient of the total loss, taken once for all losses that ask for it on the same weights."""

    def __init__(self, total_loss: Tensor) -> None:
        self._total_loss = total_loss
        self._known: dict[tuple[int, ...], list[Tensor | None]] = {}

    def on(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return it on each parameter, None where the loss does not depend on it."""
        key = tuple(map(id, parameters))
        if key not in self._known:
            self._known[key] = gradients_of(self._total_loss, parameters)
        return self._known[key]


class _Proof:
    """What is asked of one loss."""

    def __init__(self, rehearsal: Rehearsal, name: str, optimizers: Sequence[Optimizer], whole: _WholeGradient) -> None:
        self.rehearsal = rehearsal
        self.whole = whole
        self.module: VisionLanguageModule = rehearsal.module
        self.name = name
        self.on_routing = name != "output_z"
        self.target = "router weights" if self.on_routing else "the heads"
        moved = find_trained_parameters(optimizers)
        self.every = list(_target_parameters(rehearsal, self.on_routing))
        self.moved = [p for p in self.every if p in moved and p.requires_grad]

    def receipt(self, term: Term | None) -> Receipt:
        early = self._declared_off(term)
        if early is not None:
            return early
        if term is None:
            return self._missing()
        return self._reaches(term)

    def _declared_off(self, term: Term | None) -> Receipt | None:
        weight = self.module.current_weights[self.name]
        if float(weight) == 0:
            scheduled = isinstance(self.module.losses.weights[self.name], Ramp)
            return self._is("off", "its weight is 0 at this step" if scheduled else "its weight is 0", 0.0)
        if self.on_routing and not any(isinstance(layer, MoEFFN) for layer in self.module.backbone.modules()):
            return self._is("off", "a dense model has no routers")
        freeze = self.module.actions.freeze_router
        if self.on_routing and freeze is not None and self.module.global_step >= freeze.after_steps:
            return self._is("off", f"actions.freeze_router keeps routers still after step {freeze.after_steps}")
        return None

    def _missing(self) -> Receipt:
        if self.on_routing and not self.rehearsal.output.plans:
            return self._dead(
                "the objective hands no routing plans on, and the model has routers",
                "let the objective return the plans of every forward pass",
            )
        return self._is("unproven", "this batch has nothing that it is defined on")

    def _reaches(self, term: Term) -> Receipt:
        raw, weight = term.raw, float(term.weight)
        if not self.moved:
            return self._dead(f"{self._who_holds_still()}, so nothing learns from it", self._advice())
        found = gradients_of(raw, [*self.moved, *self._must_not_reach()])
        reach = Reach(found[: len(self.moved)], found[len(self.moved) :])
        size = norm_of(reach.targets)
        if all(gradient is None for gradient in reach.targets):
            return self._dead(
                f"its gradient reaches none of the {len(self.moved)} tensors of {self.target}: it is computed from "
                "values that were detached, or that do not depend on them",
                self._advice(),
            )
        spared = norm_of(reach.spared)
        if spared > 0:
            return self._dead(
                f"its gradient has norm {spared:.2g} on experts of the last sparse block, which a loss on routing must "
                "not reach",
                self._advice(),
            )
        moves = self._moves_with_scale(raw)
        if moves is not None:
            return self._dead(moves, "take the mean over layers and shares of counts, not sums")
        if size <= _ROUNDING * abs(float(raw.detach())) * self._token_size():
            return self._at_rest()
        return self._changes(reach.targets, weight, size)

    def _changes(self, gradients: list[Tensor | None], weight: float, size: float) -> Receipt:
        whole = self.whole.on(self.moved)
        changed, total = 0, 0
        for own, all_ in zip(gradients, whole, strict=True):
            if own is not None and all_ is not None:
                rest = all_ - weight * own
                changed += int((rest + weight * own != rest).sum())
            total += 0 if all_ is None else all_.numel()
        reached = sum(gradient is not None and bool(gradient.any()) for gradient in gradients)
        what = f"gradient norm {weight * size:.2g} on {self.target} ({reached} of {len(gradients)} tensors)"
        if changed:
            return self._is("alive", f"{what}; off, {changed / total:.0%} of them get another one", weight * size)
        if isinstance(self.module.losses.weights[self.name], Ramp | AdaptiveWeight):
            return self._is("idle", f"{what}: too little to change a bit of it at weight {weight:.2g}", weight * size)
        return self._dead(
            f"{what}: at weight {weight:.2g} the step is the same without it", "choose a larger weight, or null"
        )

    def _at_rest(self) -> Receipt:
        """The gradient is 0 here: ask whether it is so everywhere."""
        largest = 0.0
        for push in _PUSHES:
            leaves, inputs = _pushed(self.rehearsal.inputs, push)
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
            return self._is("idle", f"no gradient on {self.target} here; a plan pushed out of balance has one", 0.0)
        return self._dead(
            f"its gradient on {self.target} is 0 here and for plans pushed out of balance: it is constant",
            self._advice(),
        )

    def _moves_with_scale(self, raw: Tensor) -> str | None:
        """Say how the raw loss moves with layers or counts; None where it stands."""
        if not self.on_routing:
            return None
        twice = [*self.rehearsal.inputs, *self.rehearsal.inputs]
        counted = [
            inputs
            if inputs.counts is None
            else inputs._replace(
                counts=inputs.counts._replace(
                    chosen_AE=2 * inputs.counts.chosen_AE,
                    kept_AE=2 * inputs.counts.kept_AE,
                    token_A=2 * inputs.counts.token_A,
                )
            )
            for inputs in self.rehearsal.inputs
        ]
        for what, other in (("every layer counted twice", twice), ("the counts of two equal ranks", counted)):
            with self.rehearsal.in_losses(), torch.no_grad():
                term = self.module.losses.terms(other, self.rehearsal.output.log_partitions)[self.name]
            if not torch.allclose(term.raw, raw.detach(), rtol=1e-4, atol=1e-7):
                return f"its scale moves: {what} makes {float(raw.detach()):.4g} to {float(term.raw):.4g}"
        return None

    def _must_not_reach(self) -> list[nn.Parameter]:
        """Experts of the last sparse block; all else may lie between a router and the inputs."""
        if not self.on_routing:
            return []
        last = max(named.block for named in self.rehearsal.output.plans)
        layers = {named.layer for named in self.rehearsal.output.plans if named.block == last}
        return [p for path in layers for p in self.module.backbone.get_submodule(path).experts.parameters()]  # type: ignore[union-attr]

    def _token_size(self) -> float:
        """Root mean square of the norms of the tokens that routers saw; 1 for losses elsewhere."""
        seen = [call.args[0] for call in self.rehearsal.calls.values() if isinstance(call.args[0], RoutingInput)]
        if not self.on_routing or not seen:
            return 1.0
        squares = [inputs.tokens_TD.detach().float().square().sum(dim=-1).mean() for inputs in seen]
        return float(torch.stack(squares).mean().sqrt())

    def _who_holds_still(self) -> str:
        if not self.every:
            return "the router has no weights"
        if not any(p.requires_grad for p in self.every):
            return f"{self.target} are frozen (requires_grad is off)"
        return f"no optimiser moves {self.target} (not in its groups, or at learning rate 0)"

    def _advice(self) -> str:
        return f"set model.{self._switch} to null, or mend what keeps it from {self.target}"

    @property
    def _switch(self) -> str:
        return self.module.losses.key(self.name)

    def _is(self, verdict: str, evidence: str, value: float | None = None) -> Receipt:
        return Receipt(self._switch, "loss", verdict, evidence, value)  # type: ignore[arg-type]

    def _dead(self, evidence: str, advice: str) -> Receipt:
        return Receipt(self._switch, "loss", "dead", evidence, None, advice)


def _target_parameters(rehearsal: Rehearsal, on_routing: bool) -> Iterable[nn.Parameter]:
    """What a loss must reach: routers that ran, or the heads of the objective and the embedding that they share."""
    module = rehearsal.module
    if not on_routing:
        shared = module.backbone.text_embedding_VD
        return [*module.objective.parameters(), *([shared] if isinstance(shared, nn.Parameter) else [])]
    layers: Mapping[str, None] = dict.fromkeys(named.layer for named in rehearsal.output.plans)
    return [p for path in layers for p in module.backbone.get_submodule(path).router.parameters()]  # type: ignore[union-attr]


def _pushed(inputs: Iterable[LossInput], push: float) -> tuple[list[Tensor], list[LossInput]]:
    """Return plans with noise on their logits and the first expert's raised, and their new leaves.

    Logits are brought to a root mean square of 1 at most: of a router that training has driven into saturation, every
    probability is 0 or 1, and no push would give a loss on them a gradient.
    """
    leaves: list[Tensor] = []
    pushed: list[LossInput] = []
    generator = torch.Generator().manual_seed(0)

    def noisy(values: Tensor) -> Tensor:
        return values.detach() + torch.randn(values.shape, generator=generator).to(values)

    for one in inputs:
        plan = one.plan
        size = plan.logits_TE.detach().float().square().mean().sqrt().clamp(min=1.0)
        logits_TE = noisy(plan.logits_TE / size.to(plan.logits_TE))
        logits_TE[:, 0] += push
        leaves.append(logits_TE.requires_grad_())
        probs_TE = logits_TE.softmax(dim=-1)
        plan = plan._replace(logits_TE=logits_TE, probs_TE=probs_TE)
        if isinstance(plan, PairPlan):
            plan = plan._replace(weight_N=probs_TE[plan.token_N, plan.expert_N])
            if plan.noisy_logits_TE is not None:
                plan = plan._replace(noisy_logits_TE=logits_TE + (plan.noisy_logits_TE - one.plan.logits_TE).detach())
        rows = None
        if one.rows is not None:
            rows = noisy(one.rows).requires_grad_()
            leaves.append(rows)
        pushed.append(one._replace(plan=plan, rows=rows))
    return leaves, pushed
