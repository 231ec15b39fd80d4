"""Two real processes that exchange gradients and states by gloo: who reads what, and where both go on."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_moevlm.data.format.manifest import read_manifest
from tests.data.two_ranks import CASES, STEPS, STOP

Keys = Any
"""A list of batches, each a list of keys, or a list of hashes."""


@pytest.fixture(scope="module")
def found(scenes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Keys]]]:
    """What each rank saw, by case."""
    import shutil

    folder = tmp_path_factory.mktemp("ranks")
    root = Path(shutil.copytree(scenes_root, folder / "scenes"))
    (root / "train-000003.tar").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.data.two_ranks", str(root), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    return {case: [read(folder / f"{case}-{rank}.json") for rank in range(2)] for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_ranks_have_equally_many_whole_batches_and_share_no_sample_of_an_epoch(
    found: dict[str, list[dict[str, Keys]]], case: str
) -> None:
    ranks = found[case]
    for rank in ranks:
        assert [len(batch) for batch in rank["whole"]] == [4] * STEPS
    if case in ("alone", "ahead"):
        # 120 samples, 2 ranks, batches of 4: 15 a rank. 16 samples are lost, and filled up with a rank's own
        epoch = [{key for batch in rank["whole"][:15] for key in batch} for rank in ranks]
        assert not epoch[0] & epoch[1]
        assert len(epoch[0] | epoch[1]) == 104


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_every_rank_resumes_at_its_place(found: dict[str, list[dict[str, Keys]]], case: str) -> None:
    # ranks have lost different samples by then, so one rank's place is not the other's
    for rank in found[case]:
        assert rank["first"] == rank["whole"][:STOP]
        assert rank["rest"] == rank["whole"][STOP:]
        assert rank["resumed_pixels"] == rank["whole_pixels"]


@pytest.mark.slow
def test_preparing_ahead_changes_pixels_but_not_the_order(found: dict[str, list[dict[str, Keys]]]) -> None:
    for plain, ahead in (("alone", "ahead"), ("mixed", "mixed_ahead")):
        for rank, other in zip(found[plain], found[ahead], strict=True):
            assert rank["whole"] == other["whole"] and rank["validated"] == other["validated"]
            assert not set(rank["whole_pixels"]) & set(other["whole_pixels"])


@pytest.mark.slow
def test_validation_is_whole_over_ranks(found: dict[str, list[dict[str, Keys]]], scenes_root: Path) -> None:
    for ranks in found.values():
        assert len(ranks[0]["validated"]) == len(ranks[1]["validated"])
        seen = Counter(key for rank in ranks for batch in rank["validated"] for key in batch)
        assert len(seen) == read_manifest(scenes_root).num_samples("val")
        assert len(set(seen.values())) == 1, "every validation of the run sees every sample once"
