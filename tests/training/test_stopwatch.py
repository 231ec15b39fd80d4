"""The stopwatch of training steps, with times that the test sets."""

import pytest

from lightning_moevlm.training.step.stopwatch import Stopwatch


def test_validations_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 100.0, "cpu": 7.0}

    def passes(wall: float, cpu: float) -> None:
        now["wall"] += wall
        now["cpu"] += cpu

    monkeypatch.setattr("time.perf_counter", lambda: now["wall"])
    monkeypatch.setattr("time.process_time", lambda: now["cpu"])
    watch = Stopwatch()
    passes(2.0, 1.0)
    assert watch.read() == (2.0, 1.0)
    watch.pause()
    passes(10.0, 10.0)
    watch.resume()
    passes(1.0, 0.5)
    assert watch.read() == (3.0, 1.5)
    watch.restart()
    passes(4.0, 4.0)
    assert watch.read() == (4.0, 4.0)
