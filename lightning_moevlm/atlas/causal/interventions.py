"""Changes a routing plan in evaluation: an expert off, the best choice left out, choices by chance or from elsewhere.

All but `ExpertOff` and `WithoutBest` give each token a new order of experts. The choice at place j of the old order
goes to place j of the new one and keeps its weight, so the gates stay and the experts differ:

    order(t)      the experts that token t chose, then the others, each part by falling probability
    expert'(t, j) = order'(t, j)        weight'(t, j) = weight(t, j)

A new order that equals the old one changes nothing. A layer applies its capacity to the changed plan. Switching an
expert off and watching the loss of a category is the causal test of its role; to send its tokens on to rank k + 1 keeps
the layer's work, to drop them also takes work away.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import MixPlan, Modality, PairPlan, RoutingInput, RoutingPlan
from lightning_moevlm.model.metrics.routing_shift import chosen_experts
from lightning_moevlm.model.routers.choices import count_turns, draw_choices


class Intervention(Protocol):
    """A change of the plans of one layer.

    reads_identity: whether it needs token ids and patch codes.
    """

    reads_identity: ClassVar[bool]

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> RoutingPlan:
        """Return the plan that runs in place of the router's; the router's inputs are those that it was made from."""


@dataclass(frozen=True)
class ExpertOff:
    """Takes an expert's tokens away.

    Args:
        expert: index in its layer.
        to: "next" gives each of its tokens, with the weight, to the best expert that the token did not choose (rank
            k + 1); a token that chose all experts loses the choice. "nothing" drops its choices.
    """

    reads_identity: ClassVar[bool] = False
    expert: int
    to: Literal["next", "nothing"] = "next"

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> RoutingPlan:
        """Change its pairs alone; of soft slots, which have no next expert, nothing but "nothing" is defined."""
        if isinstance(plan, MixPlan):
            if self.to == "next":
                raise UserError("an expert of soft slots has no next-ranked one: switch it off to nothing")
            combine_BSEZ = plan.combine_BSEZ.clone()
            combine_BSEZ[:, :, self.expert] = 0.0
            return plan._replace(combine_BSEZ=combine_BSEZ)
        own_N = plan.chosen_N & (plan.expert_N == self.expert)
        return _drop(plan, own_N) if self.to == "nothing" else _send_on(plan, own_N)


@dataclass(frozen=True)
class WithoutBest:
    """Sends each token's best choice to its expert of rank k + 1, with the weight: how redundant are experts?

    Tokens that chose all experts stay as they are. Leaving out the best experts of each token is the redundancy probe
    of DeepSeekMoE (arXiv 2401.06066).
    """

    reads_identity: ClassVar[bool] = False

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> PairPlan:
        """Change the pair of each token's best expert."""
        plan = _pairs(plan)
        best_T = rank_experts(plan)[:, 0]
        is_full_T = chosen_experts(plan).all(dim=1)
        best_N = plan.chosen_N & (plan.expert_N == best_T[plan.token_N]) & ~is_full_T[plan.token_N]
        return _send_on(plan, best_N)


@dataclass(frozen=True)
class RandomChoices:
    """Chooses by chance, a draw for each position of a sample, as `FixedRouter` with the rule "random".

    Args:
        seed: another seed is another draw.
    """

    reads_identity: ClassVar[bool] = False
    seed: int = 0

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> PairPlan:
        """Order experts by the draw."""
        turn_T = count_turns(inputs.valid_T, inputs.num_sequences, training=False)  # padding takes no turn
        return reorder(_pairs(plan), draw_choices(turn_T, plan.num_experts, plan.num_experts, self.seed))


@dataclass(frozen=True)
class HashedChoices:
    """Chooses by token id or patch code, as `HashRouter`.

    Args:
        seed: of the hash.
    """

    reads_identity: ClassVar[bool] = True
    seed: int = 0

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> PairPlan:
        """Order experts by the hash.

        Raises:
            UserError: a backbone that does not pass token ids.
        """
        if inputs.identity_T is None:
            raise UserError(
                "hashed choices need token ids and patch codes, which this backbone does not pass to its routers: "
                "leave this intervention out"
            )
        return reorder(_pairs(plan), draw_choices(inputs.identity_T, plan.num_experts, plan.num_experts, self.seed))


