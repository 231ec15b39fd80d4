"""Starts training from another run: its weights, and on request the state of its optimiser.

Sparse upcycling copies a dense run's optimiser state as it copies its weights (arXiv 2212.05055, section 3, figure 1):
every expert gets the moments of the dense matrix that it is a copy of. Step counts are copied too, so bias corrections
go on. Routers, and all else that is new, start without state. Learning rates and their schedule are those of this run.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.training.checkpoints.checkpoint_file import read_checkpoint
from lightning_moevlm.training.checkpoints.init_from import InitFrom, Loaded, log_text, report_upcycling, start_from
from lightning_moevlm.training.checkpoints.optimizer_state import TrialState, name_states, try_state
from lightning_moevlm.training.optim import parameter_names

NAMES = "optimizer_names"
"""Key of a checkpoint: names of the parameters that its optimiser has state of, by their numbers."""


class LoadedState(NamedTuple):
    """Names of parameters by what their optimiser's state starts from."""

    taken: tuple[str, ...]
    copied: tuple[str, ...]  # experts, each with the state of a dense matrix
    new: tuple[str, ...]

    def describe(self) -> str:
        """Return the numbers as a line."""
        return f"{len(self.taken)} tensors as they were, {len(self.copied)} copied for experts, {len(self.new)} anew"


class StartFrom(Callback):
    """Starts training from another run if it is told to, and names the optimiser's parameters in checkpoints.

    Args:
        options: what to start from; None starts anew.
        build: the run's optimiser, a factory (parameter groups) -> Optimizer.
    """

    def __init__(self, options: InitFrom | None, build: Callable[[Iterable[Any]], Optimizer]) -> None:
        self._options = options
        self._build = build
        self._loaded: Loaded | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the weights, unless the run is resumed."""
        if stage != "fit" or trainer.ckpt_path is not None:
            return
        if self._options is not None:
            self._loaded = start_from(pl_module, self._options)
        report_upcycling(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the optimiser's state; print a line, and log every name as init_from_optimizer.txt."""
        if self._options is None or self._loaded is None or not self._options.optimizer_state:
            return
        (optimizer,) = trainer.optimizers
        found = load_optimizer_state(pl_module, optimizer, self._options.checkpoint, self._loaded, self._build)
        rank_zero_info(f"optimiser state from {self._options.checkpoint}: {found.describe()}")
        names = [f"{kind} {name}" for kind, each in found._asdict().items() for name in each]
        text = "\n".join([self._options.checkpoint, "", found.describe(), "", *names]) + "\n"
        log_text(pl_module, "init_from_optimizer.txt", text)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Name the parameters that the saved state numbers."""
        if "optimizer_states" in checkpoint:
            checkpoint[NAMES] = parameter_names(pl_module.named_parameters())


def load_optimizer_state(
    module: nn.Module, optimizer: Optimizer, path: str, loaded: Loaded, build: Callable[[Iterable[Any]], Optimizer]
) -> LoadedState:
    """Set the state of a new optimiser from that of another run's, for the tensors that the model has taken from it.

    Args:
        module: the model, with its new weights.
        optimizer: over its parameter groups.
        path: the checkpoint.
        loaded: what was taken from it.
        build: factory of such an optimiser.

    Raises:
        UserError: the checkpoint has no state of an optimiser, or of another kind.
    """
    checkpoint = read_checkpoint(Path(path))
    there = _state_by_name(checkpoint, path)
    names, here = parameter_names(module.named_parameters()), optimizer.state_dict()
    found: dict[str, list[str]] = {kind: [] for kind in LoadedState._fields}
    source_of = {**{name: name for name in loaded.taken}, **loaded.upcycled}
    for group in here["param_groups"]:
        trial = try_state(build, group["role"])
        for number in group["params"]:
            name = names[number]
            source = source_of.get(name, "")
            saved = there.get(source)
            if saved is None:
                found["new"].append(name)
                continue
            _refuse_other_kind(saved, trial, name, path)
            num_experts = len(module.get_parameter(name)) if name in loaded.upcycled else None
            is_stack = checkpoint["state_dict"][source].ndim == 3
            here["state"][number] = {
                key: _start(value, trial.state[key], num_experts, is_stack) for key, value in saved.items()
            }
            found["copied" if name in loaded.upcycled else "taken"].append(name)
    optimizer.load_state_dict(here)
    return LoadedState(*map(tuple, found.values()))


def _state_by_name(checkpoint: Mapping[str, Any], path: str) -> dict[str, Mapping[str, Any]]:
    option = "model.init_from.optimizer_state is true"
    if not checkpoint.get("optimizer_states"):
        raise UserError(
            f"{option}, and {path} has no state of an optimiser: give a .ckpt file that `moevlm fit` has saved, or set "
            "optimizer_state to null"
        )
    if NAMES not in checkpoint:
        raise UserError(
            f"{option}, and {path} is of an earlier version, which does not name the parameters of its optimiser: "
            "resume its run for one step, which saves them, or set optimizer_state to null"
        )
    (saved,) = checkpoint["optimizer_states"]
    names = checkpoint[NAMES]
    return {names[number]: state for number, state in saved["state"].items() if state}


def _refuse_other_kind(saved: Mapping[str, Any], trial: TrialState, name: str, path: str) -> None:
    if saved.keys() != trial.state.keys():
        then, now = name_states(saved, trial.state)
        raise UserError(
            f"model.init_from.optimizer_state is true, and the optimiser of {path} keeps {then}, where "
            f"{trial.optimizer} keeps {now} (for {name}): choose the optimiser of that run, or set optimizer_state to "
            "null"
        )


def _start(value: Any, trial: Any, num_experts: int | None, is_stack: bool) -> Any:
    """Return a part of the state that a parameter starts with.

    Args:
        value: of the tensor that it starts from: of any shape if it is the same, else a dense matrix (out, in) or a
            stack with one expert.
        trial: the same part of the state of any stack: (E, in, out) or (E,), or one that all experts share.
        num_experts: E of experts that are copies; None for a tensor as it was.
        is_stack: whether the value is of a stack.
    """
    if not isinstance(value, Tensor):
        return value
    if num_experts is None or trial.ndim == 0:
        return value.clone()  # the checkpoint's lies in its file
    one = value[0] if is_stack else value.T if trial.ndim == 3 else value
    return one.expand(num_experts, *one.shape).clone()
