"""A Lightning fit of the small VL-MoE on batches in memory, with a logger that remembers, and faults to inject."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from lightning_moevlm.layers import ModelStabilisers
from lightning_moevlm.records import Batch
from lightning_moevlm.routers import Router
from lightning_moevlm.training import Actions, StepOutput, VisionLanguageModule
from lightning_moevlm.training.actions import FreezeRouter, QKClip, ReviveDeadExperts, Rollback
from tests.small_model import pair_batch, small_vl_moe


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
    """The total loss of every micro-batch, and whether the backbone was asked for attention logits."""

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
        rollback=Rollback(every_n_steps=2, keep=4, lookback=4, window=8, spike_threshold=None),
    )


def fit(
    module: VisionLanguageModule,
    steps: int,
    *,
    batches: Sequence[Batch] | None = None,
    callbacks: Sequence[Callback] = (),
    save_to: Path | None = None,
    resume_from: Path | None = None,
    **options: Any,
) -> dict[str, list[tuple[int, float]]]:
    """Train and return what was logged; without batches, four pairs that are always the same."""
    memory = Memory()
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=memory,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"devices": 1, "log_every_n_steps": 1} | options),
    )
    data = DataLoader(batches or [pair_batch()] * 4, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return memory.points
