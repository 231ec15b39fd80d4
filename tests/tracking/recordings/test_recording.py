"""A recording is read back as it was written; other files are refused in a line."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.tracking.recordings.recording import (
    Event,
    RecordedStep,
    Recording,
    read_recording,
    split_quantity,
    write_recording,
)


def test_it_is_read_back_with_what_was_not_finite_and_what_was_not_measured(tmp_path: Path) -> None:
    steps = (
        RecordedStep(7, {"task_loss": 1.5, "load/a/image/expert0": 0.25}, {"": ("k1", "k2")}),
        RecordedStep(8, {"task_loss": math.inf, "attention_logit/a/text": 3.0}, {"emoji": ("k3",), "": ()}),
        RecordedStep(9, {}, {}),
    )
    recording = Recording((Event(8, "not finite", "text"),), steps, {"ranks": "2"})
    write_recording(recording, tmp_path / "deep" / "one.safetensors")
    assert read_recording(tmp_path / "deep" / "one.safetensors") == recording
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one.safetensors"]


def test_a_loss_that_is_nan_stays_so(tmp_path: Path) -> None:
    write_recording(Recording((), (RecordedStep(1, {"task_loss": math.nan}, {}),)), tmp_path / "one")
    (step,) = read_recording(tmp_path / "one").steps
    assert math.isnan(step.values["task_loss"])


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    save_file({"values": np.zeros(2)}, tmp_path / "other")
    save_file({"values": np.zeros(2)}, tmp_path / "newer", {"format": "moevlm-recording/99"})
    for name, words in (
        ("text", "is not a recording"),
        ("missing", "is not a recording"),
        ("other", "has the format None"),
        ("newer", "has the format moevlm-recording/99: this version reads moevlm-recording/1"),
    ):
        with pytest.raises(UserError, match=words):
            read_recording(tmp_path / name)


def test_a_quantity_is_a_kind_and_a_place() -> None:
    assert split_quantity("router_logit/backbone.blocks.1.ffn/pair") == ("router_logit", "backbone.blocks.1.ffn/pair")
    assert split_quantity("learning_rate") == ("learning_rate", "")
