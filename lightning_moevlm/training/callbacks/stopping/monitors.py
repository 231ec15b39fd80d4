"""Refuses to train for the sake of a metric that nobody measures: a monitor is known to be wrong after one step.

Lightning notices at the first validation, or when it first saves: hours later in a long run.
"""

from collections.abc import Collection

from lightning.pytorch import Trainer

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.nearest_name import find_nearest
from lightning_moevlm.contracts import metric_keys

_OURS = ("lightning", "lightning_moevlm", "pytorch_lightning")
_FIRST_WORDS = {
    metric.pattern.split("/")[0].replace("{stage}", stage)
    for metric in metric_keys.ALL
    for stage in ("train", "val", "test")
}


def refuse_unknown_monitors(trainer: Trainer, evaluated: Collection[str]) -> None:
    """Refuse what a callback monitors if neither the first step nor an evaluation before it has measured it.

    A callback from elsewhere may log metrics of its own at any time: names that are not like ours wait, beside such a
    callback, for the first validation.

    Args:
        trainer: whose first step is done.
        evaluated: keys that a validation measures; empty where there was none yet.

    Raises:
        UserError: the callback, what it asks for, and what there is.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets, but declares it not
    others_log = any(type(callback).__module__.split(".")[0] not in _OURS for callback in callbacks)
    known = sorted({*evaluated, *trainer.callback_metrics})
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in (*known, "epoch", "step"):
            continue
        if not evaluated and monitor.startswith("val"):
            continue  # not known yet
        if others_log and monitor.split("/")[0] not in _FIRST_WORDS:
            continue
        near = find_nearest(monitor, known)
        meant = f"did you mean {near}? " if near else ""
        some = [key for key in known if key.startswith(("train/", "val/"))]
        more = [key for key in ("optim/grad_norm", next((key for key in known if "/block" in key), "")) if key in known]
        raise UserError(
            f"{type(callback).__name__} monitors {monitor}, which this run does not measure; {meant}choose "
            f"{', '.join(some)} or another metric of the run, such as {' or '.join(more)}"
        )
