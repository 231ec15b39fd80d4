"""Shows a running sweep: one lasting line per run that ends, and on a terminal a moving line below.

Without a terminal (a log file, CI) only the lasting lines are written, so nothing repeats.
"""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from lightning_moevlm.common.durations import format_duration
from lightning_moevlm.study.plan.planned_run import PlannedRun
from lightning_moevlm.study.run.ledger import RunState, Status

STYLES = {Status.FINISHED: "green", Status.DIVERGED: "yellow", Status.FAILED: "red", Status.STOPPED: "yellow"}
_REFRESH_SECONDS = 1.0
_LONGEST = 200  # characters of a crashed run's log line; the report has it whole


class SweepProgress:
    """Shows a sweep; a `Watcher`.

    Args:
        console: The terminal or log.
        total: Runs of the study.
        done: Runs that already have a result.
        jobs: Processes at once.
    """

    def __init__(self, console: Console, total: int, done: int, jobs: int) -> None:
        self._console = console
        self._total = total
        self._done = done
        self._jobs = jobs
        self._running: dict[str, float] = {}
        self._seconds: list[float] = []
        self._shown = 0.0
        # Refreshed by hand: no thread of its own beside the forks.
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=total, completed=done, left="")

    def __enter__(self) -> "SweepProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def run_started(self, run: PlannedRun, state: RunState) -> None:
        """Show that a run has begun."""
        self._running[run.name] = time.time()
        again = f" (attempt {state.attempts})" if state.attempts > 1 else ""
        if not self._console.is_terminal:
            self._console.print(f"start  {run.name}{again}", highlight=False)
        self._refresh()

    def run_ended(self, run: PlannedRun, state: RunState) -> None:
        """Leave a line for a run that has ended."""
        self._running.pop(run.name, None)
        self._done += 1
        seconds = state.seconds or 0.0
        self._seconds.append(seconds)
        word = f"[{STYLES[state.status]}]{state.status}[/]"
        why = f": {escape(state.reason)}" if state.reason else ""
        left = f", {self._left()}" if self._left() else ""
        width = len(str(self._total))
        line = f"{self._done:>{width}}/{self._total}  {run.name} {word} after {format_duration(seconds)}{why}{left}"
        self._console.print(line, highlight=False, soft_wrap=True)
        if state.status is Status.FAILED and state.exit_code != 2:  # 2: the reason says it all
            for line in state.log_tail[-3:]:
                self._console.print(Text(f"      {line[:_LONGEST]}", style="dim"), soft_wrap=True)
        self._refresh()

    def tick(self) -> None:
        """Refresh the moving line, once a second."""
        if time.time() - self._shown >= _REFRESH_SECONDS:
            self._refresh()

    def show(self, line: str) -> None:
        """Leave a line on the sweep itself."""
        self._console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        """Return the remaining time, from the mean of the runs so far: they share one budget."""
        rest = self._total - self._done
        if not rest or not self._seconds:
            return ""
        return f"about {format_duration(rest * sum(self._seconds) / len(self._seconds) / min(self._jobs, rest))} left"

    def _refresh(self) -> None:
        self._shown = time.time()
        names = ", ".join(f"{name} {format_duration(self._shown - since)}" for name, since in self._running.items())
        self._bar.update(self._task, completed=self._done, description=names or "runs", left=self._left())
        self._bar.refresh()
