"""A training process killed again and again sees every sample of every epoch exactly once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.data.soak import data

KILLS, EPOCHS, BATCHES = 20, 4, 60


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_20_moments_and_resumed(scenes_root: Path, tmp_path: Path) -> None:
    random, log = Random(4), tmp_path / "steps.log"
    kills: list[str] = []
    while len(kills) < KILLS:
        process = _start(scenes_root, tmp_path, random.choice([0, 0, 1, 2]))
        seen = _num_lines(log)
        wait_for = seen + random.randint(1, 14)  # lines, so that a slow machine is killed in training as well
        while process.poll() is None and _num_lines(log) < wait_for:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))  # in the middle of a step, of a checkpoint, of an epoch's end
        assert process.poll() is None, "the run ended before it was killed often enough: make it longer"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills.append(log.read_text(encoding="utf-8").splitlines()[-1].split()[0])
    assert _start(scenes_root, tmp_path, 0).wait(timeout=300) == 0

    steps: dict[int, list[str]] = {}
    thrown_away = 0
    for line in log.read_text(encoding="utf-8").splitlines():
        first, *keys = line.split()
        if first == "resume":
            thrown_away += sum(step > int(keys[0]) for step in steps)
            steps = {step: seen_keys for step, seen_keys in steps.items() if step <= int(keys[0])}
        else:
            assert int(first) not in steps
            steps[int(first)] = keys
    print(f"killed after steps {', '.join(kills)}; {thrown_away} steps done twice")
    assert list(steps) == list(range(1, EPOCHS * BATCHES + 1))
    assert thrown_away > 0, "every kill came right after a checkpoint: a bad test"
    stored = set(steps[1]).union(*(steps[step] for step in range(1, BATCHES + 1)))
    assert len(stored) == 120
    loader = data(scenes_root, 0).train_dataloader()
    for epoch in range(EPOCHS):
        keys = [key for step in range(epoch * BATCHES + 1, (epoch + 1) * BATCHES + 1) for key in steps[step]]
        assert len(keys) == 120 and set(keys) == stored, "every sample exactly once"
        assert keys == [key for batch in loader for key in batch.keys], "in the order of an uninterrupted run"


def _start(root: Path, folder: Path, num_workers: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.data.soak", str(root), str(folder)]
    command += [str(EPOCHS * BATCHES), str(num_workers)]
    with (folder / "output.log").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _num_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0
