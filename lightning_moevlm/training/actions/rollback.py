"""Rollback: after a loss spike or a loss that is not finite, restore an earlier state and continue with fresh data.

PaLM (arXiv 2204.02311, training instability) restarted about 100 steps before a spike and skipped the batches around
it. The spikes did not return, so they come from a certain state with a certain batch. Here weights, buffers,
optimisers, schedules and state of stabilisers and actions (past norms, adaptive weights, idle experts) are restored.
Data, masks and the step count continue: nothing is read twice, and a budget of steps stays the same.

    bad     the loss is not finite, or above mean + spike_threshold x std of the last `window` good losses, once there
            are that many
    target  the newest snapshot at least `lookback` steps old, else the oldest; it and newer ones leave the ring, so a
            second rollback goes further back; the last snapshot is never dropped

The loss is the mean total loss of the step over micro-batches and ranks. Snapshots are in memory beside the weights:
each takes as much as weights and optimiser state. The ring is part of every checkpoint, so a resumed run can go back as
far. In every step the host waits for the loss once.
"""

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.training.actions.action import Action, StepFacts, Training


@dataclass(frozen=True)
class Rollback:
    """Restores an earlier state after a loss spike or a loss that is not finite.

    Args:
        every_n_steps: optimiser steps between snapshots; one more is taken before the first step.
        keep: snapshots in the ring.
        lookback: least age of the restored snapshot, in steps.
        spike_threshold: standard deviations above the mean that make a spike; null answers only losses that are not
            finite.
        window: good losses in mean and std.
        max_rollbacks: largest number of rollbacks; after it, training continues without.

    Raises:
        UserError: a value outside its range.
    """

    every_n_steps: int = 100
    keep: int = 2
    lookback: int = 20
    spike_threshold: float | None = 7.0
    window: int = 100
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        for name, least in (("every_n_steps", 1), ("keep", 1), ("lookback", 1), ("window", 2), ("max_rollbacks", 1)):
            check_number(f"actions.rollback.{name}", getattr(self, name), least=least)
        if self.spike_threshold is not None:
            check_number("actions.rollback.spike_threshold", self.spike_threshold, above=0, advice=", or null")


class Snapshot(NamedTuple):
    """A state after `step` optimiser steps."""

    step: int
    module: dict[str, Any]
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]
    memories: dict[str, dict[str, Any]]
    losses: list[float]
    """The good losses in the window."""


class SnapshotRing(Action):
    """Takes and restores snapshots.

    Args:
        options: schedule and rule.
    """

    needs = frozenset({"loss"})

    def __init__(self, options: Rollback) -> None:
        self._options = options
        self._ring: list[Snapshot] = []
        self._losses: list[float] = []
        self._done = 0

    @property
    def can_roll_back(self) -> bool:
        """Whether the next bad loss will cause a rollback."""
        return self._done < self._options.max_rollbacks

    @property
    def num_rollbacks(self) -> int:
        """Rollbacks done."""
        return self._done

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The steps of the snapshots, oldest first."""
        return tuple(snapshot.step for snapshot in self._ring)

    def start(self, training: Training, step: int) -> None:
        """Take the first snapshot, unless a checkpoint brought some."""
        if not self._ring:
            self._ring.append(take_snapshot(training, step, self._losses))

    def rewind(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Restore a snapshot if the loss is bad; empty if it is not, or no rollback is left."""
        assert facts.loss is not None
        if not self.can_roll_back or not is_bad(float(facts.loss), self._losses, self._options):
            return {}
        old_enough = [place for place, one in enumerate(self._ring) if facts.step - one.step >= self._options.lookback]
        place = old_enough[-1] if old_enough else 0
        snapshot = self._ring[place]
        restore(snapshot, training)
        self._ring = self._ring[: max(1, place)]
        self._losses = list(snapshot.losses)
        self._done += 1
        return {metric_keys.ROLLBACK.key(): float(snapshot.step)}

    def after_step(self, training: Training, facts: StepFacts) -> dict[str, float]:
        """Add a good loss to the window; every n steps take a snapshot."""
        assert facts.loss is not None
        loss = float(facts.loss)
        if not math.isfinite(loss):
            return {}
        self._losses = add_good_loss(self._losses, loss, self._options.window)
        if self.can_roll_back and facts.step % self._options.every_n_steps == 0:
            self._ring = [*self._ring, take_snapshot(training, facts.step, self._losses)][-self._options.keep :]
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the ring, the window and the rollbacks done."""
        return {"ring": [snapshot._asdict() for snapshot in self._ring], "losses": self._losses, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them."""
        self._ring = [Snapshot(**{"memories": {}, **snapshot}) for snapshot in state["ring"]]  # older ones had none
        self._losses = list(state["losses"])
        self._done = int(state["done"])


class SpikeRule(Protocol):
    """The options of the rule at the top of this file."""

    @property
    def spike_threshold(self) -> float | None:
        """Standard deviations above the mean."""

    @property
    def window(self) -> int:
        """Good losses in mean and std."""


def add_good_loss(good: Sequence[float], loss: float, window: int) -> list[float]:
    """Return the last good losses, with this one."""
    return [*good, loss][-window:]


def is_bad(loss: float, good: Sequence[float], options: SpikeRule) -> bool:
    """Apply the rule at the top of this file."""
    if not math.isfinite(loss):
        return True
    if options.spike_threshold is None or len(good) < options.window:
        return False
    return loss > statistics.fmean(good) + options.spike_threshold * statistics.pstdev(good)


def take_snapshot(training: Training, step: int, losses: Sequence[float] = ()) -> Snapshot:
    """Copy everything that an update changes, on its devices."""
    return Snapshot(
        step,
        {name: tensor.detach().clone() for name, tensor in training.module.state_dict().items()},
        [copy.deepcopy(optimizer.state_dict()) for optimizer in training.optimizers],
        [copy.deepcopy(scheduler.state_dict()) for scheduler in training.schedulers],
        {name: copy.deepcopy(memory.state_dict()) for name, memory in training.memories.items()},
        list(losses),
    )


def restore(snapshot: Snapshot, training: Training) -> None:
    """Load a snapshot, which stays unchanged; a memory without an entry in it keeps its state.

    The optimiser keeps its options, because the snapshot may be from a run with others. The learning rate is one of
    them unless a schedule sets it.
    """
    training.module.load_state_dict(snapshot.module)
    left_out = {"params", "lr"} if training.schedulers else {"params"}
    for optimizer, state in zip(training.optimizers, snapshot.optimizers, strict=True):
        options = [
            {name: value for name, value in group.items() if name not in left_out} for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(copy.deepcopy(state))  # torch keeps the tensors that it is given
        for group, values in zip(optimizer.param_groups, options, strict=True):
            group.update(values)
    for scheduler, state in zip(training.schedulers, snapshot.schedulers, strict=True):
        scheduler.load_state_dict(copy.deepcopy(state))
    for name in training.memories.keys() & snapshot.memories.keys():
        training.memories[name].load_state_dict(copy.deepcopy(snapshot.memories[name]))
