"""Keeps the checkpoint from before an event, from which `moevlm replay` starts.

`last.ckpt` is overwritten at every validation. A hard link keeps the file, and takes disk space only from then on. A
run keeps few: those of its first events, since later ones may follow from them. Events that share a checkpoint share
its space.
"""

import os
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_moevlm.training.checkpoints.find_checkpoint import find_checkpoint_before

_PREFIX, _ENDING = "before_step", ".ckpt"


def keep_checkpoint_before(step: int, trainer: Trainer, folder: Path, at_most: int) -> None:
    """Link the newest checkpoint from before a step into a folder; report if the disk cannot.

    Args:
        step: optimiser step of the event.
        trainer: of the run.
        folder: for the link.
        at_most: files in the folder that are not links to one another.
    """
    if at_most == 0:
        return
    saving = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    places = [Path(each.dirpath) for each in saving if each.dirpath]
    resumed = [Path(trainer.ckpt_path)] if trainer.ckpt_path else []
    found = find_checkpoint_before(step, [*places, *resumed])
    if found is None:
        return
    kept = {each.stat().st_ino for each in folder.glob(f"{_PREFIX}*{_ENDING}")}
    link = folder / f"{_PREFIX}{step:08d}{_ENDING}"
    if link.exists() or (len(kept | {found.path.stat().st_ino}) > at_most):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.link(found.path, link)
    except OSError as error:
        rank_zero_info(
            f"flight recorder: the checkpoint of step {found.step} is not kept ({error.strerror}); copy {found.path} "
            "before it is overwritten if you want to replay this event"
        )
