"""Run by test_two_loaders.py, once per rank: `python -m tests.data.two_loaders ROOT FOLDER RANK`.

Without Lightning, so that it starts fast. FOLDER/RANK.json: what the rank has read, and what it was refused.
"""

import json
import sys
import warnings
from pathlib import Path

import torch.distributed as dist

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.data.format.manifest import Split
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.data.read.collate import Collate
from lightning_moevlm.data.read.evaluation_reader import FixedReader
from lightning_moevlm.data.read.mixture import Mixture, Source, StepClock
from lightning_moevlm.data.read.sample_order import Rank
from lightning_moevlm.data.read.source_stream import OpenSource
from lightning_moevlm.data.read.train_reader import TrainReader
from lightning_moevlm.data.storage.shard_storage import ShardStorage

BATCH_SIZE, NUM_STREAMS = 4, 2


def main(root: str, folder: Path, rank: Rank) -> None:
    """Read an epoch of both splits, resume in the middle, and ask for what is too much."""
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank.index, world_size=rank.world_size)
    storage = ShardStorage(root)
    manifest = storage.read_manifest()
    collate = Collate(("jpg", "txt"), storage.read_tokenizer(manifest.tokenizer), 32, 16)

    def source(split: Split) -> OpenSource:
        return OpenSource("scenes", storage, manifest.splits[split], collate)

    def train(batch_size: int = BATCH_SIZE, num_streams: int = NUM_STREAMS) -> ShardLoader:
        mixture = Mixture((Source(root), Source(root)) if num_streams > 50 else (Source(root),))
        sources = (source("train"),) * len(mixture.sources)
        reader = TrainReader(sources, mixture, batch_size, rank, 5, 0, num_streams, StepClock(5), tolerant=False)
        return ShardLoader(reader, 0)

    def refusal(batch_size: int, num_streams: int) -> str:
        try:
            train(batch_size, num_streams)
        except UserError as error:
            return str(error)
        return ""

    loader = train()
    keys, state = [], None
    for batch in loader:
        keys.append(batch.keys)
        if len(keys) == 5:
            state = loader.state_dict()  # all ranks together
    resumed = train()
    assert state is not None
    resumed.load_state_dict(state)
    rest = [batch.keys for batch in resumed]
    fixed = FixedReader((source("val"),), BATCH_SIZE, rank, NUM_STREAMS, tolerant=True)
    validated = [batch.keys for batch in ShardLoader(fixed, 0, max_lost_fraction=0.5)]
    dist.barrier()
    found = {
        "train": keys,
        "rest": rest,
        "validated": validated,
        "refusals": [refusal(61, NUM_STREAMS), refusal(BATCH_SIZE, 61)],
        "ranks_in_state": sorted(state["ranks"]),
    }
    (folder / f"{rank.index}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]), Rank(int(sys.argv[3]), 2))
