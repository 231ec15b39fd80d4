"""Carries the cure studies of a folder through: train what is missing, draw the matrix, repeat some of its cells.

One command does all of it and resumes: finished studies are skipped, healthy runs that another study has trained are
taken, and the strongest cells are chosen anew only from complete studies, so the choice stays. Cells that their study
has named beforehand are repeated in any case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_moevlm.common.atomic_files import explain_write_errors
from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.shipped_files import find_folder
from lightning_moevlm.study import sweep
from lightning_moevlm.study.declare.study_file import read_study
from lightning_moevlm.study.plan.plan_study import plan_study
from lightning_moevlm.study.plan.planned_run import Plan
from lightning_moevlm.study.plan.selection import keep_seeds
from lightning_moevlm.study.run.ledger import read_ledger
from lightning_moevlm.study.run.mlflow_runs import find_tracking_uri, open_experiment
from lightning_moevlm.study.sweep import Builders

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.matrix.records import Matrix, Row

RunStudy = Callable[[Plan, Sequence[str]], int]
"""Trains the missing runs of a plan, or the part of them that a selection names; returns an exit code."""

_STOPPED = 130


@dataclass(frozen=True)
class CureFolder:
    """The planned studies of a folder."""

    folder: str  # as the command takes it
    plans: tuple[Plan, ...]  # in the order of the files' names
    only: tuple[str, ...] = ()  # selects the runs to train; the matrix is of the selected seeds

    @property
    def name(self) -> str:
        """Name of the folder."""
        return Path(self.folder).name


def is_folder(path: str) -> bool:
    """Whether a study file is a folder, of this place or shipped."""
    return find_folder(Path(path)) is not None


def plan_folder(path: str, builders: Callable[[], Builders], only: Sequence[str] = ()) -> CureFolder:
    """Read and plan the cure studies of a folder.

    Args:
        path: The folder.
        builders: Functions of the folders above.
        only: Runs to train and to draw, `arm=NAME[,NAME]` or `seed=NUMBER[,NUMBER]`.

    Raises:
        UserError: There is no such folder or no study in it, one of them has another design, or cannot be planned.
    """
    folder = find_folder(Path(path))
    if folder is None:
        raise UserError(f"there is no folder {path}; give one that holds cure studies, such as ablations/cures")
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"{path} holds no study; put cure studies there, NAME.yaml with `design: {{cures: ...}}`")
    for file in files:
        design = read_study(file).comparison.design
        if design is None or design.cure_study is None:
            raise UserError(f"{file}: not a cure study; give it the design `cures`, or move it out of {path}")
    return CureFolder(path.rstrip("/"), tuple(sweep.plan(str(file), builders) for file in files), tuple(only))


def run(cures: CureFolder, builders: Callable[[], Builders], terminal: "Console", run_study: RunStudy) -> int:
    """Train what is missing, draw the matrix, then repeat cells on fresh seeds and draw it again.

    Where arms are selected nothing is repeated: that is a look at a part.

    Args:
        cures: The planned studies.
        builders: Functions of the folders above.
        terminal: For the reader.
        run_study: Trains one study.
    """
    code = _run_each(cures.plans, run_study, cures.only)
    if code == _STOPPED:
        return code
    _, repetitions = draw(cures, builders, terminal)
    if repetitions and not any(text.startswith("arm=") for text in cures.only):
        code = max(code, _run_each(repetitions, run_study, ()))
        if code != _STOPPED:
            draw(cures, builders, terminal)
    return code


def draw(cures: CureFolder, builders: Callable[[], Builders], terminal: "Console") -> tuple["Matrix", tuple[Plan, ...]]:
    """Draw the matrix of what has run, write it, log it to MLflow and print the finding; return as `collect`."""
    from lightning_moevlm.study.matrix.texts import describe_fresh, describe_missing, describe_rows
    from lightning_moevlm.study.matrix.write_matrix import log_matrix, write_matrix

    matrix, repetitions = collect(cures, builders())
    folder = cures.plans[0].folder.parent / f"{cures.name}_matrix"
    with explain_write_errors(folder, "free disk space, or grant write permission"):
        page = write_matrix(matrix, folder)
    if any(row.damage is not None for row in matrix.rows):
        log_matrix(open_experiment(find_tracking_uri(cures.plans[0]), folder.name), matrix, folder)
    head = "\nFinding: which cure undoes which illness? In brackets the share of the damage that it undoes."
    told = (head, *describe_rows(matrix), describe_fresh(matrix), describe_missing(matrix), matrix.part)
    for line in (*told, f"Matrix with all numbers: {page.absolute()}"):
        if line:
            terminal.print(line, highlight=False, soft_wrap=True, markup=False)
    return matrix, repetitions


def collect(cures: CureFolder, make: Builders) -> tuple["Matrix", tuple[Plan, ...]]:
    """Return the matrix of what has run, and the studies that repeat cells: the strongest ones if it is complete."""
    from lightning_moevlm.study.matrix.judge_matrix import make_matrix
    from lightning_moevlm.study.matrix.strongest import FRESH

    plans = [keep_seeds(planned, cures.only) for planned in cures.plans]
    rows, part = [_collect_row(planned) for planned in plans], _describe_part(cures.plans, plans)
    first = make_matrix(cures.name, cures.folder, rows, {}, part)
    repetitions = _plan_repetitions(cures, first, make)
    fresh = {planned.comparison.name.removesuffix(FRESH): _collect_row(planned) for planned in repetitions}
    return make_matrix(cures.name, cures.folder, rows, fresh, part), repetitions


def list_rows(cures: CureFolder, builders: Callable[[], Builders]) -> list[dict[str, object]]:
    """Return a record per illness, as in the written JSON."""
    from lightning_moevlm.study.report.result_records import to_json

    return [to_json(row) for row in collect(cures, builders())[0].rows]


def _describe_part(all_plans: Sequence[Plan], plans: Sequence[Plan]) -> str:
    """Return which seeds are drawn, if others are left out."""
    seeds = {seed: None for planned in plans for seed in planned.comparison.seeds}
    every = {seed: None for planned in all_plans for seed in planned.comparison.seeds}
    if seeds == every:
        return ""
    left_out = ", ".join(str(seed) for seed in every if seed not in seeds)
    return f"This matrix is of the seeds {', '.join(map(str, seeds))} alone; {left_out} are left out."


def _run_each(plans: Sequence[Plan], run_study: RunStudy, only: Sequence[str]) -> int:
    """Train each study; return the largest exit code, or that of a stop, which ends it."""
    code = 0
    for planned in plans:
        code = max(code, run_study(planned, only))
        if code == _STOPPED:
            break
    return code


def _collect_row(planned: Plan) -> "Row":
    from lightning_moevlm.study.compare.collect_results import fetch_results
    from lightning_moevlm.study.matrix.collect_row import collect_row

    ledger = read_ledger(planned)
    if any(state.run_id is not None for _, state in ledger):
        sweep.settle(planned)
        ledger = read_ledger(planned)
    return collect_row(planned.comparison, fetch_results(planned, ledger, find_tracking_uri(planned)))


def _plan_repetitions(cures: CureFolder, matrix: "Matrix", make: Builders) -> tuple[Plan, ...]:
    """Plan the studies that repeat the cells that were named for it, and the strongest ones of a complete matrix."""
    from lightning_moevlm.study.matrix.strongest import find_strongest, repeat

    studies = {}
    for planned in cures.plans:
        design = planned.comparison.design
        if design is not None and design.cure_study is not None and design.cure_study.fresh_seeds:
            studies[planned.comparison.name] = planned.study
    strongest = {} if matrix.missing else find_strongest(matrix, frozenset(studies))
    named = {row.illness: tuple(cell.arm for cell in row.cells if cell.is_named) for row in matrix.rows}
    sweeps = cures.plans[0].folder.parent
    return tuple(
        plan_study(repeat(study, arms), make.resolve, make.describe, sweeps)
        for name, study in studies.items()
        if (arms := (*named[name], *strongest.get(name, ())))
    )
