"""Measures an evaluation epoch: losses, masked accuracy, and the accuracy of a constant answer.

Every mean is over the predictions of all batches and ranks. So the batch size does not matter, except for rounding.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import Embeddings, ObjectiveOutput, Term
from lightning_moevlm.model.backbones import Backbone
from lightning_moevlm.model.layers import batch_dependence, find_evaluation_limits
from lightning_moevlm.model.losses import AuxiliaryLosses, LossInput, SumName
from lightning_moevlm.model.metrics import DropRates, MajorityAccuracy
from lightning_moevlm.model.metrics.retrieval import gather_embeddings, retrieval_recalls
from lightning_moevlm.model.metrics.running_sums import RunningSums
from lightning_moevlm.model.metrics.vqa import VQAAccuracy


def no_terms(embeddings: Embeddings) -> Mapping[str, Term]:
    """Return none: the objective compares no samples."""
    return {}


class Evaluation(nn.Module):
    """Metrics of one stage.

    Args:
        stage: "val" or "test", the prefix of its keys.
        num_classes: classes of every class-predicting term.
        losses: auxiliary losses, each measured once on the sums of all batches.
        backbone: its layers with a capacity limit in evaluation have their drop rate measured.
        terms_of_set: terms that compare all samples of the epoch with each other.
    """

    def __init__(
        self,
        stage: str,
        num_classes: Mapping[str, int],
        losses: AuxiliaryLosses,
        backbone: Backbone,
        terms_of_set: Callable[[Embeddings], Mapping[str, Term]] = no_terms,
    ) -> None:
        super().__init__()
        self.stage = stage
        self._losses = losses
        self._task = RunningSums[str]()
        self._routing = RunningSums[SumName]()
        self._correct = RunningSums[str]()
        self._terms_of_set = terms_of_set
        self._embeddings: list[Embeddings] = []
        self._vqa = VQAAccuracy()
        self.drop_rates = DropRates(find_evaluation_limits(backbone))
        # one by one: their targets differ
        majority = {term: MajorityAccuracy(count) for term, count in num_classes.items()}
        self.majority = MetricCollection(majority, compute_groups=False)  # type: ignore[arg-type]

    def update(self, output: ObjectiveOutput, inputs: Sequence[LossInput], num_samples: int) -> None:
        """Add one batch; inputs: those of the losses on routing."""
        for name, term in output.terms.items():
            count = num_samples if term.num_predictions is None else term.num_predictions
            raw, weight = term.raw.double(), torch.as_tensor(term.weight).to(term.raw.device)
            self._task.add(name, torch.stack([raw, raw * weight, torch.ones_like(raw)]) * count)
        for of, sums in self._losses.sums(inputs, output.log_partitions).items():
            self._routing.add(of, sums)
        self.drop_rates.update(output.plans)
        if output.embeddings is not None:
            self._embeddings.append(output.embeddings)
        if output.answered is not None:
            self._vqa.update(output.answered)
        for name, prediction in output.predictions.items():
            correct_M = prediction.predicted_M == prediction.target_M
            self._correct.add(name, torch.stack([correct_M.sum(), torch.ones_like(correct_M).sum()]))
            self.majority[name].update(prediction.target_M)

    def compute(self, weights: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """Return every metric under its key and reset; terms without predictions are left out.

        Args:
            weights: current weights of the auxiliary losses.
        """
        task = {name: sums[:2] / sums[2] for name, sums in self._task.totals().items() if sums[2]}
        embeddings = gather_embeddings(self._embeddings)
        of_set = {} if embeddings is None else self._terms_of_set(embeddings)
        task |= {name: torch.stack([term.raw, term.weighted]).double() for name, term in of_set.items()}
        auxiliary = self._losses.means(self._routing.totals(), weights)
        task_loss = sum((weighted for _, weighted in task.values()), start=torch.zeros((), dtype=torch.float64))
        total_loss = sum((term.weighted.cpu() for term in auxiliary.values()), start=task_loss)
        values = {
            metric_keys.TASK_LOSS.key(stage=self.stage): task_loss,
            metric_keys.TOTAL_LOSS.key(stage=self.stage): total_loss,
        }
        raw = {name: mean for name, (mean, _) in task.items()} | {name: term.raw for name, term in auxiliary.items()}
        values |= {metric_keys.EVAL_TERM.key(stage=self.stage, term=name): value for name, value in raw.items()}
        majority = self.majority.compute()  # on every rank, even without predictions: it synchronises
        for name, (correct, count) in self._correct.totals().items():
            if count:
                values[metric_keys.ACCURACY.key(stage=self.stage, term=name)] = correct / count
                values[metric_keys.MAJORITY_ACCURACY.key(stage=self.stage, term=name)] = majority[name]
        for recall in [] if embeddings is None else retrieval_recalls(embeddings):
            where: dict[str, str | int] = {"stage": self.stage, "k": recall.at, "direction": recall.direction}
            values[metric_keys.RECALL.key(**where)] = torch.tensor(recall.recall)
            values[metric_keys.CHANCE_RECALL.key(**where)] = torch.tensor(recall.chance)
        for kind, score in self._vqa.compute().items():
            part = re.sub(r"[^\w.-]", "_", kind)  # as in yes/no
            values[metric_keys.VQA_ACCURACY.key(stage=self.stage, kind=part)] = torch.tensor(score.accuracy)
            values[metric_keys.VQA_MAJORITY.key(stage=self.stage, kind=part)] = torch.tensor(score.majority)
        for (block, modality), rate in self.drop_rates.compute().items():
            key = metric_keys.EVAL_DROP_RATE.key(stage=self.stage, block=block, modality=modality.label)
            values[key] = torch.tensor(rate)
        self.reset()
        return values

    def reset(self) -> None:
        """Forget all batches."""
        for metrics in (self._task, self._routing, self._correct, self.majority, self.drop_rates, self._vqa):
            metrics.reset()
        self._embeddings = []


def report_batch_dependence(backbone: Backbone, stage: str) -> None:
    """Report each reason why features ("predict") or metrics of a sample depend on its batch."""
    subject = "Features" if stage == "predict" else "Metrics"
    for cause in batch_dependence(backbone):
        rank_zero_info(f"{subject} of a sample depend on its batch, so data.batch_size changes them: {cause}")


def log_values(pl_module: LightningModule, values: Mapping[str, Tensor]) -> None:
    """Log at the optimiser step. Outside of `fit` Lightning logs, because it returns the logged values."""
    numbers = {key: float(value) for key, value in values.items()}
    is_fit = pl_module.trainer.state.fn == TrainerFn.FITTING
    for logger in pl_module.loggers if is_fit else ():
        logger.log_metrics(numbers, step=pl_module.global_step)
    pl_module.log_dict(numbers, logger=not is_fit, rank_zero_only=False, sync_dist=False)
