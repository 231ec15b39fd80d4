"""Runs that another study has made already, for `moevlm sweep plan` and `moevlm sweep run`."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_moevlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_moevlm.study.claim import Experiment
    from lightning_moevlm.study.known_runs import KnownRuns
    from lightning_moevlm.study.plan import Plan


def known_in_plan(planned: "Plan") -> "KnownRuns | None":
    """Return what `sweep run` would take; None where the store or the data cannot be asked. Writes nothing."""
    from lightning_moevlm.study.claim import tracking_uri_of
    from lightning_moevlm.study.known_runs import find_known
    from lightning_moevlm.tracking.store import prepare_store, sqlite_path

    try:
        uri = tracking_uri_of(planned)
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            return None
        prepare_store(uri)
        return find_known(planned, uri, _digests())
    except UserError:  # told by `sweep run`, which needs both
        return None


def take_up(planned: "Plan", experiment: "Experiment", terminal: "Console") -> int:
    """Take what another study has made, say so, and return how many runs that were. Call it holding the study."""
    from lightning_moevlm.study.known_runs import find_known, take_known

    known = find_known(planned, experiment.uri, _digests())
    taken = take_known(planned, experiment, known)
    for line in known.told(len(planned.runs)):
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    if taken:
        terminal.print("Known runs are not trained again; with --reuse=false they are.", highlight=False)
    return len(taken)


def _digests() -> Callable[[Mapping[str, Any]], str]:
    """Return a function from a data configuration to the digest of what it reads; each is read once."""
    from lightning_moevlm.resolved_config import build_data

    digests: dict[str, str] = {}

    def digest(data: Mapping[str, Any]) -> str:
        key = json.dumps(data, sort_keys=True, default=str)
        if key not in digests:
            digests[key] = build_data(data).manifest_digest
        return digests[key]

    return digest
