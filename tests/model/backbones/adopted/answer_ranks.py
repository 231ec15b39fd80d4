"""Trains adopted models on two ranks, `torchrun --nproc_per_node 2 -m tests.model.backbones.adopted.answer_ranks FILE`.

It saves what rank 0 has after three steps: every trained parameter and every balancing bias.
"""

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.data.text.chat import ChatMaker, ChatOptions
from lightning_moevlm.model.backbones import LoRA
from lightning_moevlm.model.losses import AuxiliaryLosses, LoadBalance
from lightning_moevlm.model.objectives import NextToken
from lightning_moevlm.model.routers import SigmoidBiasRouter
from lightning_moevlm.training import VisionLanguageModule
from tests.model.backbones.adopted.small_chat import QWEN_CHAT, batch_of, make_chats, qwen_processor
from tests.model.backbones.adopted.small_hugging_face import small_hugging_face
from tests.small_model import uneven_batch
from tests.training.small_fit import fit

BALANCES = {
    "none": AuxiliaryLosses(None, None),
    "pooled": AuxiliaryLosses(LoadBalance(0.5, scope="global"), None),
    "per_modality": AuxiliaryLosses(LoadBalance(0.5, scope="global", per_modality=True), None),
}
"""Losses of ablations/adopted_qwen3_vl_moe.yaml, over the batch of all ranks; `theirs` is the mean over ranks."""


def trained(batch: Batch, start: int, stop: int, ranks: int, balance: str, **options: Any) -> dict[str, Tensor]:
    """Train on some samples of a batch."""
    rule = partial(SigmoidBiasRouter, top_k=2, score="softmax", update_rate=0.1)
    backbone = small_hugging_face(QWEN_CHAT, router=rule if balance == "loss_free" else None, **options)
    module = VisionLanguageModule(
        backbone, NextToken, losses=BALANCES.get(balance, BALANCES["none"]),
        optimizer=partial(SGD, lr=0.1), seed=0,
    )  # fmt: skip
    strategy = "ddp_find_unused_parameters_true" if ranks > 1 else "auto"
    batches = [batch.select(range(start, stop))] * 3
    fit(module, 3, batches=batches, ranks=ranks, strategy=strategy)  # signs may cancel in 2
    return {name: value.detach().clone() for name, value in module.state_dict().items() if value.is_floating_point()}


def results(rank: int, ranks: int) -> Mapping[str, Mapping[str, Tensor]]:
    """Train on this rank's part of two batches: texts of all lengths, and conversations about images of three sizes."""
    texts = uneven_batch(8)
    with tempfile.TemporaryDirectory() as folder:
        maker = ChatMaker(ChatOptions(folder))
        maker.__dict__["processor"] = qwen_processor(Path(folder))
        made = make_chats(maker)
    chats = batch_of([*made, made[0]])
    # of two ranks the first has three texts and one conversation, the second has the others
    of_texts, of_chats = ((0, 8), (0, 4)) if ranks == 1 else (((0, 3), (0, 1)), ((3, 8), (1, 4)))[rank]
    found = {f"texts, {name}": trained(texts, *of_texts, ranks, name) for name in (*BALANCES, "loss_free")}
    found |= {f"chats, {name}": trained(chats, *of_chats, ranks, name) for name in ("per_modality", "loss_free")}
    tuned = {"lora": LoRA(rank=2), "gradient_checkpointing": True}
    return found | {"chats, per_modality, adapters": trained(chats, *of_chats, ranks, "per_modality", **tuned)}


if __name__ == "__main__":
    import os

    rank = int(os.environ["RANK"])
    found = results(rank, int(os.environ["WORLD_SIZE"]))
    if rank == 0:
        torch.save(found, sys.argv[1])
