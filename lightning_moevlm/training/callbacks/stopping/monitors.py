"""Refuses, after one step, a callback that monitors a metric which the run does not measure.

Lightning notices at the first validation or the first save, hours later in a long run.
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
    """Refuse a monitor that neither the first step nor an evaluation before it has measured.

    Callbacks of other packages may log their own metrics at any time. Beside one, unknown names are left to Lightning.

    Args:
        trainer: after its first step.
        evaluated: keys of a validation; empty before the first one.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets, but declares it not
    others_log = any(type(callback).__module__.split(".")[0] not in _OURS for callback in callbacks)
    known = sorted({*evaluated, *trainer.callback_metrics})
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in (*known, "epoch", "step"):
            continue
        if not evaluated and monitor.startswith("val"):
            continue  # unknown until then
        if others_log and monitor.split("/")[0] not in _FIRST_WORDS:
            continue
        near = find_nearest(monitor, known)
        hint = f"did you mean {near}? " if near else ""
        some = [key for key in known if key.startswith(("train/", "val/"))]
        more = [key for key in ("optim/grad_norm", next((key for key in known if "/block" in key), "")) if key in known]
        raise UserError(
            f"{type(callback).__name__} monitors {monitor}, which this run does not measure; {hint}choose "
            f"{', '.join(some)} or another metric of the run, such as {' or '.join(more)}"
        )
