"""A burst of noise batches is found and explained from the recording alone."""

import random
from pathlib import Path

import pytest
import torch

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.study.forensics.explain import explain
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
