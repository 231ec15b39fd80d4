"""Faults planted at a step that the seed draws are found and explained from the recording alone."""

import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.study.forensics.explain import explain
from lightning_moevlm.study.forensics.watch import STILL_STEPS
from lightning_moevlm.tracking.recordings.recording import read_recording
from lightning_moevlm.training.actions import Actions
from lightning_moevlm.training.callbacks import FlightRecorder
from tests.small_model import pair_batch
from tests.training.small_fit import fit, tiny_module

STEPS, BURST = 52, 2


def noise(batch: Batch, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    assert batch.images_BRYX is not None and batch.text_BL is not None
    images = torch.randint(0, 256, batch.images_BRYX.shape, generator=generator, dtype=torch.uint8)
    words = torch.randint(10, 300, batch.text_BL.shape, generator=generator)
    return batch._replace(images_BRYX=images, text_BL=torch.where(batch.text_BL > 9, words, batch.text_BL))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_burst_of_noise_is_found(seed: int, tmp_path: Path) -> None:
    """The model learns one batch; the recording alone says at which step, drawn by the seed, others came.

    The second seed is slow because it shows the same once more.
    """
    planted = random.Random(seed).randrange(40, STEPS - 6)
    batches = []
    for step in range(1, STEPS + 1):
        is_noise = planted <= step < planted + BURST
        batch = noise(pair_batch(seed=7), seed=step) if is_noise else pair_batch(seed=7)
        batches.append(batch._replace(keys=tuple(f"{'noise' if is_noise else 'scene'}{n}" for n in range(4))))
    recorder = FlightRecorder(keep=64)
    fit(tiny_module(Actions(), lr=3e-3), STEPS, batches=batches, callbacks=[recorder], default_root_dir=tmp_path)
    (file,) = (tmp_path / "recordings").iterdir()
    (explanation,) = explain(read_recording(file))
    assert explanation.step == planted
    assert [event.kind for event in explanation.events] == ["spike"]
    assert explanation.keys == {"": ("noise0", "noise1", "noise2", "noise3")}
    assert explanation.first is not None and explanation.first.step == planted
    assert explanation.first_term is not None
    assert explanation.diagnoses[0].illness.name == "a bad batch"


class HoldExpert(Callback):
    """Keeps the weights of one expert as they are from a step on."""

    def __init__(self, layer: str, expert: int, from_step: int) -> None:
        self.path, self.expert, self.from_step = layer, expert, from_step
        self.held: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step + 1 == self.from_step:
            self.held = [stack[self.expert].clone() for stack in self._stacks(pl_module)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        for stack, held in zip(self._stacks(pl_module), self.held, strict=False):
            stack[self.expert] = held

    def _stacks(self, module: LightningModule) -> list[torch.Tensor]:
        return [stack.detach() for stack in module.get_submodule(self.path).experts.stacks()]


def test_a_frozen_expert_is_found(tmp_path: Path) -> None:
    draw = random.Random(5)
    planted, expert = draw.randrange(24, 34), draw.randrange(4)
    layer = "backbone.blocks.1.ffn.text"
    batches = [pair_batch(seed=step) for step in range(STEPS)]
    hold, recorder = HoldExpert(layer, expert, planted), FlightRecorder(keep=64)
    fit(tiny_module(Actions()), STEPS, batches=batches, callbacks=[hold, recorder], default_root_dir=tmp_path)
    (file,) = (tmp_path / "recordings").iterdir()
    recording = read_recording(file)
    (event,) = recording.events
    assert (event.kind, event.step) == ("frozen expert", planted + STILL_STEPS - 1)
    assert event.detail.startswith(f"{layer}/expert{expert}: ")
    before, since = recording.steps[planted - 2], recording.steps[planted - 1]
    assert before.values[f"expert_update/{layer}/expert{expert}"] > 0.1
    assert since.values[f"expert_update/{layer}/expert{expert}"] == 0.0
    (explanation,) = explain(recording)
    assert explanation.first is not None
    assert (explanation.first.step, explanation.first.quantity) == (planted, f"expert_update/{layer}/expert{expert}")
    assert explanation.diagnoses[0].illness.name == "an expert that does not learn"
