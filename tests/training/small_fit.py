"""A few steps of training in this process: a small model, a list of batches, no files."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_moevlm.dispatch import Capacity
from lightning_moevlm.layers import MoEFFN
from lightning_moevlm.losses import AuxiliaryLosses
from lightning_moevlm.models import Backbone, BackboneSpec
from lightning_moevlm.objectives import MaskedModelling, Objective
from lightning_moevlm.records import Batch, ObjectiveOutput, Term
from lightning_moevlm.routers import Router, TopKRouter
from lightning_moevlm.training import StepOutput, VisionLanguageModule
from tests.small_model import small_vl_moe

RouterFactory = Callable[[int, int], Router]


class NoTask(Objective):
    """Runs pairs through the backbone and asks nothing of them: what trains are the losses on routing.

    Nothing is masked, so that parts of a batch are routed as they are within the whole.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.num_classes = {}

    def forward(self, backbone: Backbone, batch: Batch, generator: torch.Generator) -> ObjectiveOutput:
        output = backbone(batch.images_BRYX, batch.text_BL, batch.text_mask_BL)
        return ObjectiveOutput({"none": Term(0.0 * output.tokens_BSD.sum(), 1.0)}, {}, output.plans, 0)


class Reports(Callback):
    """Keeps the terms and the plans of every micro-batch."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        self.outputs.append(StepOutput(**outputs))

    def terms(self, name: str) -> list[Term]:
        return [output["report"].auxiliary[name] for output in self.outputs]


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


def fit(
    module: VisionLanguageModule,
    batches: Sequence[Batch],
    *,
    steps: int,
    accumulate: int = 1,
    callbacks: Sequence[Callback] = (),
    resume: Path | None = None,
    ranks: int = 1,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
) -> Reports:
    """Train quietly on a list of batches."""
    reports = Reports()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        precision=precision,
        strategy="ddp_find_unused_parameters_true" if ranks > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[reports, *callbacks],
    )
    trainer.fit(module, DataLoader(list(batches), batch_size=None), ckpt_path=resume)
    return reports


def routers(module: VisionLanguageModule) -> dict[str, Tensor]:
    """The weights of every router."""
    return {name: value for name, value in module.state_dict().items() if ".router." in name}
