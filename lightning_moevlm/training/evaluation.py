"""What is measured over an evaluation epoch: losses, masked accuracy, and the accuracy of a constant answer."""

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_moevlm import keys
from lightning_moevlm.layers import batch_dependence, limited_in_evaluation
from lightning_moevlm.metrics import DropRates, MajorityAccuracy
from lightning_moevlm.models import Backbone
from lightning_moevlm.records import LossReport, NamedPlan, Predictions


class Evaluation(nn.Module):
    """Metrics of one stage; means are weighted by samples.

    Args:
        stage: "val" or "test", the prefix of its keys.
        num_classes: classes of every class-predicting term.
        backbone: whose layers with a limit in evaluation have their drop rate measured.
    """

    def __init__(self, stage: str, num_classes: Mapping[str, int], backbone: Backbone) -> None:
        super().__init__()
        self.stage = stage
        self.task_loss = _mean()
        self.total_loss = _mean()
        self.terms = _collection({})
        self.accuracy = _collection(
            {term: MulticlassAccuracy(num_classes=count, average="micro") for term, count in num_classes.items()}
        )
        self.drop_rates = DropRates(limited_in_evaluation(backbone))
        self.majority = _collection({term: MajorityAccuracy(count) for term, count in num_classes.items()})

    def update(
        self, report: LossReport, predictions: Mapping[str, Predictions], num_samples: int, plans: Iterable[NamedPlan]
    ) -> None:
        """Add one batch."""
        self.task_loss.update(report.task_loss, num_samples)
        self.total_loss.update(report.total_loss, num_samples)
        for name, term in {**report.task, **report.auxiliary}.items():
            if name not in self.terms:
                self.terms.add_metrics({name: _mean(term.raw.device)})
            self.terms[name].update(term.raw, num_samples)
        self.drop_rates.update(plans)
        for name, prediction in predictions.items():
            self.accuracy[name].update(prediction.predicted_M, prediction.target_M)
            self.majority[name].update(prediction.target_M)

    def compute(self) -> dict[str, Tensor]:
        """Return every metric under its key and start anew; terms that never occurred are left out."""
        values = {
            keys.TASK_LOSS.key(stage=self.stage): self.task_loss.compute(),
            keys.TOTAL_LOSS.key(stage=self.stage): self.total_loss.compute(),
        }
        for name, term in self.terms.items():
            values[keys.EVAL_TERM.key(stage=self.stage, term=name)] = term.compute()
        for name, accuracy in self.accuracy.items():
            if accuracy.update_called:
                values[keys.ACCURACY.key(stage=self.stage, term=name)] = accuracy.compute()
                values[keys.MAJORITY_ACCURACY.key(stage=self.stage, term=name)] = self.majority[name].compute()
        for (block, modality), rate in self.drop_rates.compute().items():
            key = keys.EVAL_DROP_RATE.key(stage=self.stage, block=block, modality=modality.label)
            values[key] = torch.tensor(rate)
        self.reset()
        return values

    def reset(self) -> None:
        """Forget all batches."""
        for metrics in (self.task_loss, self.total_loss, self.terms, self.accuracy, self.majority, self.drop_rates):
            metrics.reset()


def tell_batch_dependence(backbone: Backbone, stage: str) -> None:
    """Say, once per cause, that features ("predict") or metrics are not those of each sample alone."""
    what = (
        "Features are not a function of the sample alone"
        if stage == "predict"
        else "Metrics are not those of each sample alone"
    )
    for cause in batch_dependence(backbone):
        rank_zero_info(f"{what}; they change with data.batch_size: {cause}")


def _mean(device: torch.device | None = None) -> MeanMetric:
    """Return a mean that stays NaN where a loss was NaN: torchmetrics' default leaves such batches out.

    In fp32 wherever it is made: in the first batch of an epoch under bf16-true, torch's default dtype is bf16, whose
    sums stop growing at 256 samples.
    """
    mean = MeanMetric(nan_strategy="disable")
    # the dtype last: moving a metric sets it to torch's default
    if device is not None:
        mean.to(device)
    mean.set_dtype(torch.float32)
    return mean


def _collection(metrics: dict[str, Metric | MetricCollection]) -> MetricCollection:
    """Return metrics that are updated one by one: sharing state between them would be wrong, their targets differ."""
    return MetricCollection(metrics, compute_groups=False)
