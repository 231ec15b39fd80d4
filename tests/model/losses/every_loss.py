"""One entry per loss, so that every contract runs on every one."""

from typing import Any

import torch
from torch import Tensor

from lightning_moevlm.model.losses import (
    CrossLayerBalance,
    ExpertCoupling,
    GlobalEntropy,
    GShard,
    Importance,
    Load,
    LoadBalance,
    LocalEntropy,
    LossInput,
    MutualInformation,
    OutputZ,
    ReLUL1,
    RouterOrthogonality,
    RouterZ,
    SequenceBalance,
)
from tests.routing import full_plan, relu_plan

LOSSES: dict[str, Any] = {
    "load_balance": LoadBalance(),
    "load_balance per modality": LoadBalance(per_modality=True),
    "load_balance of images alone": LoadBalance(only="image"),
    "load_balance of sequences of images": LoadBalance(scope="sequence", only="image"),
    "load_balance of sequences": LoadBalance(scope="sequence", per_modality=True),
    "load_balance, global": LoadBalance(scope="global"),
    "cross_layer_balance": CrossLayerBalance(),
    "router_z": RouterZ(),
    "output_z": OutputZ(),
    "importance": Importance(),
    "importance per modality": Importance(per_modality=True),
    "load": Load(),
    "load per modality": Load(per_modality=True),
    "gshard": GShard(),
    "gshard per modality": GShard(per_modality=True),
    "sequence_balance": SequenceBalance(),
    "local_entropy": LocalEntropy(image=0.5),
    "global_entropy": GlobalEntropy(),
    "mutual_information": MutualInformation(),
    "mutual_information per modality": MutualInformation(per_modality=True),
    "relu_l1": ReLUL1(),
    "relu_l1, not by load": ReLUL1(load_weighted=False),
    "router_orthogonality": RouterOrthogonality(),
    "expert_coupling": ExpertCoupling(),
    "expert_coupling, strict": ExpertCoupling(alpha=0.0),
}


def raw_loss(name: str, logits_TE: Tensor, *, valid_T: Tensor | None = None, noise: float = 0.5) -> Tensor:
    """The raw loss where routing follows from these logits, as output logits do for the output z-loss."""
    value = LOSSES[name](loss_input(name, logits_TE, valid_T=valid_T, noise=noise))
    assert isinstance(value, Tensor)
    return value


def loss_input(
    name: str, logits_TE: Tensor, *, valid_T: Tensor | None = None, noise: float = 0.5
) -> LossInput | dict[str, Tensor]:
    """What the loss looks at. Rows of the router are the logits' columns, so they too are 0 for a zero router."""
    if isinstance(LOSSES[name], OutputZ):
        return {"text": (logits_TE if valid_T is None else logits_TE[valid_T]).logsumexp(dim=-1)}
    if isinstance(LOSSES[name], ReLUL1):
        plan = relu_plan(logits_TE, valid_T=valid_T)
    else:
        plan = full_plan(logits_TE, valid_T=valid_T, noise=noise)
    rows = (logits_TE * plan.valid_T.unsqueeze(-1)).t()
    # losses that draw noise are compared without it
    return LossInput(plan, rows, training=not LOSSES[name].draws, first_EDF=first_matrices(rows))


def first_matrices(rows: Tensor) -> Tensor:
    """First matrices of experts, (E, D, 3); they answer alike to a row and to the row twice over."""
    num_experts, dim = rows.shape
    period = torch.randn(num_experts, 8, 3, dtype=rows.dtype, generator=torch.Generator().manual_seed(3))
    return period[:, torch.arange(dim) % 8] * (8 / max(1, dim))
