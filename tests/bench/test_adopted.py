"""The bench of observed models, and what observing keeps for the backward pass: plans and no more."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.bench.adopted import OBSERVED, PLAIN, ObservingTimes, observing_candidates
from lightning_moevlm.bench.goals import observing_verdicts
from tests.model.backbones.adopted.small_hugging_face import OLMOE

SMALL = OLMOE | {"vocab_size": 300, "max_position_embeddings": 256}
EXPERTS, TOP_K, LAYERS = 4, 2, 2


def kept_bytes(config: dict[str, Any], length: int) -> dict[str, int]:
    """Bytes that a step of each candidate keeps for its backward pass, each tensor once."""
    found = {}
    for candidate in observing_candidates(2, length, config):
        storages: dict[int, int] = {}
        alive: list[Tensor] = []

        def keep(tensor: Tensor, storages: dict[int, int] = storages, alive: list[Tensor] = alive) -> Tensor:
            alive.append(tensor)  # so that no storage is given out again
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            candidate.step()
        found[candidate.name] = sum(storages.values())
    return found


def test_observing_keeps_plans_and_nothing_else() -> None:
    short, long = kept_bytes(SMALL, 32), kept_bytes(SMALL, 128)
    # per token and layer: logits, probabilities and their products, of fp32; indices of choices, of int64
    plan = LAYERS * (4 * 4 * EXPERTS + 4 * 8 * TOP_K)
    for found, tokens in ((short, 64), (long, 256)):
        assert 0 <= found[OBSERVED] - found[PLAIN] <= tokens * plan
    assert (long[OBSERVED] - long[PLAIN]) <= 4 * max(short[OBSERVED] - short[PLAIN], 1)  # 4 times as many tokens


def test_a_step_is_the_same_and_its_goal_is_told() -> None:
    plain, observed = observing_candidates(2, 16, SMALL)
    assert (plain.name, observed.name) == (PLAIN, OBSERVED)
    times = ObservingTimes({PLAIN: [1.0, 1.0, 2.0], OBSERVED: [1.01, 1.01, 2.5]}, {PLAIN: 3.0, OBSERVED: 3.5})
    assert [record["median_ms"] for record in times.records()] == [1000.0, 1010.0]
    (verdict,) = observing_verdicts(times)
    assert verdict.met and verdict.figure == pytest.approx(1.01)
    (missed,) = observing_verdicts(times._replace(seconds={PLAIN: [1.0, 1.0], OBSERVED: [1.1, 1.1]}))
    assert not missed.met
