"""Options of routers that cannot be are refused."""

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.routers import (
    ExpertChoiceRouter,
    Gate,
    GroupLimit,
    GroupLimitedRouter,
    GShardRouter,
    LongTailRouter,
    ModalityRouter,
    NoisyTopKRouter,
    SequenceTopKRouter,
    SigmoidBiasRouter,
    SoftRouter,
    TopKRouter,
    TopPRouter,
)

REFUSED = {
    "top_k is 0": lambda: TopKRouter(16, 8, top_k=0),
    "router.top_k is 9: choose a number between 1 and 8, the num_experts": lambda: TopKRouter(16, 8, top_k=9),
    "renormalise needs router.top_k >= 2": lambda: TopKRouter(16, 8, top_k=1, renormalise=True),
    "renormalise needs router.top_k >= 2: with top_k 1": lambda: NoisyTopKRouter(16, 8, top_k=1, renormalise=True),
    "moe.num_experts is 1: GShardRouter needs at least 2": lambda: GShardRouter(16, 1),
    "threshold is 0": lambda: GShardRouter(16, 4, threshold=0),
    "num_experts 8 is not a multiple of router.groups.num_groups 3": lambda: GroupLimitedRouter(
        16, 8, groups=GroupLimit(3)
    ),
    "num_experts 8 is not a multiple of router.groups.num_groups 5": lambda: SigmoidBiasRouter(
        16, 8, groups=GroupLimit(5)
    ),
    "groups.top_groups is 3": lambda: GroupLimit(2, 3),
    "groups.num_groups is 0": lambda: GroupLimit(0),
    "top_k is 5: choose a number between 1 and 4, the experts of groups": lambda: SigmoidBiasRouter(
        16, 8, top_k=5, groups=GroupLimit(2, 1)
    ),
    "max_k is 9: choose a number between 1 and 8, the num_experts": lambda: SequenceTopKRouter(16, 8, max_k=9),
    "top_k is 4: choose a number between 1 and 3, the max_k": lambda: SequenceTopKRouter(16, 8, top_k=4, max_k=3),
    "top_k is 4: choose a number between 2 and 3, the tail_k less 1": lambda: LongTailRouter(16, 8, top_k=4),
    "top_k is 1: choose a number between 2 and 3": lambda: LongTailRouter(16, 8, top_k=1),
    "tail_k is 9": lambda: LongTailRouter(16, 8, tail_k=9),
    "threshold is 1.5": lambda: TopPRouter(16, 8, threshold=1.5),
    "capacity_factor is 9": lambda: ExpertChoiceRouter(16, 8, capacity_factor=9),
    "top_k is 5: choose a number between 1 and 4, the num_experts per modality": lambda: ModalityRouter(16, 8, top_k=5),
    "num_experts is 1: ModalityRouter needs at least 2 experts, one": lambda: ModalityRouter(16, 1),
    "slots_per_expert is 0": lambda: SoftRouter(16, 4, slots_per_expert=0),
    "gate.jitter is 1.0": lambda: Gate(jitter=1.0),
    "gate.dropout is -0.1": lambda: Gate(dropout=-0.1),
    "gate.temperature is 0": lambda: Gate(temperature=0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_options_are_refused(message: str) -> None:
    with pytest.raises(UserError, match=message):
        REFUSED[message]()
