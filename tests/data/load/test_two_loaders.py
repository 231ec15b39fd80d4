"""Two real processes, joined by gloo, read one set: the fast part of what test_two_ranks.py does with a Trainer."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lightning_moevlm.data.format.manifest import read_manifest
from tests.data.rewrite import spoil_first
from tests.data.two_loaders import BATCH_SIZE, NUM_STREAMS


def test_two_ranks_read_one_set(scenes_copy: Path, tmp_path: Path) -> None:
    # 12 samples to evaluate on in one shard, 2 ranks x 2 streams, 2 batches of 3 a rank; the first batch keeps one
    spoil_first(scenes_copy, "val", 2)
    command = [sys.executable, "-m", "tests.data.two_loaders", str(scenes_copy), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in range(2)]
    for process in ranks:
        _, printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed.decode()[-3000:]
    found: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text("utf-8")) for rank in range(2)]

    # training: 120 samples are 15 whole batches on either rank, no sample on both
    for rank in found:
        assert [len(keys) for keys in rank["train"]] == [BATCH_SIZE] * 15
        assert rank["rest"] == rank["train"][5:] and rank["ranks_in_state"] == [0, 1]
    assert len({key for rank in found for keys in rank["train"] for key in keys}) == 120

    # validation: equally many steps, none empty, each sample that can be read once, though one shard must do for all
    manifest = read_manifest(scenes_copy)
    assert len(manifest.splits["val"]) == 1 < 2 * NUM_STREAMS
    assert [[len(keys) for keys in rank["validated"]] for rank in found] == [[1, 3], [3, 3]]
    times = Counter(key for rank in found for keys in rank["validated"] for key in keys)
    assert len(times) == manifest.num_samples("val") - 2 and set(times.values()) == {1}

    # too few samples for ranks and batches, or for ranks and streams, are told before anything is read
    for rank in found:
        assert "has 120 training samples, less than batch_size 61 on each of 2 ranks" in rank["refusals"][0]
        assert "120 training samples, less than one for each of 2 ranks x 61 streams" in rank["refusals"][1]
