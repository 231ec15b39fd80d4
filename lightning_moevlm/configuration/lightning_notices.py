"""What Lightning tells about itself ("Seed set to 0", "GPU available: ...") waits until the run begins.

A mistake in the configuration is found between those lines and the first step; then it is the only line. Warnings never
wait. Advertising, and notices that name nothing the user could change, are not shown at all.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_moevlm.common.errors import UserError

_NOISE = ("💡", "litlogger", "TPU available", "was configured so")
_ROOTS = ("lightning.pytorch", "lightning.fabric")


class Notices(logging.Filter):
    """Holds records below a warning until they are released or dropped; on the handlers of Lightning's loggers."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[logging.LogRecord] | None = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record pass, or keep it."""
        if self._held is None or record.levelno >= logging.WARNING:
            return True
        if record not in self._held:  # two loggers may share a handler
            self._held.append(record)
        return False

    def release(self) -> None:
        """Show what was held, in its order, and hold nothing from now on."""
        held, self._held = self._held or [], None
        for record in held:
            logging.getLogger(record.name).callHandlers(record)

    def drop(self) -> None:
        """Forget what was held, and hold nothing from now on."""
        self._held = None


class ReleaseNotices(Callback):
    """Releases when everything is built and the first step is near.

    Args:
        notices: what to release.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release before training, after optimisers are built."""
        self._notices.release()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release before an evaluation; during training there is nothing left to release."""
        self._notices.release()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release before a test."""
        self._notices.release()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release before a prediction."""
        self._notices.release()


@contextmanager
def quiet_lightning() -> Iterator[Notices]:
    """Hold notices while a run is built; drop them where it ends in a mistake of the user, else show them."""
    notices = Notices()
    handlers = [handler for root in _ROOTS for handler in logging.getLogger(root).handlers]
    for handler in handlers:
        handler.addFilter(notices)
    try:
        yield notices
    except UserError:
        notices.drop()
        raise
    finally:
        notices.release()
        for handler in handlers:
            handler.removeFilter(notices)


def filter_warnings() -> None:
    """Silence advertising and notices that name nothing the user could change; every other warning stays."""
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
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addFilter(_no_advertising)


def _no_advertising(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in _NOISE)
