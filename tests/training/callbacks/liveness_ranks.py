"""Run by test_liveness_ranks.py in two processes: receipts of two ranks, then a switch that is dead on one of them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance, LossInput
from lightning_moevlm.model.objectives import Contrastive
from lightning_moevlm.training.callbacks import Liveness
from tests.training.callbacks.asked_run import asked, module_of


@dataclass(frozen=True)
class DetachedOnRank1(LoadBalance):
    """Reaches routers on rank 0 alone."""

    def sums(self, inputs: LossInput) -> Tensor:
        if dist.get_rank() == 0:
            return super().sums(inputs)
        return super().sums(inputs._replace(plan=inputs.plan.detach())).requires_grad_()


def main(folder: Path) -> None:
    options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2}
    sound = module_of(AuxiliaryLosses(LoadBalance(scope="global")))
    receipts, points = asked(sound, 2, Liveness(every_n_steps=1), **options)
    contrasted = module_of(objective=Contrastive)
    contrast, _ = asked(contrasted, 2, Liveness(every_n_steps=1), **options)
    told = ""
    try:
        asked(module_of(AuxiliaryLosses(DetachedOnRank1(), None)), 2, Liveness(), **options)
    except UserError as error:
        told = str(error)
    found = {"receipts": receipts, "points": points, "told": told, "contrast": contrast}
    (folder / f"rank{sound.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
