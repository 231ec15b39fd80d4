"""The LightningModule: a backbone, an objective, auxiliary losses, an optimiser. It computes; callbacks measure."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import BatchSize, LossReport, NamedPlan, ObjectiveOutput
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.backbones.features import pool_features
from lightning_moevlm.model.initial_weights import derive_seed, initialise
from lightning_moevlm.model.layers import find_evaluation_limits, joined_matrices
from lightning_moevlm.model.losses import AuxiliaryLosses, LayerCounts, LossInput
from lightning_moevlm.model.metrics import DropRates
from lightning_moevlm.model.objectives import Draws, MaskedModelling, Objective
from lightning_moevlm.model.precision import PrecisionPolicy, region, set_precision
from lightning_moevlm.training.actions import Action, ActionRunner, Actions, build_actions
from lightning_moevlm.training.actions.loss_weights import LossWeights
from lightning_moevlm.training.checkpoints.configured_options import ConfiguredOptions
from lightning_moevlm.training.checkpoints.epoch_position import restore_epoch_position
from lightning_moevlm.training.checkpoints.init_from import InitFrom
from lightning_moevlm.training.checkpoints.init_optimizer import StartFrom
from lightning_moevlm.training.checkpoints.optimizer_state import refuse_other_groups
from lightning_moevlm.training.checkpoints.partial_step import PartialStep, StepInProgress
from lightning_moevlm.training.checks import trainer_checks
from lightning_moevlm.training.checks.loss_checks import refuse_unsuited_losses
from lightning_moevlm.training.checks.optimizer_checks import refuse_unsuited_optimizer, refuse_vanishing_eps
from lightning_moevlm.training.checks.precision_checks import refuse_unreached_routers
from lightning_moevlm.training.evaluation import Evaluation, log_values, report_batch_dependence
from lightning_moevlm.training.half_precision import keep_pinned_regions
from lightning_moevlm.training.optim import (
    GradientControl,
    GradientEvents,
    GradientNorms,
    GradientStabilisers,
    GroupOptions,
    build_optimizer,
    round_state,
)
from lightning_moevlm.training.optim.named_parts import refuse_unreached, train_only
from lightning_moevlm.training.optim.schedules.schedule_length import build_schedule, report_short_run, steps_of_run
from lightning_moevlm.training.step.logging_steps import is_logging_step
from lightning_moevlm.training.step.routing_counts import loss_inputs
from lightning_moevlm.training.step.step_output import StepOutput
from lightning_moevlm.training.step.step_size import scale_to_step, step_size
from lightning_moevlm.training.unused_parameters import UnusedParameters

_Losses = tuple[ObjectiveOutput, LossReport]


class VisionLanguageModule(LightningModule):
    """Trains any backbone with any objective.

    Initial weights depend only on `seed` and names. Masks depend on `seed`, the sample's key and, in training, the
    optimiser step. So arms of a study share them at any batch size, and a resumed run equals an uninterrupted one.

    Args:
        backbone: vision-language trunk.
        objective: training objective, a factory (spec) -> Objective.
        losses: auxiliary losses on routing.
        optimizer: optimiser, a factory (parameter groups) -> Optimizer.
        groups: learning rate and weight decay of routers and experts.
        gradient: clipping of gradients and updates, skipping of spikes.
        schedule: learning-rate schedule, a factory (optimizer) -> LRScheduler, stepped every optimiser step; null keeps
            the rate constant.
        seed: seed of initial weights and masks.
        init_std: standard deviation of initial matrices.
        precision: dtype per region, for the backbone, the objective, the losses and the optimiser's state.
        actions: changes to the model after each optimiser step.
        init_from: weights of another run that training starts from; null starts anew.
        trainable: beginnings of the names of parts that are trained, such as backbone.connector; * stands for a number.
            The others stay as they start; null trains all.

    Raises:
        UserError: an action or loss that does not fit the backbone or the objective, an unknown part, or a negative
            init_std.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Callable[[BackboneSpec], Objective] = MaskedModelling,
        losses: AuxiliaryLosses = AuxiliaryLosses(),
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        groups: GroupOptions = GroupOptions(),
        gradient: GradientStabilisers = GradientStabilisers(),
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
        init_std: float = 0.02,
        precision: PrecisionPolicy = PrecisionPolicy(),
        actions: Actions = Actions(),
        init_from: InitFrom | None = None,
        trainable: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective(backbone.spec)
        self.losses = losses
        self.optimizer_factory = optimizer
        self.groups = groups
        self.gradient = gradient
        self.schedule_factory = schedule
        self.seed = seed
        self.init_std = init_std
        self.actions = actions
        self.init_from, self.trainable = init_from, trainable
        self.precision = precision
        set_precision(self, precision)
        refuse_unreached_routers(precision, backbone)
        check_number("init_std", init_std, least=0)
        initialise(self, seed, init_std)
        if trainable is not None:
            train_only(self, trainable)
        refuse_unsuited_losses(losses, backbone, self.objective)
        self._gradient_control: GradientControl | None = None
        self.gradient_norms = GradientNorms()
        self._gradient_memory: dict[str, dict[str, Tensor]] = {}  # of a checkpoint, until there is an optimiser
        self._current_step = StepInProgress(backbone, self.objective)
        self._partial_step: PartialStep | None = None  # of a checkpoint, until training starts
        self._configured_options: ConfiguredOptions | None = None
        self._needs_attention = actions.qk_clip is not None
        self._loss_weights = LossWeights(losses)
        of_losses = {"loss_weights": self._loss_weights} if losses.adapts else {}
        active_actions = build_actions(actions, backbone) | of_losses
        self._counts_routing = losses.reads_counts or any("load" in action.needs for action in active_actions.values())
        self.active_actions: Mapping[str, Action] = active_actions
        self.action_runner = (
            ActionRunner(active_actions, backbone, seed, self._current_step.routing) if active_actions else None
        )
        limits = find_evaluation_limits(backbone)
        self.val_evaluation, self.test_evaluation = (
            Evaluation(stage, [*self.objective.measures(), DropRates(limits)], losses) for stage in ("val", "test")
        )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> "VisionLanguageModule":
        """Build a module from the given parts and a checkpoint's weights; a UserError without a backbone."""
        if "backbone" not in options:
            raise UserError(
                "a checkpoint holds weights, not the modules: pass backbone=... and other parts with weights, or use "
                "lightning_moevlm.configuration.resolver.load_module(PATH), which reads the run's configuration"
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **options)

    def configure_callbacks(self) -> list[Callback]:
        """Add the callbacks that every run needs: start, actions after each step, report of unused parameters."""
        every = [StartFrom(self.init_from, self.optimizer_factory), UnusedParameters(self.objective)]
        return every if self.action_runner is None else [*every, self.action_runner]

    def setup(self, stage: str) -> None:
        """Refuse an unsuited trainer; keep pinned regions in fp32, before Lightning casts the module."""
        if stage == "fit" and self.gradient.any_on:
            trainer_checks.refuse_unsuited_trainer(self.trainer)
        trainer_checks.refuse_other_sources(self.trainer, self.objective)
        keep_pinned_regions(self.trainer, self.precision)
        report_batch_dependence(self.backbone, stage)

    def build_optimizer(self) -> Optimizer:
        """Return a new optimiser over the parameter groups, each with its peak rate and decay."""
        return build_optimizer(self.optimizer_factory, self.named_parameters(), self.groups, joined_matrices(self))

    def build_schedule(self, optimizer: Optimizer, num_steps: int | None) -> LRScheduler | None:
        """Return the schedule of an optimiser for a run of `num_steps`; None without a schedule."""
        factory = self.schedule_factory
        return None if factory is None else build_schedule(factory, optimizer, num_steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the parameter groups, the schedule per step, and the gradient stabilisers."""
        optimizer = self.build_optimizer()
        refuse_vanishing_eps(self.trainer, optimizer)
        round_state(optimizer, self.precision)
        if self.gradient.any_on:
            refuse_unsuited_optimizer(self.trainer, optimizer)
            self._gradient_control = GradientControl(self.gradient, optimizer, self.gradient_norms)
            self._gradient_control.load_state_dict(self._gradient_memory)
            if self.action_runner is not None:
                self.action_runner.gradient_control = self._gradient_control
        schedule = self.build_schedule(optimizer, steps_of_run(self.trainer))
        self._configured_options = ConfiguredOptions(optimizer, keeps_rate=schedule is None)
        if schedule is None:
            return {"optimizer": optimizer}
        report_short_run(schedule, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Resume in the right epoch and step, with the options of this run in place of the checkpoint's."""
        trainer_checks.refuse_uneven_steps(self.trainer)
        restore_epoch_position(self.trainer)
        partial_step, self._partial_step = self._partial_step, None
        if partial_step is not None:
            self._current_step.restore(partial_step, self, self.action_runner)
        assert self._configured_options is not None
        self._configured_options.restore()

    def training_step(self, batch: Batch, batch_idx: int) -> StepOutput:
        """Return the total loss, and the values that callbacks measure."""
        self.seed_noise(self.micro_step(batch_idx))
        self.backbone.measure_attention |= self._needs_attention or is_logging_step(self.trainer, self.global_step + 1)
        self.objective.spans_ranks = self.trainer.world_size > 1
        output, report = self.compute_losses(batch, self.global_step, self._measure_step(batch))
        self.backbone.measure_attention = self.objective.spans_ranks = False
        loss = report.differentiated
        refuse_unreached(loss, self.trainable)
        self._current_step.losses.append(report.task_in_step.detach())
        return StepOutput(
            loss=loss,
            report=report.detach(),
            plans=tuple(plan.detach() for plan in output.plans),
            attention=output.attention,
            log_partitions={name: value_M.detach() for name, value_M in output.log_partitions.items()},
            num_tokens=output.num_tokens,
            num_samples=batch.num_samples,
        )

    def compute_losses(self, batch: Batch, step: int, whole: BatchSize | None = None) -> _Losses:
        """Run the model on a batch of an optimiser step; whole: the size of that step, None if it is the batch."""
        output, inputs = self._run_objective(batch, "train", step)
        size, task = None, output.terms
        if whole is not None:
            size = step_size(whole, self._num_parts, output.plans, self.backbone, self.objective)
            task = {name: scale_to_step(term, whole.predictions[name], size.num_parts) for name, term in task.items()}
        with region(self.precision, "losses", self.device.type):
            auxiliary = self.losses.terms(inputs, output.log_partitions, self.current_weights, size)
        return output, LossReport(task, auxiliary)

    def _run_objective(self, batch: Batch, stage: str, step: int = 0) -> tuple[ObjectiveOutput, list[LossInput]]:
        output: ObjectiveOutput = self.objective(self.backbone, batch, self.draws(stage, step))
        clash = self.losses.enabled.keys() & output.terms.keys()
        if clash:
            raise UserError(
                f"objective and auxiliary losses share the term names {sorted(clash)}: rename the objective's, or "
                "those in losses.others"
            )
        return output, self._loss_inputs(output.plans, training=stage == "train")

    def _loss_inputs(self, plans: tuple[NamedPlan, ...], training: bool) -> list[LossInput]:
        counts: dict[str, LayerCounts] = {}
        if training and self._counts_routing:
            self._current_step.routing.add(self.global_step, plans)
            if self.losses.reads_counts:
                counts = self._current_step.routing.totals(self._sum_over_ranks, self.device)
        return loss_inputs(self.backbone, plans, counts, training)

    def _measure_step(self, batch: Batch) -> BatchSize | None:
        if self._num_parts == 1:
            return None
        micro_batches = self.trainer.accumulate_grad_batches
        return self._current_step.size.measure(batch, self.global_step, micro_batches, self._sum_over_ranks)

    @property
    def _num_parts(self) -> int:
        """Micro-batches of an optimiser step on all ranks."""
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(counts, reduce_op="sum")

    def draws(self, stage: str, step: int = 0) -> Draws:
        """Return the source of random masks: by optimiser step in training, constant in evaluation."""
        words = (stage, step) if stage == "train" else ("held out",)
        return Draws(derive_seed(self.seed, *words))

    def micro_step(self, batch_idx: int) -> int:
        """Return the number of a micro-batch since the start of training; it seeds the noise."""
        micro_batches = self.trainer.accumulate_grad_batches
        return self.global_step * micro_batches + batch_idx % micro_batches

    def seed_noise(self, step: int) -> None:
        """Seed the draws of routers and dropout by seed, step and rank, so that a resumed run repeats them."""
        seed = derive_seed(self.seed, "noise", step, self.global_rank)
        # torch.manual_seed formats the stack of calls for each kind of accelerator that is not there: 1 ms of a step
        torch.default_generator.manual_seed(seed) if self.device.type == "cpu" else torch.manual_seed(seed)

    @property
    def current_weights(self) -> dict[str, float | Tensor]:
        """The weight of each auxiliary loss in the current step."""
        return self._loss_weights.at(self.global_step)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Run the gradient stabilisers on unscaled gradients, once per step; if all are off, Lightning clips."""
        losses, self._current_step.losses = self._current_step.losses, []
        if self._gradient_control is None:
            self.gradient_norms.measure_if_asked(self.parameters())
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        loss = torch.stack(losses).mean()
        if self.gradient.skip_spikes is not None:  # the others do not ask for the loss
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self._gradient_control.before_update(loss)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take the step, then run the stabilisers that act on updates."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._gradient_control is not None:
            self._gradient_control.after_update()

    @property
    def gradient_events(self) -> GradientEvents | None:
        """Effects of the gradient stabilisers in the last optimiser step; None if all are off."""
        return None if self._gradient_control is None else self._gradient_control.events

    @property
    def can_roll_back(self) -> bool:
        """Whether a rollback will answer the next loss that is not finite."""
        return self.action_runner is not None and self.action_runner.can_roll_back

    def on_train_batch_end(self, outputs: StepOutput, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        """Stop after the last step, so that it is validated."""
        if 0 < self.trainer.max_steps <= self.global_step:
            self.trainer.should_stop = True  # Lightning validates and saves once more when it is asked to stop

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure one batch; the masks of its samples are always the same."""
        self._evaluate(batch, "val", self.val_evaluation)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch. Lightning's sanity check measures the untrained model: step 0 of a curve."""
        log_values(self, self.val_evaluation.compute(self.current_weights))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure one batch."""
        self._evaluate(batch, "test", self.test_evaluation)

    def on_test_epoch_end(self) -> None:
        """Log the epoch."""
        log_values(self, self.test_evaluation.compute(self.current_weights))

    def _evaluate(self, batch: Batch, stage: str, evaluation: Evaluation) -> None:
        if not self.objective.can_use(batch):  # images alone may still be judged by callbacks
            return
        output, inputs = self._run_objective(batch, stage)
        with region(self.precision, "losses", self.device.type):
            evaluation.update(output, inputs, batch.num_samples)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return features averaged over real positions, (B, D) each: `image`, `text` and `pair`, as the data allows."""
        return pool_features(self.backbone, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the gradient stabilisers and, within an accumulation, the partial step."""
        if self._gradient_control is not None:
            checkpoint["gradient_stabilisers"] = self._gradient_control.state_dict()
        if self._current_step.losses and "loops" in checkpoint:  # not where weights alone are saved
            checkpoint["partial_step"] = self._current_step.save(self, self.action_runner)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load both; a UserError if the optimiser's state has other parameter groups."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:  # else load_from_checkpoint
            refuse_other_groups(checkpoint, self)
        self._gradient_memory = checkpoint.get("gradient_stabilisers", {})
        self._partial_step = checkpoint.get("partial_step")
