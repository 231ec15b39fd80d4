"""The flight recorder: keeps the last optimiser steps, and writes them when something goes wrong.

Nothing in a step waits for the device. Every few steps the host fetches the new ones, ranks exchange losses and keys,
and `Watch` judges them. A recording is written at once, and once more when a quarter of its length has followed.
Routing, attention and norms are of the first rank. A resumed run begins with an empty memory.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.model.metrics.gather import gather_objects
from lightning_moevlm.study.forensics.watch import WINDOW, Watch
from lightning_moevlm.tracking.recordings.recording import (
    FOLDER,
    Event,
    RecordedStep,
    Recording,
    merge_keys,
    recording_name,
    write_recording,
)
from lightning_moevlm.tracking.write.run_logger import RunLogger
from lightning_moevlm.training import StepOutput, VisionLanguageModule
from lightning_moevlm.training.callbacks.recording.expert_updates import ExpertUpdates, divide_by_median
from lightning_moevlm.training.callbacks.recording.kept_checkpoint import keep_checkpoint_before
from lightning_moevlm.training.callbacks.recording.layer_norms import LayerNorms
from lightning_moevlm.training.callbacks.recording.step_values import (
    StepCollector,
    Values,
    add_totals,
    fixed_weights,
    to_shares,
)
from lightning_moevlm.training.callbacks.stopping.divergence_guard import DivergenceGuard
from lightning_moevlm.training.checks.trainer_checks import SHARDING


class _Pending(NamedTuple):
    """A step whose values are on the device."""

    step: int
    keys: dict[str, tuple[str, ...]]
    parts: list[Values]
    known: dict[str, float]  # on the host


@dataclass
class _Episode:
    """A recording that is still written to."""

    first_step: int
    until: int
    events: list[Event] = field(default_factory=list)


class FlightRecorder(Callback):
    """Writes a recording of the last steps at a spike, a loss that is not finite, a rollback or a crash.

    `moevlm fit` adds it. `moevlm spikes RUN` explains a run's recordings.

    Args:
        keep: optimiser steps in a recording.
        every_n_steps: optimiser steps between looks at the losses; the host waits for the device then.
        threshold: robust deviations of the total loss above its past that make a spike; null looks for none.
        attention_every: optimiser steps between measurements of the attention logits; null takes those of other parts.
        max_recordings: recordings of a run; 0 turns the recorder off.
        max_checkpoints: checkpoints of a run from before an event that are kept for `moevlm replay`; 0 keeps none.

    Raises:
        UserError: a value outside its range.
    """

    def __init__(
        self,
        keep: int = 128,
        every_n_steps: int = 10,
        threshold: float | None = 6.0,
        attention_every: int | None = 50,
        max_recordings: int = 8,
        max_checkpoints: int = 2,
    ) -> None:
        check_number("keep of FlightRecorder", keep, least=2 * WINDOW)
        check_number("every_n_steps of FlightRecorder", every_n_steps, least=1)
        check_number("max_recordings of FlightRecorder", max_recordings, least=0)
        check_number("max_checkpoints of FlightRecorder", max_checkpoints, least=0)
        if threshold is not None:
            check_number("threshold of FlightRecorder", threshold, above=0, advice=", or null")
        if attention_every is not None:
            check_number("attention_every of FlightRecorder", attention_every, least=1, advice=", or null")
        self.keep = keep
        self.every_n_steps = every_n_steps
        self.threshold = threshold
        self.attention_every = attention_every
        self.max_recordings = max_recordings
        self.max_checkpoints = max_checkpoints
        self._is_on = False
        self._norms: LayerNorms | None = None
        self._experts: ExpertUpdates | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with an empty memory."""
        assert isinstance(pl_module, VisionLanguageModule)
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        self._is_on = self.max_recordings > 0 and not is_trial
        shards = isinstance(trainer.strategy, SHARDING)
        self._norms = None if shards else LayerNorms(pl_module)
        self._experts = None if shards else ExpertUpdates(pl_module)
        self._watch = Watch(self.threshold)
        self._ring = deque[RecordedStep](maxlen=self.keep)
        self._pending: list[_Pending] = []
        self._collector = StepCollector()
        self._keys: list[dict[str, tuple[str, ...]]] = []  # of the current step, by micro-batch
        self._weights: dict[str, float] = {}  # of the current step
        self._task: dict[str, None] = {}  # terms of the task so far
        self._episode: _Episode | None = None
        self._num_written = 0
        self._events: list[Event] = []
        self._learning_rate = 0.0
        self._step_seen = trainer.global_step
        self._rollbacks_seen = _num_rollbacks(pl_module)
        self._rollbacks: list[Event] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Note the samples; have the attention measured if that is due."""
        if not self._is_on:
            return
        self._keys.append(_keys_by_source(batch))
        if self.attention_every is not None and (trainer.global_step + 1) % self.attention_every == 0:
            assert isinstance(pl_module, VisionLanguageModule)
            pl_module.backbone.measure_attention = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Have the gradient measured before it is clipped."""
        if not self._is_on:
            return
        self._learning_rate = float(optimizer.param_groups[0]["lr"])
        if self._norms is not None:
            assert isinstance(pl_module, VisionLanguageModule)
            pl_module.gradient_norms.ask()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Collect; after an update keep the step, and every n steps look at the losses."""
        if not self._is_on:
            return
        assert isinstance(pl_module, VisionLanguageModule)
        self._collector.add(outputs)
        self._weights |= fixed_weights(outputs["report"])
        self._task |= dict.fromkeys(outputs["report"].task)
        if trainer.global_step == self._step_seen:
            return  # the batch only added to the gradient
        self._note_rollback(pl_module)
        self._step_seen = trainer.global_step
        self._pending.append(self._take_step(trainer, pl_module))
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before a checkpoint is overwritten, so that one from before an event is kept."""
        if self._is_on and self._pending:
            self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last steps, and note a divergence."""
        if not self._is_on:
            return
        assert isinstance(pl_module, VisionLanguageModule)
        self._note_rollback(pl_module)
        guards = [each for each in trainer.callbacks if isinstance(each, DivergenceGuard)]  # type: ignore[attr-defined]
        diverged = [Event(guard.diverged_at, "diverged") for guard in guards if guard.diverged_at is not None]
        self._look(trainer, diverged, is_last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is known, on rank 0 alone; signals and mistakes of the user are no crashes."""
        is_crash = isinstance(exception, Exception) and not isinstance(exception, UserError)
        if not (self._is_on and is_crash and trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING):
            return
        lost = ""
        try:
            self._ring.extend(_with_totals(_fetch(self._pending), self._task))
        except RuntimeError:  # the device is lost
            lost = f"; the values of the last {len(self._pending)} steps are lost with the device"
        step = trainer.global_step + 1
        if self._keys:
            self._ring.append(RecordedStep(step, {}, merge_keys(self._keys)))
        line = (str(exception).splitlines() or [""])[0]
        event = Event(step, "exception", mask_url_secrets(f"{type(exception).__name__}: {line}{lost}"))
        self._events.append(event)
        events = [] if self._episode is None else self._episode.events
        self._write(trainer, _Episode(self._episode.first_step if self._episode else step, step, [*events, event]))

    def _take_step(self, trainer: Trainer, module: VisionLanguageModule) -> _Pending:
        parts, events = self._collector.finish(), module.gradient_events
        if self._norms is not None:
            norms = self._norms
            parts.append(Values(norms.gradient_names, norms.gradient_norms(module.gradient_norms)))
            parts.append(Values(norms.update_names, norms.update_norms()))
        if self._experts is not None:
            parts.append(Values(self._experts.names, self._experts.measure()))
        if events is not None and events.skipped is not None:
            parts.append(Values(("skipped",), events.skipped.float().reshape(1)))
        scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler._get_scale_async()
        if scale is not None:
            parts.append(Values(("loss_scale",), scale.float().reshape(1)))
        keys, self._keys = merge_keys(self._keys), []
        known, self._weights = self._weights | {"learning_rate": self._learning_rate}, {}
        return _Pending(trainer.global_step, keys, parts, known)

    def _note_rollback(self, module: VisionLanguageModule) -> None:
        """Note that the step before was rolled back; actions come after this callback."""
        seen, self._rollbacks_seen = self._rollbacks_seen, _num_rollbacks(module)
        if self._rollbacks_seen > seen:
            self._rollbacks.append(Event(self._step_seen, "rollback", "weights and optimiser were restored"))

    def _look(self, trainer: Trainer, more: Sequence[Event] = (), is_last: bool = False) -> None:
        """Judge the new steps; all ranks must call it together."""
        new = _join_ranks(_fetch(self._pending), self._task)
        self._pending = []
        self._ring.extend(new)
        events = [*self._rollbacks, *(event for step in new for event in self._watch.judge(step).events), *more]
        events.sort(key=lambda event: event.step)
        self._rollbacks = []
        self._events += events
        if events and self._episode is None:
            if self._num_written == self.max_recordings:
                return
            self._num_written += 1
            self._episode = _Episode(events[0].step, events[0].step + self.keep // 4)
            if trainer.is_global_zero:
                keep_checkpoint_before(events[0].step, trainer, _run_dir(trainer) / FOLDER, self.max_checkpoints)
        episode = self._episode
        if episode is None:
            return
        episode.events += events
        is_over = is_last or trainer.global_step >= episode.until
        if (events or is_over) and trainer.is_global_zero:
            self._write(trainer, episode)
        if is_over:
            self._episode = None

    def _write(self, trainer: Trainer, episode: _Episode) -> None:
        name = recording_name(episode.first_step)
        is_new = not (_run_dir(trainer) / FOLDER / name).exists()
        if self._write_to(trainer, FOLDER, name, episode.events) and is_new:
            first = episode.events[0]
            logger = _run_logger(trainer)
            run = _run_dir(trainer) if logger is None or logger.run_id is None else logger.run_id[:8]
            what = f"{first.kind} at step {first.step}"
            rank_zero_info(f"flight recorder: {what} is recorded; `moevlm spikes {run}` explains it")

    def _write_to(self, trainer: Trainer, folder: str, name: str, events: Sequence[Event]) -> bool:
        """Write the steps and events into a folder of the run and of its artifacts; False if the disk takes nothing."""
        logger, file = _run_logger(trainer), _run_dir(trainer) / folder / name
        about = {
            "ranks": str(trainer.world_size),
            "micro_batches": str(trainer.accumulate_grad_batches),
            "precision": str(trainer.precision),
            "threads": str(torch.get_num_threads()),
            "device": trainer.strategy.root_device.type,
            "threshold": str(self.threshold),
        }
        try:
            write_recording(Recording(tuple(events), tuple(self._ring), about), file)
        except OSError as error:
            rank_zero_warn(f"flight recorder: {file} cannot be written ({error.strerror}): free disk space")
            return False
        if logger is not None:
            logger.log_file(file, folder)
        return True


def _run_logger(trainer: Trainer) -> RunLogger | None:
    return next((each for each in trainer.loggers if isinstance(each, RunLogger)), None)


def _run_dir(trainer: Trainer) -> Path:
    logger = _run_logger(trainer)
    return Path(trainer.default_root_dir) if logger is None else logger.run_dir


def _keys_by_source(batch: Batch) -> dict[str, tuple[str, ...]]:
    if not batch.sources:
        return {"": batch.keys}
    names = dict.fromkeys(batch.sources)
    pairs = list(zip(batch.keys, batch.sources, strict=True))
    return {name: tuple(key for key, source in pairs if source == name) for name in names}


def _num_rollbacks(module: VisionLanguageModule) -> int:
    return 0 if module.action_runner is None else module.action_runner.num_rollbacks


def _fetch(pending: Sequence[_Pending]) -> list[RecordedStep]:
    """Return the steps with their values; the host waits once."""
    # a part without values, such as the loads of a dense model, has no device
    tensors = [part.values_V for one in pending for part in one.parts if part.names]
    numbers = iter((torch.cat(tensors) if tensors else torch.zeros(0)).tolist())
    return [
        RecordedStep(
            one.step,
            divide_by_median(to_shares({name: next(numbers) for part in one.parts for name in part.names} | one.known)),
            one.keys,
        )
        for one in pending
    ]


def _join_ranks(own: list[RecordedStep], task: Collection[str]) -> list[RecordedStep]:
    """Return the steps with the losses and keys of all ranks; a loss that a rank lacks counts 0 there.

    Args:
        own: of this rank.
        task: terms of the task that this rank has met.
    """
    everyone = gather_objects(([(_losses(one.values), one.keys) for one in own], tuple(task)))
    if len(everyone) == 1:
        return _with_totals(own, task)
    joined = []
    for one, *parts in zip(own, *(steps for steps, _ in everyone), strict=True):
        found = [losses for losses, _ in parts]
        means = {
            name: sum(losses.get(name, 0.0) for losses in found) / len(found)
            for name in dict.fromkeys(name for losses in found for name in losses if name.startswith("loss/"))
        }
        weights = {name: value for losses in found for name, value in losses.items() if name not in means}
        joined.append(one._replace(values={**one.values, **weights, **means}, keys=merge_keys([k for _, k in parts])))
    return _with_totals(joined, [term for _, terms in everyone for term in terms])


def _with_totals(steps: Sequence[RecordedStep], task: Collection[str]) -> list[RecordedStep]:
    return [one._replace(values=add_totals(one.values, task)) for one in steps]


def _losses(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.startswith(("loss/", "loss_weight/"))}
