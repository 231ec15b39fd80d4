"""StepTimes by hand on a clock that the test moves: steps of the optimiser, validations taken out."""

import json
from types import SimpleNamespace

import pytest
import torch

from lightning_moevlm.training.callbacks import StepTimes


class _Clock:
    """A perf_counter that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_steps_and_validations_by_hand(tmp_path, monkeypatch: pytest.MonkeyPatch):
    time, file = _Clock(), tmp_path / "times.json"
    monkeypatch.setattr("lightning_moevlm.training.callbacks.step_times.time.perf_counter", time)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True)
    module = SimpleNamespace(device=torch.device("cpu"))
    clock = StepTimes(str(file))

    def at(now: float, step: int) -> None:
        time.now, trainer.global_step = now, step

    at(1.0, 0)
    clock.on_validation_start(trainer, module)
    at(4.0, 0)
    clock.on_validation_end(trainer, module)  # 3 s, the untrained model
    at(10.0, 0)
    clock.on_train_start(trainer, module)
    at(11.0, 0)
    clock.on_train_batch_end(trainer, module, {}, None, 0)  # a micro-batch: the optimiser has not stepped
    at(12.5, 1)
    clock.on_train_batch_end(trainer, module, {}, None, 1)  # 2.5 s
    clock.on_validation_start(trainer, module)
    at(14.5, 1)
    clock.on_validation_end(trainer, module)  # 2 s
    at(15.5, 2)
    clock.on_train_batch_end(trainer, module, {}, None, 2)  # 3 s since the step before, 2 of them validation
    clock.on_train_end(trainer, module)
    assert json.loads(file.read_text()) == {"step_seconds": [2.5, 1.0], "validation_seconds": [3.0, 2.0]}
