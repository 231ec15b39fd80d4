"""The recorder in trainings of a few steps: what it holds, when it writes, and that training is the same to the bit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.tracking.recordings.recording import Recording, read_recording
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.actions import Actions, Rollback
from lightning_moevlm.training.callbacks import DivergenceGuard, FlightRecorder, Telemetry
from lightning_moevlm.training.callbacks.recording.flight_recorder import _fetch, _Pending
from lightning_moevlm.training.callbacks.recording.step_values import Values
from lightning_moevlm.training.optim import GradientStabilisers, SkipSpikes
from tests.small_model import pair_batch
from tests.training.small_fit import Fit, Poison, fit, tiny_module


class Reference(Callback):
    """The norm of each parameter's gradient before the clip, and of each update, by step."""

    def __init__(self) -> None:
        self.gradients: dict[int, dict[str, float]] = {}
        self.updates: dict[int, dict[str, float]] = {}
        self.before: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        named = dict(pl_module.named_parameters())
        self.before = {name: p.detach().clone() for name, p in named.items()}
        self.gradients[trainer.global_step + 1] = {
            name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in named.items()
        }

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.updates[trainer.global_step] = {
            name: float((p.detach() - before).norm())
            for (name, p), before in zip(pl_module.named_parameters(), self.before.values(), strict=False)
        }


def record(folder: Path, module: VisionLanguageModule, steps: int, *others: Callback, **options: Any) -> Fit:
    batches = [pair_batch(seed=seed) for seed in range(steps * options.get("accumulate", 1))]
    recorder = FlightRecorder(keep=64, every_n_steps=4, attention_every=5)
    return fit(module, steps, batches=batches, callbacks=[*others, recorder], default_root_dir=folder, **options)


def recordings(folder: Path) -> list[Recording]:
    return [read_recording(path) for path in sorted(folder.glob("recordings/*"))]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Reference, Fit]:
    """Two micro-batches a step; a weight becomes infinite before step 7."""
    folder, reference = tmp_path_factory.mktemp("poisoned"), Reference()
    module = tiny_module(Actions())
    done = record(folder, module, 12, Telemetry(), Poison(7), reference, DivergenceGuard(10), accumulate=2)
    (recording,) = recordings(folder)
    return recording, reference, done


def test_a_loss_that_is_not_finite_is_recorded_with_the_steps_before(poisoned: tuple[Recording, Any, Any]) -> None:
    recording = poisoned[0]
    assert [event.kind for event in recording.events] == ["not finite", "diverged"]
    assert recording.events[0].step == 7 and "image" in recording.events[0].detail
    assert [one.step for one in recording.steps] == [*range(1, 11)]  # the guard ends training there
    assert math.isfinite(recording.steps[5].values["total_loss"])
    assert not math.isfinite(recording.steps[6].values["total_loss"])
    assert recording.about["micro_batches"] == "2"


def test_losses_are_those_of_telemetry(poisoned: tuple[Recording, Any, Fit]) -> None:
    recording, _, done = poisoned
    for one in recording.steps[:6]:
        for key, name in (("train/task_loss", "task_loss"), ("loss/text", "loss/text"), ("loss/image", "loss/image")):
            assert one.values[name] == pytest.approx(dict(done.points[key])[one.step], rel=1e-5)
        assert one.values["learning_rate"] == pytest.approx(1e-3)


def test_norms_are_those_of_the_parameters_of_each_layer(poisoned: tuple[Recording, Reference, Fit]) -> None:
    recording, reference, done = poisoned
    one = recording.steps[3]
    layer = "backbone.blocks.1.ffn.image.router"
    assert one.values[f"gradient_norm/{layer}"] == pytest.approx(reference.gradients[4][f"{layer}.weight_ED"], rel=1e-5)
    # 4 x 32 numbers: all of them are read
    assert one.values[f"update_norm/{layer}"] == pytest.approx(reference.updates[4][f"{layer}.weight_ED"], rel=1e-4)
    squares = [value**2 for name, value in one.values.items() if name.startswith("gradient_norm/")]
    assert math.sqrt(sum(squares)) == pytest.approx(dict(done.points["optim/grad_norm"])[4], rel=1e-4)
    squares = [value**2 for name, value in one.values.items() if name.startswith("update_norm/")]
    assert math.sqrt(sum(squares)) == pytest.approx(dict(done.points["optim/update_norm"])[4], rel=0.1)  # a sample
    assert not any(name.endswith(("_norm.weight", ".out", "query_key_value")) for name in one.values)


