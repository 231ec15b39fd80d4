"""The bench of adopted models, and what observing keeps for the backward pass: plans and no more."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra hf: pip install 'lightning-moevlm[hf]'")

from lightning_moevlm.bench.adopted import (
    BACKENDS,
    DISPATCHERS,
    OBSERVED,
    OURS,
    PLAIN,
    SIZES,
    AdoptedTimes,
    Size,
    adopted_candidates,
    measure_adopted,
    named,
)
from lightning_moevlm.bench.candidates import Candidate
from lightning_moevlm.bench.goals import observing_verdicts
from tests.model.backbones.adopted.small_hugging_face import OLMOE

CONFIG = OLMOE | {"vocab_size": 300, "max_position_embeddings": 256}
EXPERTS, TOP_K, LAYERS = 4, 2, 2


def small(length: int) -> Size:
    return Size(CONFIG, 2, length)


def kept_bytes(candidate: Candidate) -> int:
    """Bytes that a step keeps for its backward pass, each tensor once."""
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no storage is given out again
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        candidate.step()
    return sum(storages.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_observing_keeps_plans_and_nothing_else(backend: str) -> None:
    added = []
    for tokens in (64, 256):
        found = {each.name: kept_bytes(each) for each in adopted_candidates(small(tokens // 2))[0]}
        added.append(found[named(OBSERVED, backend)] - found[named(PLAIN, backend)])
        # per token and layer: logits, probabilities and their products, of fp32; indices of choices, of int64
        assert 0 <= added[-1] <= tokens * LAYERS * (4 * 4 * EXPERTS + 4 * 8 * TOP_K)
    assert added[1] <= 4 * max(added[0], 1)  # 4 times as many tokens


def test_all_candidates_compute_the_same_from_one_set_of_weights() -> None:
    candidates, plans = adopted_candidates(small(16))
    assert [each.name for each in candidates] == [
        *(named(kind, backend) for kind in (PLAIN, OBSERVED) for backend in BACKENDS),
        *(named(OURS, name) for name in DISPATCHERS),
    ]
    assert 0 < plans * 2**20 <= 32 * LAYERS * (2 * 4 * EXPERTS + 24 * TOP_K + 16)
    losses: dict[str, float] = {}
    backward = Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        for each in candidates:

            def note(loss: Tensor, name: str = each.name) -> None:
                losses[name] = float(loss.detach())
                backward(loss)

            patch.setattr(Tensor, "backward", note)
            each.step()
    for backend in BACKENDS:
        assert losses[named(OBSERVED, backend)] == losses[named(PLAIN, backend)]
    assert list(losses.values()) == pytest.approx([losses[named(PLAIN, "eager")]] * len(losses), rel=1e-5)


def test_a_measurement_has_every_candidate_in_either_dtype() -> None:
    ticks: list[None] = []
    times = measure_adopted(1, small(16), lambda: ticks.append(None), dtype="bfloat16")
    assert len(ticks) == 2 * len(times.seconds) == 2 * (2 * len(BACKENDS) + len(DISPATCHERS))
    records = times.records()
    assert {record["dtype"] for record in records} == {"bfloat16"}
    assert all(float(str(record["peak_mib"])) > 0 for record in records)
    assert [record["over"] for record in records[2:4]] == [named(PLAIN, backend) for backend in BACKENDS]
    for backend in BACKENDS:
        assert 0 <= times.added_mib(backend) <= times.plans + 32 * 20 / 2**20  # mask and modality of 32 tokens
    assert SIZES["large"].config["hidden_size"] == 2048


def test_goals_and_the_fastest_are_told() -> None:
    seconds = {
        named(PLAIN, "eager"): [1.0, 1.0, 2.0],
        named(OBSERVED, "eager"): [1.01, 1.01, 2.5],
        named(PLAIN, "grouped_mm"): [0.5, 0.5, 0.5],
        named(OBSERVED, "grouped_mm"): [0.6, 0.6, 0.6],
        named(OURS, "auto"): [0.45, 0.45, 0.45],
        named(OURS, "padded"): [0.4, 0.4, 0.4],
    }
    peaks = dict.fromkeys(seconds, 3.0) | {named(OBSERVED, "eager"): 3.5, named(OBSERVED, "grouped_mm"): 4.5}
    times = AdoptedTimes(seconds, peaks, 1.0, {})
    assert [(record["over"], record["ratio"]) for record in times.records()] == [
        (named(PLAIN, "grouped_mm"), 2.0), (named(PLAIN, "eager"), 1.01), (named(PLAIN, "grouped_mm"), 1.0),
        (named(PLAIN, "grouped_mm"), 1.2), (named(PLAIN, "grouped_mm"), 0.9), (named(PLAIN, "grouped_mm"), 0.8),
    ]  # fmt: skip
    assert times.finding().startswith("fastest of ours: ours, padded, 0.800 of transformers, grouped_mm")
    verdicts = observing_verdicts(times)
    assert [(round(each.figure, 2), each.met) for each in verdicts] == [
        (1.01, True), (0.5, True), (1.2, False), (1.5, False),
    ]  # fmt: skip
