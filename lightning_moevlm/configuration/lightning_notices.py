"""Hides Lightning's notices, not its warnings, while a run is built, so that an error stands alone.

"Seed set to 0", "GPU available: ..." and advertising are dropped. Warnings that name nothing the user could change are
filtered.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def quiet_lightning() -> Iterator[Callable[[], None]]:
    """Drop messages below a warning until the function that it yields is called, when all is built."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]

    def restore() -> None:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield restore
    finally:
        restore()


def filter_warnings() -> None:
    """Hide warnings that name nothing the user could change; every other warning stays."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*", category=FutureWarning)
    # on few cores, decoding in the training process is the fastest (num_workers is the user's to set)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    # the logging interval is set by the study, not by the length of an epoch
    warnings.filterwarnings("ignore", message=r".*The number of training batches.*smaller than the logging interval.*")
    # a run continued under another id keeps its checkpoints in its own folder, and one under the same id in the same
    warnings.filterwarnings("ignore", message=r".*The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message=r".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint need to be provided.*")
    # torchmetrics has summed over ranks before the value is logged
    warnings.filterwarnings("ignore", message=r".*It is recommended to use .*sync_dist=True.*")
    # keys travel in the batch itself
    warnings.filterwarnings("ignore", message=r".*Couldn't infer the batch indices.*")
