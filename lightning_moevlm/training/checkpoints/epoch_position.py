"""Where training goes on after a checkpoint: in the epoch whose batches are not all done, else in the next.

A checkpoint holds Lightning's counts of epochs and batches as they are at the moment of saving, and what Lightning 2.6
makes of them differs from moment to moment. With `max_steps` it takes one that was saved when an epoch was over, in
`on_train_epoch_end` or after `fit`, for one inside that epoch: a batch too many, on which a step is taken whatever the
accumulation, and then a whole epoch. One that was saved where `max_steps` ended a run amid an epoch counts that epoch
as done. Here the counts are set from the one fact that is right at every moment: how many batches of the epoch at hand
are done. (Lightning's issues 18060 and 19815 tell of other moments; its pull request 20379 mended some.)
"""

import math

from lightning.pytorch import Trainer


def restore_epoch_position(trainer: Trainer) -> None:
    """Set the counts of a loaded checkpoint; in `on_train_start`, before the epoch is begun. Else does nothing."""
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
    fit_loop.reset_restart_stage()  # Lightning now begins an epoch: the next one, or the one at hand
    if is_done:
        fit_loop.epoch_loop.restarting = False  # with no batch done
    else:
        batches.is_last_batch = False  # it was, if the run that saved it had shorter epochs
