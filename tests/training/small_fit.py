"""A few steps of training in this process: the small VL-MoE, batches in memory, no files; and faults to inject."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.step_records import ObjectiveOutput, Term
from lightning_moevlm.data.load.steps_ahead import StepsAhead
from lightning_moevlm.model.backbones import Backbone, BackboneSpec
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.layers import ModelStabilisers, MoEFFN
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.model.objectives import Draws, MaskedModelling, Objective
from lightning_moevlm.model.routers import Router, TopKRouter
from lightning_moevlm.training import Actions, StepOutput, VisionLanguageModule
from lightning_moevlm.training.actions import AnticipateRouting, FreezeRouter, QKClip, ReviveDeadExperts, Rollback
from tests.small_model import pair_batch, small_vl_moe

RouterFactory = Callable[[int, int], Router]


class NoTask(Objective):
    """Runs pairs through the backbone without a task: only the losses on routing train.

    Nothing is masked, so that parts of a batch are routed as they are within the whole.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.num_classes = {}

    def forward(self, backbone: Backbone, batch: Batch, draws: Draws) -> ObjectiveOutput:
        output = backbone(batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
        return ObjectiveOutput({"none": Term(0.0 * output.tokens_BSD.sum(), 1.0)}, {}, output.plans, 0)


class Memory(Logger):
    """points: (step, value) of every metric, by key."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, list[tuple[int, float]]] = defaultdict(list)

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.points[key].append((step or 0, value))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Outputs(Callback):
    """Keeps the output of every micro-batch."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        self.outputs.append(StepOutput(**outputs))


class Poison(Callback):
    """Makes one weight infinite, once, just before the given optimiser step: its loss is then no number."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step + 1 == self.at_step:
            self.at_step = 0
            with torch.no_grad():
                next(iter(pl_module.parameters())).view(-1)[0] = torch.inf


class LossesSeen(Callback):
    """The total loss of every micro-batch, and whether attention logits were measured."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.measured: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, *_: object) -> None:
        self.losses.append(float(outputs["report"].total_loss))
        self.measured.append(bool(outputs["attention"]))


def tiny_module(
    actions: Actions, lr: float = 1e-3, router: Callable[[int, int], Router] | None = None
) -> VisionLanguageModule:
    """Without qk-norm, so that QK-clip can act."""
    backbone = small_vl_moe(stabilisers=ModelStabilisers(qk_norm=False), router=router)
    optimizer = partial(torch.optim.AdamW, lr=lr)
    return VisionLanguageModule(backbone, optimizer=optimizer, actions=actions, init_std=0.1)


def every_action() -> Actions:
    """All of them, so eager that each does something within ten steps."""
    return Actions(
        qk_clip=QKClip(threshold=0.05),
        revive_dead_experts=ReviveDeadExperts(idle_steps=3, every_n_steps=1),
        freeze_router=FreezeRouter(after_steps=8),
        anticipate_routing=AnticipateRouting(delay=2, num_steps=3, spike_threshold=None),
        rollback=Rollback(every_n_steps=2, keep=4, lookback=4, window=8, spike_threshold=None),
    )


def build(
    losses: AuxiliaryLosses,
    router: RouterFactory = TopKRouter,
    capacity: Capacity | None = None,
    lr: float = 0.0,
    objective: Callable[[BackboneSpec], Objective] = MaskedModelling,
) -> VisionLanguageModule:
    """A small VL-MoE with this router and capacity in every MoE, trained by plain SGD."""
    backbone = small_vl_moe()
    for module in backbone.modules():
        if isinstance(module, MoEFFN):
            module.router = router(32, 4)
            module.capacity = capacity
    return VisionLanguageModule(backbone, objective, losses, optimizer=partial(SGD, lr=lr), init_std=0.3)


class Fit(NamedTuple):
    """points: (step, value) of every metric logged, by key. outputs: of every micro-batch."""

    points: dict[str, list[tuple[int, float]]]
    outputs: list[StepOutput]

    def terms(self, name: str) -> list[Term]:
        """One auxiliary loss in every micro-batch."""
        return [output["report"].auxiliary[name] for output in self.outputs]


def fit(
    module: VisionLanguageModule,
    steps: int,
    *,
    batches: Sequence[Batch] | StepsAhead | None = None,
    accumulate: int = 1,
    ranks: int = 1,
    callbacks: Sequence[Callback] = (),
    save_to: Path | None = None,
    resume_from: Path | None = None,
    **options: Any,
) -> Fit:
    """Train quietly; without batches, on four pairs that are always the same."""
    memory, seen = Memory(), Outputs()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=memory,
        callbacks=[seen, *callbacks],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"log_every_n_steps": 1} | options),
    )
    data = batches if isinstance(batches, StepsAhead) else DataLoader(batches or [pair_batch()] * 4, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return Fit(memory.points, seen.outputs)


def routers(module: VisionLanguageModule) -> dict[str, Tensor]:
    """The weights of every router."""
    return {name: value for name, value in module.state_dict().items() if ".router." in name}
