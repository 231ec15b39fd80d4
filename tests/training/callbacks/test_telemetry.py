"""Telemetry reports dispatchers of a resumed run."""

from pathlib import Path

import pytest
import torch

from lightning_moevlm.model.dispatch.auto.own_table import GIVEN
from lightning_moevlm.model.dispatch.auto.timings_table import Case, Row, Table, write_table
from lightning_moevlm.training.actions import Actions
from lightning_moevlm.training.callbacks import Telemetry
from lightning_moevlm.training.callbacks.telemetry import changed_choices
from tests.training.small_fit import fit, tiny_module


def test_each_changed_case_is_named_once() -> None:
    before = {"a": {"8 experts": "Segments"}, "b": {"8 experts": "Segments", "4 experts": "Grouped"}}
    now = {
        "a": {"8 experts": "Grouped", "16 experts": "Grouped"},
        "b": {"8 experts": "Grouped", "4 experts": "Grouped"},
    }
    (line,) = changed_choices(before, now)
    assert line.startswith("dispatch: 8 experts: was Segments, is now Grouped, because this machine's timings differ")
    assert changed_choices({}, now) == changed_choices(now, now) == []


def test_a_resumed_run_reports_a_changed_dispatcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(steps: int, fastest: str, resume_from: Path | None, save_to: Path | None) -> list[str]:
        times = {"SegmentDispatcher": 2.0, "GroupedDispatcher": 2.0} | {fastest: 1.0}
        table = tmp_path / f"{fastest}.json"
        write_table(
            Table({"torch": torch.__version__}, (Row(Case("cpu", "float32", 4, 16, 32, 64, 2), times),), {}, table)
        )
        monkeypatch.setenv(GIVEN, str(table))
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(tiny_module(Actions()), steps, callbacks=[Telemetry()], resume_from=resume_from, save_to=save_to)
        return [line for line in caplog.messages if "is now" in line]

    saved = tmp_path / "step.ckpt"
    assert run(1, "SegmentDispatcher", None, saved) == []
    assert run(2, "SegmentDispatcher", saved, None) == []
    changed = run(2, "GroupedDispatcher", saved, None)
    assert changed and all("was SegmentDispatcher, is now GroupedDispatcher" in line for line in changed)
    assert len(set(changed)) == len(changed)
