"""`moevlm bench step --beside N`: a training step on a quiet machine and beside busy processes.

A process of T threads on C cores beside N busy threads gets C T / (T + N) cores from a fair scheduler, at most T. Time
beyond that is lost to threads that spin while they wait, at the end of every parallel region. So the step is timed in
two processes: one waits as `moevlm` sets it (OMP_WAIT_POLICY, GOMP_SPINCOUNT), one as torch does by default.
"""

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from lightning_moevlm.bench.timing import Seconds, best, ratio
from lightning_moevlm.common.process_tuning import count_usable_cores, keep_memory, wait_policy

MOEVLM_WAIT, TORCH_WAIT, QUIET = "waiting as moevlm sets it", "waiting as torch does by default", "quiet"
STEPS = 10
_WARM_UP = 3
_BUSY = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):  # ends with its parent, however that ends
    for _ in range(100_000):
        pass
"""
_STEPPER = "from lightning_moevlm.bench.busy_machine import serve_steps; serve_steps({threads})"
Stepper = Callable[[int], float]
"""Trains a number of steps and returns the mean seconds of one."""


class LoadTimes(NamedTuple):
    """Times of a step, quiet and beside busy processes.

    seconds: one per round, by name of the row.
    busy: number of busy threads, by name of the row.
    threads: threads of torch.
    cores: usable cores.
    """

    seconds: Seconds
    busy: Mapping[str, int]
    threads: int
    cores: int

    def fair_cores(self, name: str) -> float:
        """Return the cores that a fair scheduler gives the process in a row."""
        return min(self.threads, self.cores * self.threads / (self.threads + self.busy[name]))

    def over_fair_share(self, name: str) -> float:
        """Return the time of a row over that of the faster quiet row, scaled to the fair cores."""
        quiet = min((each for each, busy in self.busy.items() if not busy), key=lambda each: best(self.seconds[each]))
        fair_slowdown = self.fair_cores(quiet) / self.fair_cores(name)
        return ratio(self.seconds, name, quiet).fairest / fair_slowdown

    def records(self) -> list[dict[str, object]]:
        """Return one record per row, as `--json` writes them."""
        return [
            {
                "bench": "step",
                "impl": name,
                "median_ms": round(1e3 * statistics.median(times), 3),
                "rounds": len(times),
                "threads": self.threads,
                "cores": self.cores,
                "busy": self.busy[name],
                "fair_cores": self.fair_cores(name),
                "over_fair_share": round(self.over_fair_share(name), 3),
            }
            for name, times in self.seconds.items()
        ]


def measure_load(
    steppers: Mapping[str, Stepper], threads: int, busy: int, rounds: int, tick: Callable[[], None]
) -> LoadTimes:
    """Time every stepper quiet and beside busy processes, in each round; tick after each time."""
    order = random.Random(0)
    number_busy = {_row(wait, each): each for each in (0, busy) for wait in steppers}
    seconds: dict[str, list[float]] = {name: [] for name in number_busy}
    for _ in range(rounds):
        for each in (0, busy):
            with busy_processes(each):
                for wait in order.sample(list(steppers), len(steppers)):
                    seconds[_row(wait, each)].append(steppers[wait](STEPS))
                    tick()
    return LoadTimes(seconds, number_busy, threads, count_usable_cores())


def _row(wait: str, busy: int) -> str:
    return f"{wait}, {f'beside {busy} busy' if busy else QUIET}"


@contextmanager
def busy_processes(number: int) -> Iterator[list[int]]:
    """Run processes of one busy thread each, and give their ids; they end with this process."""
    with ExitStack() as stack:
        started = []
        for _ in range(number):
            command = [sys.executable, "-S", "-c", _BUSY, str(os.getpid())]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it is at work
        yield [process.pid for process in started]


@contextmanager
def stepper_processes(threads: int) -> Iterator[dict[str, Stepper]]:
    """Start a process per wait policy; each is ready to train, and idle until it is called."""
    ours = {**os.environ, **wait_policy(os.environ)}
    default = {name: value for name, value in os.environ.items() if name not in wait_policy({})}
    with ExitStack() as stack:
        yield {
            wait: stack.enter_context(_stepper(threads, env))
            for wait, env in ((MOEVLM_WAIT, ours), (TORCH_WAIT, default))
        }


@contextmanager
def _stepper(threads: int, env: dict[str, str]) -> Iterator[Stepper]:
    command = [sys.executable, "-c", _STEPPER.format(threads=threads)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def train(steps: int) -> float:
            print(steps, file=stdin, flush=True)
            return float(stdout.readline())

        train(_WARM_UP)
        try:
            yield train
        finally:
            process.kill()


def serve_steps(threads: int) -> None:
    """Train the number of steps in each line of standard input, and answer the mean seconds of one."""
    import torch

    from lightning_moevlm.bench.training_step import bare_step, pair_batch, quickstart_module

    keep_memory()
    torch.set_num_threads(threads)
    step = bare_step(quickstart_module(), [pair_batch(32, seed) for seed in range(4)])
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        sys.stdout.write(f"{(time.perf_counter() - start) / int(line)}\n")
        sys.stdout.flush()
