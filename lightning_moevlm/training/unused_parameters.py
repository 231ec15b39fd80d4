"""Lets ranks train if a batch does not reach every parameter, and names the parts without a gradient.

DDP waits for the gradient of every parameter. Texts alone give none to the image experts, images alone none to the text
head, and a term without a weight none to its own parameters. DDP must then search for unused parameters in every step
(PyTorch's `find_unused_parameters`). A parameter that no rank reaches keeps no gradient and is not updated, as in a
single process. If every batch holds pairs and every term has a weight, the search is spared.
"""

import re

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.model.objectives import Objective
from lightning_moevlm.training.checks.trainer_checks import SHARDING


class UnusedParameters(Callback):
    """Added by `VisionLanguageModule`; not meant to be configured.

    Args:
        objective: knows whether pairs reach every parameter.
    """

    def __init__(self, objective: Objective) -> None:
        self._pairs_reach_all = objective.pairs_reach_all
        self._has_reported = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make DDP search for unused parameters if there may be some and the user has not decided."""
        strategy = trainer.strategy
        if stage != "fit" or not isinstance(strategy, DDPStrategy) or self._reaches_all(trainer):
            return
        options = strategy._ddp_kwargs  # Lightning reads it when it wraps the model, and offers no other way by then
        if not options.keys() & {"find_unused_parameters", "static_graph"}:
            options["find_unused_parameters"] = True
            rank_zero_info("DDP searches for unused parameters, because a batch may lack a modality or a term")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Name, once, the parts without a gradient in the first step."""
        if self._has_reported or isinstance(trainer.strategy, SHARDING):
            return
        self._has_reported = True
        parts = parts_without_gradient(pl_module)
        if parts:
            rank_zero_info(f"no gradient in the first step: {', '.join(parts)}")

    def _reaches_all(self, trainer: Trainer) -> bool:
        data: object = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets, but declares it not
        is_pairs = isinstance(data, ShardDataModule) and all(each.gives_pairs for each in data.sets.values())
        return is_pairs and self._pairs_reach_all


def parts_without_gradient(module: nn.Module) -> list[str]:
    """Return the largest parts whose trained parameters all lack a gradient; `*` stands for numbers."""
    has = {name: each.grad is not None for name, each in module.named_parameters() if each.requires_grad}
    parts: list[str] = []
    for path in (*(name for name, _ in module.named_modules() if name), *has):
        within = [value for name, value in has.items() if name == path or name.startswith(f"{path}.")]
        if within and not any(within) and not any(path.startswith(f"{part}.") or path == part for part in parts):
            parts.append(path)
    return list(dict.fromkeys(re.sub(r"\.\d+", ".*", part) for part in parts))
