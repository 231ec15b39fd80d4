"""Runs the actions of a module, logs their events, and keeps their state in the checkpoint.

It is a callback, because callbacks act before checkpoints are written: a checkpoint then holds the model after the
actions of its step. `VisionLanguageModule` adds it; it is not meant to be configured.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.training.actions.action import Action, Fact, Memory, Training
from lightning_moevlm.training.actions.rollback import SnapshotRing
from lightning_moevlm.training.actions.step_facts import CollectedFacts, FactCollector, Reduce
from lightning_moevlm.training.optim import GradientControl
from lightning_moevlm.training.step.logging_steps import is_logging_step
from lightning_moevlm.training.step.routing_counts import RoutingCounter
from lightning_moevlm.training.step.step_output import StepOutput


class ActionRunner(Callback):
    """Runs actions once per optimiser step, after the update.

    Args:
        actions: by name, in their order.
        backbone: changed by the actions.
        seed: of their draws.
        counter: counts the routers' choices.
    """

    def __init__(self, actions: dict[str, Action], backbone: Backbone, seed: int, counter: RoutingCounter) -> None:
        # the rollback last: its snapshots include the effects of the others
        self._actions = dict(sorted(actions.items(), key=lambda entry: entry[0] == "rollback"))
        self._backbone = backbone
        self._seed = seed
        needs = frozenset[Fact]().union(*(action.needs for action in actions.values()))
        self._collector = FactCollector(backbone, needs, counter)
        self._steps_done = 0
        self.gradient_control: GradientControl | None = None  # set when the optimiser is built

    @property
    def can_roll_back(self) -> bool:
        """Whether a rollback will answer the next loss that is not finite."""
        ring = self._ring
        return ring is not None and ring.can_roll_back

    @property
    def num_rollbacks(self) -> int:
        """Rollbacks done since the start of training."""
        return 0 if self._ring is None else self._ring.num_rollbacks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the first step, and prepare it."""
        self._steps_done = trainer.global_step
        self._prepare(trainer.global_step)
        if self._ring is not None:
            self._ring.start(self._training(trainer, pl_module), trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Run the actions on gradients, before they are clipped."""
        for action in self._actions.values():
            action.before_step(self._training(trainer, pl_module), trainer.global_step + 1)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Collect facts, and after an update act; after a rollback no other action acts."""
        self._collector.add(outputs["attention"], outputs["report"].differentiated)
        step = trainer.global_step
        if step == self._steps_done:
            return  # the batch only added to the gradient
        self._steps_done = step

        facts = self._collector.finish(step, pl_module.device, _reduce_over_ranks(trainer))
        if self.gradient_control is not None and self.gradient_control.events is not None:
            facts = facts._replace(skipped=self.gradient_control.events.skipped)
        training = self._training(trainer, pl_module)
        events = {} if self._ring is None else self._ring.rewind(training, facts)
        if not events:
            for action in self._actions.values():
                events |= action.after_step(training, facts)
        else:
            for action in self._actions.values():
                events |= action.after_rollback()
        self._prepare(step)
        if is_logging_step(trainer, step):
            for action in self._actions.values():
                events |= action.pending()
        if events:
            for logger in trainer.loggers:
                logger.log_metrics(events, step=step)

    def _prepare(self, step: int) -> None:
        for action in self._actions.values():
            action.prepare(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every action."""
        return {name: action.state_dict() for name, action in self._actions.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it; an action that is not in the checkpoint starts fresh."""
        for name, action in self._actions.items():
            if name in state_dict:
                action.load_state_dict(state_dict[name])

    def collect_partial_step(
        self, trainer: Trainer, device: torch.device, gather_ranks: Callable[[Tensor], Tensor]
    ) -> CollectedFacts:
        """Return the facts of the current step so far, over all ranks; all ranks must call it together."""
        return self._collector.state(device, _reduce_over_ranks(trainer), gather_ranks)

    def restore_partial_step(
        self, facts: CollectedFacts, device: torch.device, select_rank: Callable[[Tensor], Tensor]
    ) -> None:
        """Continue collecting from there."""
        self._collector.restore(facts, device, select_rank)

    @property
    def _ring(self) -> SnapshotRing | None:
        ring = self._actions.get("rollback")
        assert ring is None or isinstance(ring, SnapshotRing)
        return ring

    def _training(self, trainer: Trainer, module: LightningModule) -> Training:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        memories: dict[str, Memory] = {name: action for name, action in self._actions.items() if name != "rollback"}
        if self.gradient_control is not None:
            memories["gradient_stabilisers"] = self.gradient_control
        return Training(module, self._backbone, trainer.optimizers, schedulers, self._seed, memories)


def _reduce_over_ranks(trainer: Trainer) -> Reduce:
    def reduce(tensor: Tensor, operation: str) -> Tensor:
        total: Tensor = trainer.strategy.reduce(tensor, reduce_op=operation)
        return total

    return reduce
