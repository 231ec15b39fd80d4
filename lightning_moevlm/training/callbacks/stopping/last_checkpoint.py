"""Keeps `last.ckpt`, from which a run resumes, beside any other checkpoints.

Lightning 2.6 writes `save_last` only in a step in which it also saves one of the best, so its last may be hours old.
After a resume from another folder it begins a `last-v1.ckpt`.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_moevlm.training.callbacks.stopping.divergence_guard import DivergenceGuard
from lightning_moevlm.training.callbacks.stopping.stop_by_signal import StopBySignal, is_ending
from lightning_moevlm.training.checkpoints.atomic_checkpoint import save_atomically


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` after every validation, at the end of training, and when a signal stops the run.

    It also saves whenever another `ModelCheckpoint` does, in the folder of the first that names one. A run that has
    diverged keeps the checkpoint from before. An interrupted validation is repeated when the run resumes.

    Args:
        stop: catches signals; None if none are caught.
    """

    def __init__(self, stop: StopBySignal | None = None) -> None:
        super().__init__(save_last=True, save_top_k=0, enable_version_counter=False)
        self._stop = stop
        self._owes_validation = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; write all checkpoints atomically."""
        save_atomically(trainer)
        self.dirpath = next((other.dirpath for other in self._others(trainer) if other.dirpath), None)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the step at which the run was stopped, if that is missing."""
        if not self._owes_validation:
            return
        self._owes_validation = False
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Save with the others, and before the last step's validation, if a signal may end it early."""
        is_stopping = self._stop is not None and self._stop.number > 0
        if is_stopping and is_ending(trainer) and not trainer.fit_loop._should_accumulate():
            self._save(trainer)
        self._save_with_others(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the others."""
        self._save_with_others(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, after the others have read the step's metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the validation of the last step did."""
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if a signal has stopped the run between steps; after other exceptions a step may be partial."""
        is_between_steps = isinstance(exception, SIGTERMException) and trainer.state.fn == TrainerFn.FITTING
        if is_between_steps and trainer.global_step and self._last_global_step_saved != trainer.global_step:
            self._owes_validation = bool(trainer.validating)
            self._save(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the other checkpoints again if the whole run has moved to another folder."""
        for other in self._others(trainer):
            state, here = checkpoint.get("callbacks", {}).get(other.state_key), other.dirpath
            if state is None or here is None or not trainer.ckpt_path or Path(trainer.ckpt_path).parent != Path(here):
                continue
            state |= {name: _move(state[name], here) for name in ("best_model_path", "kth_best_model_path")}
            state["best_k_models"] = {_move(path, here): score for path, score in state["best_k_models"].items()}
            state["dirpath"] = here

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation is missing."""
        return {"owes_validation": self._owes_validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it; the path stays, because a folder has one `last.ckpt`."""
        self._owes_validation = state_dict["owes_validation"]

    def _save_with_others(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self._last_global_step_saved != step and any(
            other._last_global_step_saved == step for other in self._others(trainer)
        ):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        guards = [callback for callback in trainer.callbacks if isinstance(callback, DivergenceGuard)]  # type: ignore[attr-defined]
        is_trial = getattr(trainer, "fast_dev_run", False)
        if not is_trial and not any(guard.has_diverged(trainer) for guard in guards):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _others(self, trainer: Trainer) -> list[ModelCheckpoint]:
        found = trainer.checkpoint_callbacks
        return [callback for callback in found if isinstance(callback, ModelCheckpoint) and callback is not self]


def _move(path: str, folder: str | Path) -> str:
    return str(Path(folder) / Path(path).name) if path else path
