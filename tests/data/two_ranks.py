"""Run by test_two_ranks.py in two processes: `torchrun --nproc_per_node 2 -m tests.data.two_ranks ROOT FOLDER`.

FOLDER/CASE-RANK.json: the keys of an uninterrupted run, of a run until its checkpoint and of the rest resumed from it,
and hashes of its pixels.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.images.augment import Augment
from lightning_moevlm.data.read.mixture import Source
from tests.data.recording import Seer, quiet_trainer

STOP, STEPS = 5, 24
VALIDATED: dict[str, Any] = {"val_check_interval": 10, "check_val_every_n_epoch": None}


AHEAD: dict[str, Any] = {"decode": "device", "augment": Augment(crop_area=(0.3, 0.9), flip=0.5), "prefetch": 3}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "alone": (False, {}),
    "mixed": (True, {}),
    "ahead": (False, AHEAD),
    "mixed_ahead": (True, {**AHEAD, "num_workers": 2}),
}


def data(root: Path, mixed: bool, options: dict[str, Any]) -> ShardDataModule:
    """One set, or pairs and images of it; a shard of the set is missing, so that ranks lose different samples."""
    sources: dict[str, Source | None] = {"pairs": Source(str(root), 0.6), "images": Source(str(root), 0.4, "image")}
    return ShardDataModule(
        None if mixed else str(root), 4, 32, 16, 400, shuffle_buffer=5, num_streams=2, max_lost_fraction=0.9,
        sources=sources if mixed else None, **options,
    )  # fmt: skip


def fit(root: Path, folder: Path, case: str, **options: Any) -> Seer:
    """Train on this rank."""
    model, resume = Seer(), options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, devices=2, strategy="ddp", max_epochs=-1, **VALIDATED, **options)
    trainer.fit(model, data(root, *CASES[case]), ckpt_path=resume)
    return model


def main(root: Path, folder: Path, rank: int) -> None:
    """Record what this rank sees."""
    for name in CASES:
        whole = fit(root, folder, name, max_steps=STEPS, enable_checkpointing=False)
        saver = ModelCheckpoint(folder, name, every_n_train_steps=STOP, enable_version_counter=False)
        first = fit(root, folder, name, max_steps=STOP, callbacks=[saver])
        rest = fit(root, folder, name, max_steps=STEPS, enable_checkpointing=False, ckpt_path=folder / f"{name}.ckpt")
        found: dict[str, list[Any]] = {
            "whole": whole.seen,
            "validated": whole.validated,
            "first": first.seen,
            "rest": rest.seen,
        }
        found |= {"whole_pixels": whole.pixels, "resumed_pixels": first.pixels + rest.pixels}
        (folder / f"{name}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"]))
