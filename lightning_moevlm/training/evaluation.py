"""Measures an evaluation epoch: losses, and what the objective declares beside them (`Objective.measures`).

Every mean is over the predictions of all batches and ranks. So the batch size does not matter, except for rounding.
"""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import batch_dependence
from lightning_moevlm.model.losses import AuxiliaryLosses, LossInput, SumName
from lightning_moevlm.model.metrics.measure import Measure
from lightning_moevlm.model.metrics.running_sums import RunningSums


class Evaluation:
    """Losses of one stage, and its other measures.

    Args:
        stage: "val" or "test", the prefix of its keys.
        measures: what is measured beside the losses, in the same order on every rank.
        losses: auxiliary losses, each measured once on the sums of all batches.
    """

    def __init__(self, stage: str, measures: Sequence[Measure], losses: AuxiliaryLosses) -> None:
        self.stage = stage
        self._measures = measures
        self._losses = losses
        self._task = RunningSums[str]()
        self._routing = RunningSums[SumName]()

    def update(self, output: ObjectiveOutput, inputs: Sequence[LossInput], num_samples: int) -> None:
        """Add one batch; inputs: those of the losses on routing."""
        for name, term in output.terms.items():
            count = num_samples if term.num_predictions is None else term.num_predictions
            raw, weight = term.raw.double(), torch.as_tensor(term.weight).to(term.raw.device)
            self._task.add(name, torch.stack([raw, raw * weight, torch.ones_like(raw)]) * count)
        for of, sums in self._losses.sums(inputs, output.log_partitions).items():
            self._routing.add(of, sums)
        for measure in self._measures:
            measure.update(output)

    def compute(self, weights: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Return every metric under its key and reset; terms without predictions are left out.

        Args:
            weights: current weights of the auxiliary losses.
        """
        measured = [measure.compute(self.stage) for measure in self._measures]
        task = {name: (sums[:2] / sums[2]).tolist() for name, sums in self._task.totals().items() if sums[2]}
        task |= {name: [float(t.raw), float(t.weighted)] for each in measured for name, t in each.terms.items()}
        auxiliary = self._losses.means(self._routing.totals(), weights)
        values: dict[str, float] = {}
        if task:  # a model may be judged by callbacks alone, on data that its objective cannot use
            task_loss = sum(weighted for _, weighted in task.values())
            auxiliary_loss = sum(float(term.weighted) for term in auxiliary.values())
            values[metric_keys.TASK_LOSS.key(stage=self.stage)] = task_loss
            values[metric_keys.TOTAL_LOSS.key(stage=self.stage)] = task_loss + auxiliary_loss
        raw = {name: mean for name, (mean, _) in task.items()} | {name: float(t.raw) for name, t in auxiliary.items()}
        values |= {metric_keys.EVAL_TERM.key(stage=self.stage, term=name): value for name, value in raw.items()}
        for each in measured:
            values |= each.values
        self.reset()
        return values

    def reset(self) -> None:
        """Forget all batches."""
        self._task.reset()
        self._routing.reset()
        for measure in self._measures:
            measure.reset()


def report_batch_dependence(backbone: Backbone, stage: str) -> None:
    """Report each reason why features ("predict") or metrics of a sample depend on its batch."""
    subject = "Features" if stage == "predict" else "Metrics"
    for cause in batch_dependence(backbone):
        rank_zero_info(f"{subject} of a sample depend on its batch, so data.batch_size changes them: {cause}")


def log_values(pl_module: LightningModule, values: Mapping[str, float | Tensor]) -> None:
    """Log at the optimiser step. Outside of `fit` Lightning logs, because it returns the logged values."""
    numbers = {key: float(value) for key, value in values.items()}
    is_fit = pl_module.trainer.state.fn == TrainerFn.FITTING
    for logger in pl_module.loggers if is_fit else ():
        logger.log_metrics(numbers, step=pl_module.global_step)
    pl_module.log_dict(numbers, logger=not is_fit, rank_zero_only=False, sync_dist=False)
