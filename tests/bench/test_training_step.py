"""What is compared is the same training, once by hand and once by the Trainer."""

import shutil
from pathlib import Path

import pytest
import torch

from lightning_moevlm.bench import training_step
from lightning_moevlm.bench.goals import step_verdicts
from lightning_moevlm.bench.timing import Ratio
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.layers import MoEFFN


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "TURN", 2)
    monkeypatch.setattr(training_step, "WARM_UP", 2)
    monkeypatch.setattr(training_step, "NUM_STEPS", 4)


def test_both_ways_train_the_same_weights(tmp_path: Path, migrated_database: Path) -> None:
    store = shutil.copyfile(migrated_database, tmp_path / "mlflow.db")
    batches = [training_step.pair_batch(2, seed) for seed in range(3)]
    by_hand, by_trainer, untrained = (training_step.small_module() for _ in range(3))
    times = training_step.milliseconds_in_turns(by_hand, by_trainer, batches, f"sqlite:///{store}", str(tmp_path))
    assert min(times) > 0
    start = untrained.state_dict()
    for name, value in by_trainer.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], msg=lambda text, name=name: f"{name}: {text}")
    moved = [name for name, value in by_hand.state_dict().items() if not torch.equal(value, start[name])]
    assert len(moved) > 20


@pytest.mark.slow
def test_overhead_has_a_time_for_each_way_and_round() -> None:
    ticks: list[None] = []
    times = training_step.measure_overhead(2, lambda: ticks.append(None))
    assert len(times.bare) == len(times.whole) == 2 and len(ticks) == 2 and min(times.bare + times.whole) > 0
    assert [record["impl"] for record in times.records()] == [training_step.BARE, training_step.LIGHTNING]


def test_threads_are_given_back_after_an_interruption_too() -> None:
    def interrupt() -> None:
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            training_step.measure_overhead(1, interrupt)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_added_time_and_goals_by_hand() -> None:
    # in rounds: 2, 1, 6, median 2
    times = training_step.StepTimes(bare=[9.0, 11.0, 10.0], whole=[11.0, 12.0, 16.0])
    assert times.added == 2.0
    met = {verdict.what: verdict.met for verdict in step_verdicts(times, Ratio(1.04, 1.02))}
    assert list(met.values()) == [True, True]
    slow = training_step.StepTimes(bare=[9.0, 11.0, 10.0], whole=[15.0, 15.0, 16.0])  # 6, 4, 6
    assert [verdict.met for verdict in step_verdicts(slow, Ratio(1.06, 1.05))] == [False, False]


def test_sparse_and_dense_cost_the_same_flops() -> None:
    sparse, dense = training_step._wide_module(True).backbone, training_step._wide_module(False).backbone
    tokens = dict.fromkeys(Modality, 64)
    assert any(isinstance(module, MoEFFN) for module in sparse.modules())
    assert not any(isinstance(module, MoEFFN) for module in dense.modules())
    assert sparse.costs(tokens).flops == pytest.approx(dense.costs(tokens).flops, rel=0.01)