def test_keys_of_all_micro_batches_and_logits_are_recorded(poisoned: tuple[Recording, Reference, Fit]) -> None:
    recording = poisoned[0]
    assert [len(one.keys[""]) for one in recording.steps] == [8] * 10  # four pairs in each of two micro-batches
    one = recording.steps[1]
    loads = [value for name, value in one.values.items() if name.startswith("load/backbone.blocks.1.ffn.text/text/")]
    assert len(loads) == 4 and sum(loads) == pytest.approx(1.0)
    assert one.values["router_logit/backbone.blocks.1.ffn.image/image"] > 0
    assert any(name.startswith("output_logit/") for name in one.values)


def test_attention_is_measured_every_few_steps(tmp_path: Path) -> None:
    record(tmp_path, tiny_module(Actions()), 12, Poison(12), log_every_n_steps=100)
    (recording,) = recordings(tmp_path)
    found = [one.step for one in recording.steps if any(name.startswith("attention_logit/") for name in one.values)]
    assert found == [1, 5, 10]  # 1 is a logging step


def flat(module: VisionLanguageModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_training_is_the_same_to_the_bit(clip_norm: float | None, tmp_path: Path) -> None:
    def train(with_recorder: bool) -> torch.Tensor:
        module = tiny_module(Actions(), lr=1e-2)
        module.gradient = GradientStabilisers(clip_norm=clip_norm)
        recorder = [FlightRecorder(every_n_steps=2, attention_every=2)] if with_recorder else []
        fit(module, 4, callbacks=recorder, default_root_dir=tmp_path)
        return flat(module)

    assert torch.equal(train(True), train(False))
    assert recordings(tmp_path) == []  # nothing went wrong


def test_a_rollback_and_a_skipped_step_are_recorded(tmp_path: Path) -> None:
    actions = Actions(rollback=Rollback(every_n_steps=2, lookback=1, spike_threshold=None))
    record(tmp_path / "a", tiny_module(actions), 8, Poison(6))
    (recording,) = recordings(tmp_path / "a")
    assert {(event.step, event.kind) for event in recording.events} == {(6, "not finite"), (6, "rollback")}
    module = tiny_module(Actions())
    module.gradient = GradientStabilisers(skip_spikes=SkipSpikes(window=4))
    record(tmp_path / "b", module, 6, Poison(5))
    (recording,) = recordings(tmp_path / "b")
    assert (5, "skipped") in {(event.step, event.kind) for event in recording.events}
    assert recording.steps[4].values["skipped"] == 1.0


class Crash(Callback):
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("out of memory at http://name:secret@host")


def test_a_crash_is_recorded_with_the_batch_that_crashed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        record(tmp_path, tiny_module(Actions()), 8, Crash())
    (recording,) = recordings(tmp_path)
    (event,) = recording.events
    assert (event.step, event.kind) == (6, "exception")
    assert event.detail.startswith("RuntimeError: out of memory") and "secret" not in event.detail
    assert [one.step for one in recording.steps] == [1, 2, 3, 4, 5, 6]
    assert len(recording.steps[-1].keys[""]) == 4 and not recording.steps[-1].values


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    off = FlightRecorder(max_recordings=0)
    fit(tiny_module(Actions()), 4, callbacks=[Poison(2), off], default_root_dir=tmp_path)
    assert recordings(tmp_path) == []


def test_a_recording_is_small(poisoned: tuple[Recording, Any, Any], tmp_path: Path) -> None:
    from lightning_moevlm.tracking.recordings.recording import write_recording

    recording = poisoned[0]
    one = recording.steps[0]._replace(keys={"pairs": tuple(f"{number:09d}" for number in range(1024))})
    write_recording(recording._replace(steps=(one,) * 128), tmp_path / "big")
    assert (tmp_path / "big").stat().st_size < 4e6


def batch_of(keys: tuple[str, ...], sources: tuple[str, ...]) -> Batch:
    return Batch(None, None, None, keys, sources=sources)


def test_keys_are_kept_by_source() -> None:
    from lightning_moevlm.training.callbacks.recording.flight_recorder import _keys_by_source

    assert _keys_by_source(batch_of(("a", "b", "c"), ("x", "y", "x"))) == {"x": ("a", "c"), "y": ("b",)}
    assert _keys_by_source(batch_of(("a",), ())) == {"": ("a",)}


def test_parts_without_values_may_lie_on_any_device() -> None:
    """A dense model has no loads, and so nothing that knows the device of the model."""
    loads = Values((), torch.zeros(0, device="meta"))
    (step,) = _fetch([_Pending(1, {}, [loads, Values(("loss", "gradient"), torch.tensor([2.0, 3.0]))], {"rate": 0.5})])
    assert (step.values["loss"], step.values["gradient"], step.values["rate"]) == (2.0, 3.0, 0.5)
