"""A model of transformers with routers, or whole mixtures, of its own; written by lightning-moevlm (Apache-2.0).

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

`config.mixtures` says which modules are replaced, and how a token chooses its experts there.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

Own: Any = transformers.LlamaForCausalLM
"""The class of transformers whose modules are replaced."""

Body: Any = transformers.LlamaModel
"""The same without its head."""


class RoutedLlamaConfig(Own.config_class):
    """The configuration of that class, and `mixtures`: options of `Router` and `Mixture` by the path of a module."""

    model_type = f"routed_{Own.config_class.model_type}"


class Router(nn.Module):
    """Chooses the top-k experts of each token, in fp32.

        s = score(x W^T),   experts = top-k(s + b),   weight_e = factor * w_e (divided by the sum of the chosen w)

    Args:
        dim: D. num_experts: E. top_k: K.
        score: function of the logits that experts are chosen by: softmax, sigmoid or sqrt_softplus.
        weight_score: function of the logits that weights w are made of.
        renormalise: whether a token's weights are divided by their sum.
        factor: of the weights.
        groups: num_groups, top_groups and experts_per_score, where a token may use the best groups of experts alone.
    """

    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        score: str,
        weight_score: str,
        renormalise: bool,
        factor: float,
        groups: dict[str, int] | None,
    ) -> None:
        super().__init__()
        self.top_k, self.score, self.weight_score, self.renormalise = top_k, score, weight_score, renormalise
        self.factor, self.groups = factor, groups
        # of this dtype whatever that of the model is
        self.weight = nn.Parameter(torch.zeros(num_experts, dim, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, hidden: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (T, E), and weights and experts of each token, (T, K) both, as blocks of transformers expect.

        Args:
            hidden: tokens, (..., D).
            more: arguments of the router that stood here.
            named: likewise.
        """
        logits, weights, experts = self.choose(hidden.reshape(-1, hidden.shape[-1]))
        return logits, weights.to(hidden.dtype), experts

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of tokens (T, D), with weights in fp32."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())
            steered = apply_score(logits, self.score) + self.bias.float()
            if self.groups is not None:
                steered = limit_to_groups(steered, **self.groups)
            experts = steered.topk(self.top_k, dim=-1).indices
            weights = apply_score(logits, self.weight_score).gather(-1, experts)
            if self.renormalise:
                weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
            return logits, weights * self.factor, experts


def apply_score(logits: Tensor, score: str) -> Tensor:
    """Return the scores, (T, E)."""
    if score == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if score == "sigmoid" else F.softplus(logits).clamp(min=1e-20).sqrt()


def limit_to_groups(scores: Tensor, num_groups: int, top_groups: int, experts_per_score: int) -> Tensor:
    """Return the scores, (T, E), with minus infinity outside of a token's best groups."""
    grouped = scores.unflatten(-1, (num_groups, -1))
    of_groups = grouped.topk(min(experts_per_score, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    best = torch.zeros_like(of_groups, dtype=torch.bool).scatter(-1, of_groups.topk(top_groups).indices, True)
    return grouped.masked_fill(~best.unsqueeze(-1), -torch.inf).flatten(-2)


class Mixture(nn.Module):
    """Experts in place of a feed-forward: a(x W_gate + b) * (x W_up + b) W_down + b, or without the gate.

    Args:
        dense: the feed-forward, whose activation function they share.
        router: options of the router.
        hidden_dim: of an expert.
        parts: names of its weights.
        activation: name of the function: of torch.nn.functional, or of a part of the feed-forward.
    """

    def __init__(
        self, dense: nn.Module, router: dict[str, Any], hidden_dim: int, parts: list[str], activation: str
    ) -> None:
        super().__init__()
        place, _, name = activation.rpartition(".")
        self.activation = getattr(F if place else dense, name)
        self.parts = parts
        self.router = Router(**router)
        num_experts, dim = self.router.weight.shape
        for part in parts:
            matrix = part.removesuffix("_bias")
            size_in, size_out = (hidden_dim, dim) if matrix == "down" else (dim, hidden_dim)
            shape = (num_experts, size_out) if part.endswith("_bias") else (num_experts, size_in, size_out)
            self.register_parameter(part, nn.Parameter(torch.zeros(shape)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Route the tokens and add up what their experts give."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        _, weights, experts = self.router.choose(tokens)
        total = torch.zeros_like(tokens, dtype=weights.dtype)
        for expert in range(len(self.router.weight)):
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


def replace_modules(model: Any, prefix: str = "") -> None:
    """Put routers and mixtures into a model, in place. prefix: of the paths, which the model's own do not have."""
    for path, options in model.config.mixtures.items():
        place = path.removeprefix(prefix)
        if "experts" in options:
            dense = model.get_submodule(place)
            model.set_submodule(place, Mixture(dense, options["router"], **options["experts"]))
        else:
            model.set_submodule(place, Router(**options["router"]))
    model.post_init()


class RoutedLlamaForCausalLM(Own):
    """The model with its routers or mixtures."""

    config_class = RoutedLlamaConfig

    def __init__(self, config: RoutedLlamaConfig) -> None:
        super().__init__(config)
        replace_modules(self)


class RoutedLlamaModel(Body):
    """The same without its head."""

    config_class = RoutedLlamaConfig

    def __init__(self, config: RoutedLlamaConfig) -> None:
        super().__init__(config)
        replace_modules(self, f"{Own.base_model_prefix}.")
