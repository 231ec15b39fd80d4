"""What is measured over an evaluation epoch: losses, masked accuracy, and the accuracy of a constant answer.

Every mean is over what was predicted in all batches and on all ranks, so that how samples fall into batches does not
matter, but for rounding.
"""

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_moevlm import keys
from lightning_moevlm.layers import batch_dependence, limited_in_evaluation
from lightning_moevlm.metrics import DropRates, MajorityAccuracy
from lightning_moevlm.models import Backbone
from lightning_moevlm.records import LossReport, NamedPlan, Predictions
from lightning_moevlm.training.running_sums import RunningSums


class Evaluation(nn.Module):
    """Metrics of one stage.

    Args:
        stage: "val" or "test", the prefix of its keys.
        num_classes: classes of every class-predicting term.
        backbone: whose layers with a limit in evaluation have their drop rate measured.
    """

    def __init__(self, stage: str, num_classes: Mapping[str, int], backbone: Backbone) -> None:
        super().__init__()
        self.stage = stage
        self.task, self.auxiliary, self.correct = RunningSums(), RunningSums(), RunningSums()
        self.drop_rates = DropRates(limited_in_evaluation(backbone))
        # one by one: their targets differ
        majority = {term: MajorityAccuracy(count) for term, count in num_classes.items()}
        self.majority = MetricCollection(majority, compute_groups=False)  # type: ignore[arg-type]

    def update(
        self, report: LossReport, predictions: Mapping[str, Predictions], num_samples: int, plans: Iterable[NamedPlan]
    ) -> None:
        """Add one batch."""
        for sums, terms in ((self.task, report.task), (self.auxiliary, report.auxiliary)):
            for name, term in terms.items():
                count = num_samples if term.num_predictions is None else term.num_predictions
                raw, weight = term.raw.double(), torch.as_tensor(term.weight).to(term.raw.device)
                sums.add(name, torch.stack([raw, raw * weight, torch.ones_like(raw)]) * count)
        self.drop_rates.update(plans)
        for name, prediction in predictions.items():
            correct_M = prediction.predicted_M == prediction.target_M
            self.correct.add(name, torch.stack([correct_M.sum(), torch.ones_like(correct_M).sum()]))
            self.majority[name].update(prediction.target_M)

    def compute(self) -> dict[str, Tensor]:
        """Return every metric under its key and start anew; terms that nothing was predicted for are left out."""
        task, auxiliary = (
            {n: s[:2] / s[2] for n, s in sums.totals().items() if s[2]} for sums in (self.task, self.auxiliary)
        )
        task_loss = sum((means[1] for means in task.values()), start=torch.zeros((), dtype=torch.float64))
        total_loss = sum((means[1] for means in auxiliary.values()), start=task_loss)
        values = {
            keys.TASK_LOSS.key(stage=self.stage): task_loss,
            keys.TOTAL_LOSS.key(stage=self.stage): total_loss,
        }
        for name, means in {**task, **auxiliary}.items():
            values[keys.EVAL_TERM.key(stage=self.stage, term=name)] = means[0]
        majority = self.majority.compute()  # on every rank, whatever it has seen: all wait for all
        for name, (correct, count) in self.correct.totals().items():
            if count:
                values[keys.ACCURACY.key(stage=self.stage, term=name)] = correct / count
                values[keys.MAJORITY_ACCURACY.key(stage=self.stage, term=name)] = majority[name]
        for (block, modality), rate in self.drop_rates.compute().items():
            key = keys.EVAL_DROP_RATE.key(stage=self.stage, block=block, modality=modality.label)
            values[key] = torch.tensor(rate)
        self.reset()
        return values

    def reset(self) -> None:
        """Forget all batches."""
        for metrics in (self.task, self.auxiliary, self.correct, self.majority, self.drop_rates):
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
