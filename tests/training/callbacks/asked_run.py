"""A short run of a small model whose switches are asked for their proofs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.dispatch import Capacity
from lightning_moevlm.model.experts import FreeExperts
from lightning_moevlm.model.layers import ModelStabilisers
from lightning_moevlm.model.losses import AuxiliaryLosses
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.callbacks import Liveness
from tests.small_model import pair_batch, small_vl_moe
from tests.training.small_fit import Memory

NO_LOSSES = AuxiliaryLosses(None, None)


class Tagged(Memory):
    """Remembers tags too."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, str] = {}

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.tags |= tags


def module_of(
    losses: AuxiliaryLosses = NO_LOSSES,
    router: Callable[[int, int], Any] | None = None,
    stabilisers: ModelStabilisers = ModelStabilisers(),
    capacity: Capacity | None = None,
    free: Callable[[int], FreeExperts] | None = None,
    **options: Any,
) -> VisionLanguageModule:
    is_gated = stabilisers.glu is not None
    backbone = small_vl_moe(router=router, stabilisers=stabilisers, capacity=capacity, is_gated=is_gated, free=free)
    return VisionLanguageModule(
        backbone, losses=losses, **({"optimizer": partial(AdamW, lr=1e-3), "init_std": 0.1} | options)
    )


def asked(
    module: VisionLanguageModule,
    steps: int = 1,
    callback: Liveness | None = None,
    logger: Tagged | None = None,
    others: Sequence[Callback] = (),
    **options: Any,
) -> tuple[dict[str, str], dict[str, list[tuple[int, float]]]]:
    """Train and return the tags of the run, by switch, and its points."""
    logger = logger or Tagged()
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=logger,
        callbacks=[*others, callback or Liveness(every_n_steps=1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"devices": 1} | options),
    )
    trainer.fit(module, DataLoader([pair_batch()] * 4, batch_size=None))  # type: ignore[arg-type]
    return {tag.removeprefix("receipt/"): text for tag, text in logger.tags.items()}, logger.points


def refused(module: VisionLanguageModule, switch: str, *words: str, steps: int = 1, **options: Any) -> None:
    """The run ends by a message that names the switch, with these words, and its receipt says dead; no other does."""
    logger = Tagged()
    with pytest.raises(UserError) as raised:
        asked(module, steps, logger=logger, **options)
    told = str(raised.value)
    assert told.startswith(f"{switch} is dead ")
    for word in words:
        assert word in told
    assert [tag for tag, text in logger.tags.items() if text.startswith("dead: ")] == [f"receipt/{switch}"]
