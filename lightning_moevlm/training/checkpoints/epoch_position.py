"""Resumes training in the right epoch: the one whose batches are not all done, else the next.

A checkpoint holds Lightning's counts of epochs and batches at the moment of saving, and Lightning 2.6 reads them
differently by moment. With `max_steps` it takes a checkpoint from the end of an epoch (`on_train_epoch_end`, or after
`fit`) for one inside it: one batch too many, with a step whatever the accumulation, and then a whole epoch. If
`max_steps` ended a run within an epoch, it counts that epoch as done. Here the counts follow from the one number that
is always right: the batches done in the current epoch. (Lightning's issues 18060 and 19815 describe other moments; its
pull request 20379 fixed some.)
"""

import math

from lightning.pytorch import Trainer


def restore_epoch_position(trainer: Trainer) -> None:
    """Set the counts of a loaded checkpoint, in `on_train_start`, before the epoch begins; else do nothing."""
    fit_loop = trainer.fit_loop
    if not fit_loop.is_resuming:
        return
    epochs, batches = fit_loop.epoch_progress, fit_loop.epoch_loop.batch_progress
    is_done = (
        batches.current.ready >= fit_loop.max_batches if math.isfinite(fit_loop.max_batches) else batches.is_last_batch
    )
    for count in (epochs.total, epochs.current):
        num_done = count.ready if is_done else max(0, count.ready - 1)
        count.reset()
        count.increment_by(num_done)
    fit_loop.reset_restart_stage()  # Lightning now begins an epoch: the next one, or the current one
    if is_done:
        fit_loop.epoch_loop.restarting = False  # with no batch done
    else:
        batches.is_last_batch = False  # it was, if the run that saved it had shorter epochs
