"""The learned scores of a router, and the switches that every learned router has.

    logits = (x * jitter) W^T / temperature

Scores are divided by the temperature before anything else, so every rule built on them sees the same numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number


@dataclass(frozen=True)
class Gate:
    """Switches on the way from tokens to logits; the defaults are off.

    Args:
        jitter: multiply each input by a uniform draw from 1 - jitter to 1 + jitter while training (Switch, arXiv
            2101.03961, section 2.4; it uses 1e-2).
        dropout: share of inputs set to zero while training.
        temperature: divides the logits; above 1 softens the choice.
        initial_std: standard deviation of the initial weights; null takes the model's, 0 starts undecided. Routers that
            could not leave 0 refuse it. For routers by angle, it sets how fast rows turn.

    Raises:
        UserError: a value outside its range.
    """

    jitter: float = 0.0
    dropout: float = 0.0
    temperature: float = 1.0
    initial_std: float | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("gate.jitter", self.jitter, least=0, below=1)
        check_number("gate.dropout", self.dropout, least=0, below=1)
        check_number("gate.temperature", self.temperature, above=0)
        if self.initial_std is not None:
            check_number("gate.initial_std", self.initial_std, least=0, advice=", or null for the model's")

    def inputs(self, tokens_TD: Tensor, training: bool) -> Tensor:
        """Return the tokens as the router sees them."""
        if training and self.jitter:
            # drawn in fp32: the same noise for every dtype of the router
            noise_TD = torch.empty_like(tokens_TD, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
            tokens_TD = tokens_TD * noise_TD.to(tokens_TD.dtype)
        return F.dropout(tokens_TD, self.dropout, training) if self.dropout else tokens_TD

    def logits(self, tokens_TD: Tensor, weight_ED: Tensor, training: bool) -> Tensor:
        """Return (T, E) fp32 logits; the product is computed in the tokens' dtype."""
        scores_TE = F.linear(self.inputs(tokens_TD, training), weight_ED.to(tokens_TD.dtype)).float()
        return scores_TE / self.temperature if self.temperature != 1.0 else scores_TE


def refuse_zero_start(gate: Gate, router: str, reason: str) -> None:
    """Refuse initial weights of 0 for a router that would never leave them.

    Raises:
        UserError: with the reason.
    """
    if gate.initial_std == 0:
        raise UserError(
            f"gate.initial_std is 0, and {router} would never learn from there: {reason}; choose a small value, "
            "such as 1e-3, or null for the model's"
        )
