"""Parameter groups: which parameters are decayed, at which rate, and which are stacks of expert matrices.

Weight decay is for matrices: norms, biases, embeddings, positions and routers are left out. Decaying a router shrinks
its logits and so acts as a hidden router z-loss; an ablation of stabilisers must not contain one by accident.

Every trainable parameter is in one group:

    role     members                                   learning rate        weight decay
    matrix   matrices of the trunk                     peak                 the optimiser's
    vector   norms, biases, embeddings, positions      peak                 0
    edge     patch projection, heads                   peak                 the optimiser's
    router   all of a router's                         peak x multiplier    router_weight_decay
    expert   stacks (E, in, out), an expert a slice    peak x multiplier    the optimiser's
    shared   the same, of shared experts               peak                 the optimiser's

Groups depend on names alone, not on the options, so that a checkpoint fits whatever the options are when it is resumed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NotRequired, TypedDict, get_args

from torch import nn
from torch.optim import Adam, Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.training.optim.optimizers.lion import Lion
from lightning_moevlm.training.optim.optimizers.muon import MuonAdamW
from lightning_moevlm.training.optim.optimizers.stable_adamw import StableAdamW
from lightning_moevlm.training.optim.tensor_roles import Role

_VECTORS = ("token", "position", "mask", "modality")


class ParameterGroup(TypedDict):
    """An optimiser's parameter group; without `weight_decay` the optimiser's own default holds.

    role: what the members are; optimisers that treat matrices apart, and rules per tensor, read it.
    """

    params: list[nn.Parameter]
    role: Role
    weight_decay: NotRequired[float]


@dataclass(frozen=True)
class GroupOptions:
    """How the groups differ from the optimiser's own learning rate and weight decay.

    Args:
        router_lr_multiplier: factor of the routers' learning rate; 0 freezes them.
        router_weight_decay: weight decay of the routers.
        expert_lr_multiplier: factor of the expert stacks' learning rate; sqrt(K / E) makes up for the fewer tokens per
            expert.
        independent_weight_decay: decay by schedule x weight_decay at each step, whatever the peak learning rate
            (arXiv 2309.14322, section 3.2, where 1e-4 is used). Off: by learning rate x weight_decay, as in torch.

    Raises:
        UserError: a negative value.
    """

    router_lr_multiplier: float = 1.0
    router_weight_decay: float = 0.0
    expert_lr_multiplier: float = 1.0
    independent_weight_decay: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("router_lr_multiplier", "router_weight_decay", "expert_lr_multiplier"):
            check_number(f"groups.{name}", getattr(self, name), least=0)

    def apply(self, optimizer: Optimizer) -> None:
        """Set peak rates and decays of an optimiser that was just built, before its schedule is.

        Raises:
            UserError: independent decay of an optimiser that adds decay to the gradient.
        """
        if self.independent_weight_decay and not _decays_weights(optimizer):
            raise UserError(
                f"independent_weight_decay does not fit {type(optimizer).__name__}, which adds decay to the gradient: "
                "choose AdamW, StableAdamW, Lion or MuonAdamW, or turn it off"
            )
        multiplier = {"router": self.router_lr_multiplier, "expert": self.expert_lr_multiplier}
        for group in optimizer.param_groups:
            group["lr"] *= multiplier.get(group["role"], 1.0)
            if group["role"] == "router":
                group["weight_decay"] = self.router_weight_decay
            if self.independent_weight_decay and group["lr"] > 0:
                # decay is lr_t x weight_decay in every one of them, and lr_t = schedule_t x peak
                group["weight_decay"] /= group["lr"]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[ParameterGroup]:
    """Split trainable parameters by role; an empty group is left out."""
    members: dict[Role, list[nn.Parameter]] = {role: [] for role in get_args(Role)}
    for name, parameter in named:
        if parameter.requires_grad:
            members[role_of(name, parameter)].append(parameter)
    groups: list[ParameterGroup] = [{"params": params, "role": role} for role, params in members.items() if params]
    for group in groups:
        if group["role"] in ("vector", "router"):
            group["weight_decay"] = 0.0
    return groups


def role_of(name: str, parameter: nn.Parameter) -> Role:
    """Return what a parameter is, by its full name and number of axes."""
    parts = name.split(".")
    if any(part.startswith("router") for part in parts):
        return "router"
    if parameter.ndim < 2 or "bias" in parts[-1] or any(part.startswith(_VECTORS) for part in parts):
        return "vector"
    if parameter.ndim == 3 and "experts" in parts:
        return "expert"
    if parameter.ndim == 3 and "shared" in parts:
        return "shared"
    return "edge" if parts[0] == "objective" or "patches" in parts else "matrix"


def _decays_weights(optimizer: Optimizer) -> bool:
    """Return whether p <- (1 - lr x weight_decay) p is how the optimiser decays."""
    if isinstance(optimizer, Adam):
        return all(group["decoupled_weight_decay"] for group in optimizer.param_groups)  # AdamW is an Adam
    return isinstance(optimizer, StableAdamW | Lion | MuonAdamW)
