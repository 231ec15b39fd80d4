"""The contract of callbacks that judge a model by a task, and the parts of a run that they need."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.model.objectives import Objective
from lightning_moevlm.training.evaluation import log_values
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_O = TypeVar("_O", bound=Objective)


class HeldOutTask(Callback, ABC):
    """Judges a model on the batches of each validation and test."""

    @abstractmethod
    def check(self, trainer: Trainer, module: VisionLanguageModule) -> None:
        """Refuse a run that lacks what the task needs, with a UserError."""

    @abstractmethod
    def add(self, trainer: Trainer, module: VisionLanguageModule, batch: Batch) -> None:
        """Take in one batch."""

    @abstractmethod
    def compute(self, trainer: Trainer, module: VisionLanguageModule, stage: str) -> Mapping[str, float | Tensor]:
        """Return metrics by key, over the batches of all ranks, which ask together; forget the batches."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsuited run before its first step."""
        if stage != "predict":
            self.check(trainer, _own(pl_module))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Take in the batch; arguments: its outputs, the batch, its number."""
        self.add(trainer, _own(pl_module), arguments[1])

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        """Take in the batch; arguments: its outputs, the batch, its number."""
        self.add(trainer, _own(pl_module), arguments[1])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        log_values(pl_module, self.compute(trainer, _own(pl_module), "val"))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        log_values(pl_module, self.compute(trainer, _own(pl_module), "test"))


def _own(pl_module: LightningModule) -> VisionLanguageModule:
    assert isinstance(pl_module, VisionLanguageModule)
    return pl_module


def find_objective(module: VisionLanguageModule, kind: type[_O], callback: str) -> _O:
    """Return the objective of a kind, which may be a part of a joint one.

    Raises:
        UserError: there is none; callback: the name of the one that needs it.
    """
    found = next((part for part in module.objective.modules() if isinstance(part, kind)), None)
    if found is None:
        raise UserError(
            f"{callback} needs a model that is trained by {kind.__name__}, and model.objective is "
            f"{type(module.objective).__name__}: choose {kind.__name__}, or a Joint with it"
        )
    return found


def find_data(trainer: Trainer, callback: str) -> ShardDataModule:
    """Return the run's data.

    Raises:
        UserError: they are of another kind; callback: the name of the one that needs their tokenizer.
    """
    data: object = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets, but declares it not
    if not isinstance(data, ShardDataModule):
        raise UserError(f"{callback} reads texts by the set's tokenizer: give the trainer a ShardDataModule")
    return data


def require_labels(trainer: Trainer, callback: str) -> ShardDataModule:
    """Return the run's data, which must read the class of each sample.

    Raises:
        UserError: they do not; callback: the name of the one that needs the classes.
    """
    data = find_data(trainer, callback)
    if all(one.annotation is None for one in data.sets.values()):
        raise UserError(f"{callback} needs the class of each sample: set data.annotation to the field that names it")
    return data
