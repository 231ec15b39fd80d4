"""A step beside busy processes: the fair share by hand, and processes that end with the bench."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from lightning_moevlm.bench import busy_machine
from lightning_moevlm.bench.busy_machine import LoadTimes, busy_processes, measure_load, serve_steps
from lightning_moevlm.bench.goals import load_verdicts

OURS, TORCH = busy_machine.MOEVLM_WAIT, busy_machine.TORCH_WAIT


def test_fair_share_by_hand() -> None:
    # 2 threads on 2 cores beside 2 busy ones: 2 * 2 / 4 = 1 core, so twice the time of the quiet step is fair
    names = f"{OURS}, quiet", f"{TORCH}, quiet", f"{OURS}, beside 2 busy", f"{TORCH}, beside 2 busy"
    seconds = {name: [time] * 3 for name, time in zip(names, (1.1, 1.0, 2.2, 18.0), strict=True)}
    times = LoadTimes(seconds, dict(zip(names, (0, 0, 2, 2), strict=True)), threads=2, cores=2)
    assert [times.fair_cores(name) for name in names] == [2, 2, 1, 1]
    assert [round(times.over_fair_share(name), 2) for name in names] == [1.1, 1.0, 1.1, 9.0]
    assert [(each.figure, each.met) for each in load_verdicts(times)] == [(1.1, True), (1.1, True)]
    slow = times._replace(seconds=seconds | {names[2]: [2.6] * 3})
    assert [each.met for each in load_verdicts(slow)] == [True, False]
    # 1 thread on 4 cores beside 2 has a core of its own; 4 threads beside 4 have 4 * 4 / 8
    assert times._replace(threads=1, cores=4).fair_cores(names[2]) == 1
    assert LoadTimes(seconds, {names[2]: 4}, threads=4, cores=4).fair_cores(names[2]) == 2


def test_each_round_times_both_ways_quiet_and_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[int] = []

    @contextmanager
    def counted(number: int) -> Iterator[list[int]]:
        at_work.append(number)
        yield []
        at_work.pop()

    seen: Counter[tuple[str, int, int]] = Counter()

    def stepper(wait: str, steps: int) -> float:
        seen[wait, steps, at_work[-1]] += 1
        return 0.5

    monkeypatch.setattr(busy_machine, "busy_processes", counted)
    steppers = {wait: partial(stepper, wait) for wait in (OURS, TORCH)}
    times = measure_load(steppers, threads=2, busy=3, rounds=2, tick=lambda: None)
    assert seen == {(wait, busy_machine.STEPS, busy): 2 for wait in (OURS, TORCH) for busy in (0, 3)}
    assert [record["busy"] for record in times.records()] == [0, 0, 3, 3]
    assert all(record["rounds"] == 2 and record["median_ms"] == 500 for record in times.records())


def _is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_busy_processes_end_with_the_block() -> None:
    with busy_processes(2) as processes:
        assert len(set(processes)) == 2 and all(map(_is_running, processes))
    assert not any(map(_is_running, processes))


def test_busy_processes_end_with_a_bench_that_is_killed() -> None:
    code = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-S', '-c', sys.argv[1], str(os.getpid())]\n"
        "busy = subprocess.Popen(command, stdout=subprocess.DEVNULL)\n"
        "print(busy.pid, flush=True); input()"
    )
    command = [sys.executable, "-S", "-c", code, busy_machine._BUSY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bench:
        assert bench.stdout is not None
        busy = int(bench.stdout.readline())
        assert _is_running(busy)
        os.kill(bench.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while _is_running(busy) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _is_running(busy)


def test_a_stepper_answers_each_line_with_seconds_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_moevlm.bench import training_step

    monkeypatch.setattr(training_step, "quickstart_module", training_step.small_module)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    serve_steps(threads=1)
    first, second = map(float, capsys.readouterr().out.split())
    assert first > 0 and second > 0


@pytest.mark.slow
def test_the_command_times_both_ways_quiet_and_beside(
    moevlm: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    moevlm("bench", "step", "--beside", "1", "--rounds", "1", "--threads", "1", "--json", "step.json")
    records = json.loads(Path("step.json").read_text())
    assert [record["impl"] for record in records] == [
        f"{wait}, {load}" for load in ("quiet", "beside 1 busy") for wait in (OURS, TORCH)
    ]
    assert all(record["over_fair_share"] > 0 and record["threads"] == 1 for record in records)
    assert "is 0: give at least 1 busy process" in moevlm("bench", "step", "--beside", "0", code=2)
    assert "--device is cuda" in moevlm("bench", "step", "--beside", "1", "--device", "cuda", code=2)
