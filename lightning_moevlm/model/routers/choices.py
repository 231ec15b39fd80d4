"""Makes a plan from each token's k choices."""

import torch
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import PairPlan, RoutingInput
from lightning_moevlm.model.routers.random_bits import scramble


def make_plan(
    inputs: RoutingInput,
    logits_TE: Tensor,
    probs_TE: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    chosen_TK: Tensor | None = None,
    noise_std_TE: Tensor | None = None,
    noisy_logits_TE: Tensor | None = None,
) -> PairPlan:
    """Return the plan in which token t goes to expert_TK[t]; pairs are ordered by choice, then token.

    Choice-major order serves all first choices before any second one when capacity is short. chosen_TK: bool, False
    if a choice is not used; None uses all. noise_std_TE, noisy_logits_TE: of the noise on the logits, if any.
    """
    num_tokens, num_choices = expert_TK.shape
    taken_TK = inputs.valid_T.unsqueeze(-1).expand(num_tokens, num_choices)
    if chosen_TK is not None:
        taken_TK = taken_TK & chosen_TK
    taken_N = _choice_major(taken_TK)
    return PairPlan(
        token_N=torch.arange(num_tokens, device=expert_TK.device).expand(num_choices, num_tokens).reshape(-1),
        expert_N=_choice_major(expert_TK),
        weight_N=_choice_major(weight_TK),
        chosen_N=taken_N,
        kept_N=taken_N,
        logits_TE=logits_TE,
        probs_TE=probs_TE,
        modality_T=inputs.modality_T,
        valid_T=inputs.valid_T,
        num_sequences=inputs.num_sequences,
        noise_std_TE=noise_std_TE,
        noisy_logits_TE=noisy_logits_TE,
        num_choices=num_choices,
    )


def choose_experts(scores_TE: Tensor, top_k: int, inputs: RoutingInput) -> Tensor:
    """Return the experts with the largest scores, int64 (T, K), or those that were chosen elsewhere."""
    return scores_TE.topk(top_k, dim=-1).indices if inputs.expert_TK is None else inputs.expert_TK


def draw_choices(number_T: Tensor, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Return k pseudo-random experts of each number, int64 (T, K); equal numbers draw equal experts."""
    expert_E = torch.arange(num_experts, device=number_T.device)
    draw_TE = scramble(number_T.unsqueeze(-1) * num_experts + expert_E, seed)
    return draw_TE.topk(top_k, dim=-1).indices


def list_choices(plan: PairPlan) -> Tensor:
    """Return the experts of each token, int64 (T, K), of a plan that `make_plan` made."""
    return plan.expert_N.view(-1, plan.num_tokens).t()


def check_top_k(top_k: int, most: int, key: str = "top_k", limit: str = "num_experts", least: int = 1) -> None:
    """Refuse a number of choices that the experts cannot serve.

    Args:
        top_k: value of the router's option.
        most: largest number that is allowed.
        key: name of the option.
        limit: meaning of `most`, for the message.
        least: smallest number that is allowed.

    Raises:
        UserError: top_k outside least..most.
    """
    if not least <= top_k <= most:
        raise UserError(f"router.{key} is {top_k}: choose a number between {least} and {most}, the {limit}")


def check_renormalise(renormalise: bool, top_k: int) -> None:
    """Refuse to divide a single weight by itself.

    Raises:
        UserError: renormalise with top_k = 1.
    """
    if renormalise and top_k == 1:
        raise UserError(
            "router.renormalise needs router.top_k >= 2: with top_k 1 every weight becomes 1 and the router gets no "
            "gradient from the task; set renormalise to false or top_k to 2"
        )


def renormalise_weights(weight_TK: Tensor) -> Tensor:
    """Divide each token's weights by their sum."""
    return weight_TK / weight_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def even_plan(inputs: RoutingInput, expert_TK: Tensor, num_experts: int) -> PairPlan:
    """Return the plan of a router without scores: weights are 1 / K, logits_TE are 0 and probs_TE even, all fp32."""
    num_tokens, num_choices = expert_TK.shape
    logits_TE = torch.zeros(num_tokens, num_experts, dtype=torch.float32, device=expert_TK.device)
    weight_TK = torch.full_like(expert_TK, 1.0 / max(1, num_choices), dtype=torch.float32)
    return make_plan(inputs, logits_TE, logits_TE.softmax(dim=-1), expert_TK, weight_TK)


def count_turns(taken_T: Tensor, num_sequences: int, training: bool) -> Tensor:
    """Number the selected tokens (bool) from 0: int64, undefined for the others.

    Numbers run through the batch while training, so that taking turns gives experts equal loads. In evaluation they run
    within each sample, so that its output does not depend on the other samples of its batch.
    """
    taken_BS = (
        taken_T.unsqueeze(0) if training else taken_T.unflatten(0, (num_sequences, len(taken_T) // num_sequences))
    )
    return (taken_BS.cumsum(dim=1) - 1).clamp(min=0).flatten()


def _choice_major(values_TK: Tensor) -> Tensor:
    return values_TK.t().reshape(-1)
