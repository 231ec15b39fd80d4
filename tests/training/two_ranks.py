"""Run by test_actions_fit.py in two processes: trains with every action on and says whether the ranks agree."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moevlm.training import VisionLanguageModule
from tests.small_model import pair_batch
from tests.training.small_fit import Poison, every_action, fit, tiny_module


class Agreement(Callback):
    """Compares parameters, buffers and the optimiser's state with those of the other rank.

    Actions come after this callback, so each batch sees what the ones before it did.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, VisionLanguageModule)
        states = list(pl_module.state_dict().values())
        states += [v for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, Tensor)]
        for state in states:
            mine = torch.nan_to_num(state.detach().double(), nan=7.0, posinf=8.0, neginf=9.0)
            largest = mine.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(mine, op=dist.ReduceOp.MIN)
            assert torch.equal(largest, mine), f"the ranks differ after step {trainer.global_step}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)


def main(target: Path) -> None:
    module = tiny_module(every_action(), lr=1e-2)
    batches = [pair_batch(seed=seed) for seed in range(40)]  # Lightning deals them out to the ranks
    callbacks = [Poison(at_step=6), Agreement()]
    points = fit(module, 10, batches=batches, callbacks=callbacks, ranks=2, strategy="ddp", accumulate=2).points
    if module.global_rank == 0:
        target.write_text(json.dumps(points))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
