"""A model of transformers whose feed-forwards are mixtures of experts; written by lightning-moevlm (Apache-2.0).

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

`config.mixtures` says which feed-forwards, how many experts they have and how a token chooses among them.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

DENSE = "LlamaForCausalLM"
"""The class of transformers whose feed-forwards are replaced."""

Dense: Any = getattr(transformers, DENSE)

PARTS = ("gate", "gate_bias", "up", "up_bias", "down", "down_bias")


class UpcycledConfig(Dense.config_class):
    """The configuration of the dense model, and `mixtures`."""

    model_type = f"upcycled_{Dense.config_class.model_type}"


def choose(logits: Tensor, bias: Tensor | None, score: str, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Return the weights and experts of each token, (T, K) both.

    Args:
        logits: (T, E), fp32.
        bias: (E), added to the scores when experts are chosen, not to their weights; None: there is none.
        score: softmax, sigmoid or sqrt_softplus.
        top_k: K.
        renormalise: whether a token's weights are divided by their sum.
    """
    if score == "softmax":
        scores = logits.softmax(dim=-1)
    else:
        scores = logits.sigmoid() if score == "sigmoid" else F.softplus(logits).clamp(min=1e-20).sqrt()
    experts = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20) if renormalise else weights, experts


class Mixture(nn.Module):
    """Experts in place of a feed-forward: a(x W_gate + b) * (x W_up + b) W_down + b, or without the gate.

    Args:
        dense: the feed-forward, whose activation function they share.
        common: num_experts, top_k, score, renormalise, has_bias.
        sizes: dim, hidden_dim, parts and activation of this one.
    """

    bias: Tensor

    def __init__(self, dense: nn.Module, common: dict[str, Any], sizes: dict[str, Any]) -> None:
        super().__init__()
        place, _, name = sizes["activation"].rpartition(".")
        self.activation = getattr(F if place else dense, name)
        self.common, self.parts = common, sizes["parts"]
        num_experts, dim, hidden_dim = common["num_experts"], sizes["dim"], sizes["hidden_dim"]
        self.router = nn.Linear(dim, num_experts, bias=False)
        if common["has_bias"]:
            self.register_buffer("bias", torch.zeros(num_experts))
        for part in sizes["parts"]:
            matrix = part.removesuffix("_bias")
            size_in, size_out = (hidden_dim, dim) if matrix == "down" else (dim, hidden_dim)
            shape = (num_experts, size_out) if part.endswith("_bias") else (num_experts, size_in, size_out)
            self.register_parameter(part, nn.Parameter(torch.zeros(shape)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Route the tokens and add up what their experts give."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        common = self.common
        logits = F.linear(tokens.float(), self.router.weight.float())
        bias = self.bias.float() if common["has_bias"] else None
        weights, experts = choose(logits, bias, common["score"], common["top_k"], common["renormalise"])
        total = torch.zeros_like(tokens, dtype=weights.dtype)
        for expert in range(common["num_experts"]):
            token, choice = torch.where(experts == expert)
            if len(token):
                rows = self._run(tokens[token], expert).to(total.dtype)
                total.index_add_(0, token, rows * weights[token, choice, None])
        return total.to(hidden.dtype).view(hidden.shape)

    def _run(self, rows: Tensor, expert: int) -> Tensor:
        if "gate" in self.parts:
            unit = self.activation(self._linear(rows, "gate", expert)) * self._linear(rows, "up", expert)
        else:
            unit = self.activation(self._linear(rows, "up", expert))
        return self._linear(unit, "down", expert)

    def _linear(self, rows: Tensor, part: str, expert: int) -> Tensor:
        out = rows @ getattr(self, part)[expert]
        return out + getattr(self, f"{part}_bias")[expert] if f"{part}_bias" in self.parts else out


class UpcycledModel(Dense):
    """The dense model with its mixtures."""

    config_class = UpcycledConfig

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__(config)
        for path, sizes in config.mixtures["layers"].items():
            self.set_submodule(path, Mixture(self.get_submodule(path), config.mixtures, sizes))
        self.post_init()
