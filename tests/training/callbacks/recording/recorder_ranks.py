"""Run by test_recorder_ranks.py in two processes: trains to a loss that is not finite."""

import sys
from pathlib import Path

from lightning_moevlm.training.actions import Actions
from lightning_moevlm.training.callbacks import FlightRecorder, Telemetry
from tests.small_model import pair_batch
from tests.training.small_fit import Poison, fit, tiny_module


def main(folder: Path) -> None:
    batches = [pair_batch(seed=seed)._replace(keys=tuple(f"{seed}/{n}" for n in range(4))) for seed in range(16)]
    recorder = FlightRecorder(keep=64, every_n_steps=2, attention_every=2)
    fit(
        tiny_module(Actions()), 4, batches=batches, callbacks=[Telemetry(), Poison(3), recorder], ranks=2,
        strategy="ddp", accumulate=2, default_root_dir=folder,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