@dataclass(frozen=True)
class OtherSample:
    """Freezes choices to those of another sample of the batch: what is content worth beyond position?

    Token i of a modality chooses as token i of that modality in the other sample, counted without padding; a shorter
    sample starts again. The effect depends on the composition of the batch.

    Args:
        shift: samples from one to the other, around the end of the batch.
    """

    reads_identity: ClassVar[bool] = False
    shift: int = 1

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> PairPlan:
        """Take the order of the other token."""
        plan = _pairs(plan)
        return reorder(plan, rank_experts(plan)[_token_of_other(plan, self.shift)])


@dataclass(frozen=True)
class FrozenChoices:
    """Freezes choices to those of another pass over the same tokens, such as that of an earlier checkpoint.

    Args:
        choices: plan of the layer in that pass.
    """

    reads_identity: ClassVar[bool] = False
    choices: PairPlan

    def __call__(self, plan: RoutingPlan, inputs: RoutingInput) -> PairPlan:
        """Take the order of the other pass."""
        plan = _pairs(plan)
        assert plan.logits_TE.shape == self.choices.logits_TE.shape, "passes over the same tokens"
        return reorder(plan, rank_experts(self.choices))


def rank_experts(plan: PairPlan) -> Tensor:
    """Return each token's order of experts, int64 (T, E): chosen ones first, each part by falling probability."""
    return (plan.probs_TE + 2 * chosen_experts(plan)).argsort(dim=-1, descending=True, stable=True)


def reorder(plan: PairPlan, order_TE: Tensor) -> PairPlan:
    """Return the plan with each choice at its place in another order of experts.

    order_TE: int64, a permutation of the experts for each token.
    """
    place_TE = rank_experts(plan).argsort(dim=-1)
    place_N = place_TE[plan.token_N, plan.expert_N]
    return plan._replace(expert_N=torch.where(plan.chosen_N, order_TE[plan.token_N, place_N], plan.expert_N))


def _send_on(plan: PairPlan, own_N: Tensor) -> PairPlan:
    """Give some pairs, at most one of each token, to the best expert that the token did not choose, else drop them."""
    chosen_TE = chosen_experts(plan)
    next_T = plan.probs_TE.masked_fill(chosen_TE, -1.0).argmax(dim=-1)
    is_full_N = chosen_TE.all(dim=1)[plan.token_N]
    sent = plan._replace(expert_N=torch.where(own_N & ~is_full_N, next_T[plan.token_N], plan.expert_N))
    return _drop(sent, own_N & is_full_N)


def _drop(plan: PairPlan, own_N: Tensor) -> PairPlan:
    return plan._replace(
        weight_N=torch.where(own_N, 0.0, plan.weight_N), chosen_N=plan.chosen_N & ~own_N, kept_N=plan.kept_N & ~own_N
    )


def _token_of_other(plan: PairPlan, shift: int) -> Tensor:
    """Return for each token the one that it takes the place of, int64 (T); itself if the other sample has none."""
    num_samples, sample_T = plan.num_sequences, plan.sequence_T
    own_T = torch.arange(plan.num_tokens, device=sample_T.device)
    found_T = own_T
    for modality in Modality:
        mine_T = plan.valid_T & (plan.modality_T == modality)
        turn_T = count_turns(mine_T, num_samples, training=False)
        table_BS = own_T.new_zeros(num_samples, plan.num_tokens // max(1, num_samples))
        table_BS[sample_T[mine_T], turn_T[mine_T]] = own_T[mine_T]
        count_B = torch.zeros_like(table_BS[:, 0]).index_add(0, sample_T, mine_T.long())
        other_T = (sample_T + shift) % num_samples
        there_T = table_BS[other_T, turn_T % count_B[other_T].clamp(min=1)]
        found_T = torch.where(mine_T & (count_B[other_T] > 0), there_T, found_T)
    return found_T


def _pairs(plan: RoutingPlan) -> PairPlan:
    if isinstance(plan, MixPlan):
        raise UserError("soft slots mix tokens and choose no experts: only switching an expert off to nothing applies")
    return plan
