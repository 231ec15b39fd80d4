"""Finds the parts of a run that a task needs: an objective of some kind, and the data with their tokenizer."""

from typing import TypeVar

from lightning.pytorch import LightningModule, Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.model.objectives import Objective
from lightning_moevlm.training.vision_language_module import VisionLanguageModule

_O = TypeVar("_O", bound=Objective)


def find_objective(pl_module: LightningModule, kind: type[_O], callback: str) -> _O:
    """Return the objective of a kind, which may be a part of a joint one.

    Raises:
        UserError: there is none; callback: the name of the one that needs it.
    """
    assert isinstance(pl_module, VisionLanguageModule)
    found = next((module for module in pl_module.objective.modules() if isinstance(module, kind)), None)
    if found is None:
        raise UserError(
            f"{callback} needs a model that is trained by {kind.__name__}, and model.objective is "
            f"{type(pl_module.objective).__name__}: choose {kind.__name__}, or a Joint with it"
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
