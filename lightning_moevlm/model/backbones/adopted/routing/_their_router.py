"""The router of another code base, as one of ours: it makes plans of what it decides."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.backbones.adopted.routing.seam import SCORES, Gate, TheirScore
from lightning_moevlm.model.precision import Region
from lightning_moevlm.model.routers import Router
from lightning_moevlm.model.routers.choices import make_plan, renormalise_weights


class TheirRouter(Router):
    """Calls a router of transformers unchanged.

    The plan's logits are widened from the dtype in which the router computes them, so they are as exact as it is. Its
    weights need not sum to 1: some families scale them.

    Args:
        theirs: the router.
        gate: what it returns.
    """

    keeps_weights = True  # see `initialise`
    keeps_dtype = True
    region: Region = "trunk"  # its weights have the dtype of the tokens that it multiplies

    def __init__(self, theirs: nn.Module, gate: Gate) -> None:
        super().__init__(gate.dim, gate.num_experts)
        self.theirs = theirs
        self.facts = gate
        self.has_logits = gate.score != "given"
        self._last: tuple[PairPlan, tuple[Tensor, ...]] | None = None

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.facts.top_k)

    def forward_flops_per_token(self) -> int:
        """2 FLOPs for each number of its matrices."""
        return 2 * sum(parameter.numel() for parameter in self.theirs.parameters() if parameter.ndim > 1)

    def rows(self) -> Tensor | None:
        """Return its matrix with a row per expert, if it has one alone."""
        shape = (self.num_experts, self.dim)
        found = [parameter for parameter in self.theirs.parameters() if parameter.shape == shape]
        return found[0] if len(found) == 1 else None

    def forward(
        self,
        inputs: RoutingInput,
        hidden: Tensor | None = None,
        more: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> PairPlan:
        """Ask it and write its choices down.

        Args:
            inputs: what the tokens are.
            hidden: the tokens in the shape that it expects; None takes them from `inputs`.
            more: further arguments of its own.
            named: likewise, by name.
        """
        results = self.theirs(inputs.tokens_TD if hidden is None else hidden, *more, **(named or {}))
        gate = self.facts
        # from here on in fp32: autocast would narrow what it has computed
        with torch.autocast(inputs.tokens_TD.device.type, enabled=False):
            scores_TE = results[gate.logits].reshape(-1, gate.num_experts).float()
            logits_TE, probs_TE = read_scores(scores_TE, gate.score)
            expert_TK, weight_TK = (results[at].reshape(-1, gate.top_k) for at in (gate.indices, gate.weights))
            # a copy, since their block may scale the weights in place, and plans must not change
            weight_TK = weight_TK.to(torch.float32, copy=True)
            plan = make_plan(inputs, logits_TE, probs_TE, expert_TK.long(), weight_TK)
        self._last = (plan, results)
        return plan

    def take_last(self) -> tuple[PairPlan, tuple[Tensor, ...]]:
        """Return its last plan and what that was read from, once."""
        last, self._last = self._last, None
        assert last is not None, "it has been asked"
        return last


class TheirBiasRouter(TheirRouter):
    """Moves the bias that the router adds to its scores when it chooses, as it was trained with.

        after each optimiser step:  b += u * sign(mean load - load)

    Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1). transformers holds the bias and never moves it.

    Args:
        theirs: the router.
        gate: what it returns.
        rate: u.

    Raises:
        UserError: the router has no such buffer.
    """

    def __init__(self, theirs: nn.Module, gate: Gate, rate: float) -> None:
        super().__init__(theirs, gate)
        self.rate = rate
        self._bias_E()

    @torch.no_grad()
    def rebalance(self, load_AE: Tensor, tally: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of the others; no load, no change."""
        load_E, bias_E = load_AE.sum(dim=0).float(), self._bias_E()
        bias_E += self.rate * (load_E.mean() - load_E).sign().view_as(bias_E).to(bias_E.dtype)

    def _bias_E(self) -> Tensor:
        for name, buffer in self.theirs.named_buffers():
            if name.endswith("bias") and buffer.numel() == self.num_experts:
                return buffer
        raise UserError(
            f"model.backbone.bias_rate: {type(self.theirs).__name__} has no balancing bias as a buffer of its own; set "
            "it to null, and balance by a loss or by model.backbone.router SigmoidBiasRouter"
        )


def read_scores(scores_TE: Tensor, score: TheirScore | None) -> tuple[Tensor, Tensor]:
    """Return logits and probabilities, fp32 (T, E) both; probabilities are scores divided by their sum."""
    if score == "given":
        return scores_TE.clamp(min=1e-30).log(), renormalise_weights(scores_TE)
    if score in (None, "softmax"):
        return scores_TE, scores_TE.softmax(dim=-1)
    return scores_TE, renormalise_weights(SCORES[score](scores_TE))
