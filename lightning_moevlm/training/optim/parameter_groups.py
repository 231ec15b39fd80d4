"""Splits parameters into groups by role; a role decides weight decay and learning rate.

Only matrices decay: norms, biases, embeddings, positions and routers do not. Decaying a router shrinks its logits,
which is a hidden router z-loss; an ablation of stabilisers must not contain one by accident.

Every trainable parameter is in one group:

    role     members                                   learning rate        weight decay
    matrix   matrices of the trunk                     peak                 the optimiser's
    vector   norms, biases, embeddings, positions      peak                 0
    edge     patch projection, heads                   peak                 the optimiser's
    router   all parameters of routers                 peak x multiplier    router_weight_decay
    expert   stacks (E, in, out), one slice an expert  peak x multiplier    the optimiser's
    shared   the same, of shared experts               peak                 the optimiser's

Groups depend only on names, so a checkpoint can be resumed with other options.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict, get_args

from torch import nn
from torch.optim import Adam, Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.checks.optimizer_checks import FAILURES, refuse_invalid_options
from lightning_moevlm.training.optim.optimizers.hyperball import Hyperball
from lightning_moevlm.training.optim.optimizers.lion import Lion
from lightning_moevlm.training.optim.optimizers.muon import MuonAdamW
from lightning_moevlm.training.optim.optimizers.stable_adamw import StableAdamW
from lightning_moevlm.training.optim.tensor_roles import Role

_VECTORS = ("token", "position", "mask", "modality", "embed_tokens", "pos_embed")
_EDGES = ("patches", "lm_head")


class ParameterGroup(TypedDict):
    """An optimiser's parameter group."""

    params: list[nn.Parameter]
    role: Role
    """Read by rules per tensor and by optimisers that treat matrices differently."""
    weight_decay: NotRequired[float]
    """If missing, the optimiser's default."""
    parts: NotRequired[list[int]]
    """Of matrices: how many lie one below the other in each, 3 H in the queries, keys and values of H heads."""


@dataclass(frozen=True)
class GroupOptions:
    """Learning rates and weight decay of routers and experts, relative to the optimiser's own.

    Args:
        router_lr_multiplier: factor of the routers' learning rate; 0 freezes them.
        router_weight_decay: weight decay of the routers.
        expert_lr_multiplier: factor of the expert stacks' learning rate; sqrt(K / E) compensates for fewer tokens per
            expert.
        independent_weight_decay: decay by schedule x weight_decay at each step, independent of the peak learning rate
            (arXiv 2309.14322, section 3.2, uses 1e-4). false decays by learning rate x weight_decay, as in torch.

    Raises:
        UserError: a negative value.
    """

    router_lr_multiplier: float = 1.0
    router_weight_decay: float = 0.0
    expert_lr_multiplier: float = 1.0
    independent_weight_decay: bool = False

    def __post_init__(self) -> None:
        for name in ("router_lr_multiplier", "router_weight_decay", "expert_lr_multiplier"):
            check_number(f"groups.{name}", getattr(self, name), least=0)

    def apply(self, optimizer: Optimizer) -> None:
        """Set peak rates and decays of a new optimiser, before its schedule is built.

        Raises:
            UserError: independent decay for an optimiser that adds decay to the gradient.
        """
        if self.independent_weight_decay and not _decays_weights(optimizer):
            raise UserError(
                f"groups.independent_weight_decay does not fit {type(optimizer).__name__}, which adds decay to the "
                "gradient: choose AdamW, StableAdamW, Lion, MuonAdamW or Hyperball, or set it to false"
            )
        multiplier = {"router": self.router_lr_multiplier, "expert": self.expert_lr_multiplier}
        for group in optimizer.param_groups:
            group["lr"] *= multiplier.get(group["role"], 1.0)
            if group["role"] == "router":
                group["weight_decay"] = self.router_weight_decay
            if self.independent_weight_decay and group["lr"] > 0:
                # decay is lr_t x weight_decay in every one of them, and lr_t = schedule_t x peak
                group["weight_decay"] /= group["lr"]


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], parts: Mapping[str, int] | None = None
) -> list[ParameterGroup]:
    """Split trainable parameters by role; an empty group is left out.

    Args:
        named: parameters by their full names.
        parts: of a parameter that joins several matrices, how many; null knows of none.
    """
    members: dict[Role, list[nn.Parameter]] = {role: [] for role in get_args(Role)}
    counts: list[int] = []
    for name, parameter in named:
        if parameter.requires_grad:
            role = role_of(name, parameter)
            members[role].append(parameter)
            if role == "matrix":
                counts.append((parts or {}).get(name, 1))
    groups: list[ParameterGroup] = [{"params": params, "role": role} for role, params in members.items() if params]
    for group in groups:
        if group["role"] in ("vector", "router"):
            group["weight_decay"] = 0.0
        if group["role"] == "matrix" and parts:
            group["parts"] = counts
    return groups


def parameter_names(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Return the names of trainable parameters in the order in which an optimiser's state numbers them."""
    pairs = list(named)
    name_of = {parameter: name for name, parameter in pairs}
    return [name_of[parameter] for group in parameter_groups(pairs) for parameter in group["params"]]


def build_optimizer(
    factory: Callable[[Iterable], Optimizer],
    named: Iterable[tuple[str, nn.Parameter]],
    options: GroupOptions,
    parts: Mapping[str, int] | None = None,
) -> Optimizer:
    """Return a new optimiser over the parameter groups, each with its peak rate and decay; parts: as of the groups.

    Raises:
        UserError: the optimiser refuses an option or a parameter, or cannot decay as the groups require.
    """
    try:
        optimizer = factory(parameter_groups(named, parts))
    except FAILURES as error:
        raise UserError(
            f"model.optimizer cannot be built: {error}; change its options, or choose one of `moevlm list optimizers`, "
            "which take every parameter (MuonAdamW in place of torch's Muon)"
        ) from error
    refuse_invalid_options(optimizer)
    options.apply(optimizer)
    return optimizer


def role_of(name: str, parameter: nn.Parameter) -> Role:
    """Return the role of a parameter, by its full name and number of axes."""
    parts = name.split(".")
    if any(part.startswith("router") for part in parts):
        return "router"
    if parameter.ndim < 2 or "bias" in parts[-1] or any(part.startswith(_VECTORS) for part in parts):
        return "vector"
    if parameter.ndim == 3 and "experts" in parts:
        return "expert"
    if parameter.ndim == 3 and "shared" in parts:
        return "shared"
    return "edge" if parts[0] == "objective" or any(part in _EDGES for part in parts) else "matrix"


def _decays_weights(optimizer: Optimizer) -> bool:
    """Return whether the optimiser decays by p <- (1 - lr x weight_decay) p."""
    if isinstance(optimizer, Adam):
        return all(group["decoupled_weight_decay"] for group in optimizer.param_groups)  # AdamW is an Adam
    return isinstance(optimizer, StableAdamW | Lion | MuonAdamW | Hyperball)
