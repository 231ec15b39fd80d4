"""Killed by test_soak.py: `python -m tests.data.soak ROOT FOLDER STEPS WORKERS` trains on from the last checkpoint.

FOLDER/steps.log gets a line per training step, `resume STEP` where a run goes on.
"""

import sys
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moevlm.data.datamodule import ShardDataModule
from tests.data.recording import Recorder, quiet_trainer

EVERY = 3
"""Training steps between checkpoints."""


def data(root: Path, num_workers: int) -> ShardDataModule:
    """120 samples in 60 batches."""
    return ShardDataModule(str(root), 2, 32, 16, 400, num_workers=num_workers, shuffle_buffer=10)


def main(root: Path, folder: Path, steps: int, num_workers: int) -> None:
    """Train to `steps`, from the newest checkpoint if there is one."""
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1, enable_version_counter=False)
    saved = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")), default=None)
    log = folder / "steps.log"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"resume {0 if saved is None else saved.stem.removeprefix('step=')}\n")
    trainer = quiet_trainer(folder, max_steps=steps, max_epochs=-1, limit_val_batches=0, callbacks=[saver])
    trainer.fit(Recorder(log=log), data(root, num_workers), ckpt_path=saved)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
