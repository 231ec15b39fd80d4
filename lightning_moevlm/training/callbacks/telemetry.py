"""Logs training: each loss, routing per layer and modality, attention, gradient norm, speed, memory.

Metrics are computed only on logging steps (every `trainer.log_every_n_steps` optimiser steps, and the first), from the
step's own plans; between them the callback counts samples and tokens. Losses are those of the whole step, the rest is
of its last micro-batch on the first rank.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality, RoutingPlan
from lightning_moevlm.contracts.step_records import AttentionLogits, LossReport, NamedPlan, Term
from lightning_moevlm.data.datamodule import ShardDataModule
from lightning_moevlm.data.format.faults import CAUSES
from lightning_moevlm.data.load.shard_loader import ShardLoader
from lightning_moevlm.model.backbones import Backbone, model_card
from lightning_moevlm.model.dispatch.auto.measure import measure_products
from lightning_moevlm.model.dispatch.auto.own_table import measure_products_once
from lightning_moevlm.model.layers import Mixture
from lightning_moevlm.model.metrics import RoutingMetrics, capacity_factor, routing_metrics
from lightning_moevlm.model.routers import Router
from lightning_moevlm.training import StepOutput, VisionLanguageModule
from lightning_moevlm.training.callbacks.peak_memory import peak_memory, reset_peak
from lightning_moevlm.training.callbacks.stopping.monitors import refuse_unknown_monitors
from lightning_moevlm.training.optim.named_parts import count_trained
from lightning_moevlm.training.step.logging_steps import is_logging_step
from lightning_moevlm.training.step.step_losses import losses_of_step
from lightning_moevlm.training.step.stopwatch import Stopwatch

_SCALARS = {
    "load_entropy": metric_keys.LOAD_ENTROPY,
    "token_entropy": metric_keys.TOKEN_ENTROPY,
    "max_violation": metric_keys.MAX_VIOLATION,
    "drop_rate": metric_keys.DROP_RATE,
    "dead_experts": metric_keys.DEAD_EXPERTS,
    "logit_max": metric_keys.LOGIT_MAX,
}

_ENOUGH_CAPTIONS = 500
"""Captions read before the truncated share is reported: the first few may differ from the rest."""


@runtime_checkable
class TakesTags(Protocol):
    """A logger whose runs can be tagged."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""


class Telemetry(Callback):
    """Writes training metrics to the run's loggers; the step of a point is the number of optimiser steps done.

    Args:
        update_norm: measure the size of the update on logging steps; copies the parameters for it.
    """

    def __init__(self, update_norm: bool = True) -> None:
        self._measures_update = update_norm
        self._before: list[Tensor] = []
        self._has_asked = False  # for the norm of the gradient
        self._learning_rate = 0.0
        self._step_seen = 0
        self._reports: list[LossReport] = []  # of the current step
        self._first_step = 1
        self._evaluated: set[str] = set()  # keys of a validation
        self._samples = 0
        self._tokens = 0
        self._stopwatch = Stopwatch()
        self._counted_from = 0  # step that samples, tokens and time are counted from
        self._waited_before = 0.0  # seconds, for batches up to that step
        self._dispatch: dict[str, str] = {}
        self._in_use: list[str] = []
        self._choices: dict[str, dict[str, str]] = {}  # of dispatchers, by layer and case
        self._reported_truncation: set[str] = set()  # sources

    def state_dict(self) -> dict[str, Any]:
        """Return which dispatchers have run."""
        return {"dispatch": self._choices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what ran before, so that a change is said."""
        self._choices = state_dict.get("dispatch", {})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report and log the cost of the model."""
        backbone = pl_module.backbone
        assert isinstance(backbone, Backbone)
        card = model_card(backbone)
        trained = count_trained(backbone.parameters())
        frozen = f"{trained / 1e6:.2f} M trained, " if trained < card.total_parameters else ""
        rank_zero_info(
            f"{type(backbone).__name__}: {card.total_parameters / 1e6:.2f} M parameters, "
            f"{card.active_parameters / 1e6:.2f} M active, {frozen}"
            f"{card.active_flops_per_sample / 1e6:.1f} MFLOP forward per pair"
        )
        if dtype := _router_dtype(backbone):
            self._tag(trainer, {"router_dtype": dtype})
        if trainer.ckpt_path is not None:
            return  # a resumed run has it already
        self._write(
            trainer,
            {
                metric_keys.TOTAL_PARAMETERS.key(): card.total_parameters,
                metric_keys.ACTIVE_PARAMETERS.key(): card.active_parameters,
                metric_keys.ACTIVE_FLOPS.key(): card.active_flops_per_sample,
            },
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, reset the peak of memory, and tag the run with the speed of its CPU."""
        if (
            pl_module.device.type == "cpu"
            and trainer.is_global_zero
            and (speeds := measure_products_once(measure_products))
        ):
            self._tag(
                trainer, {"cpu/products": ", ".join(f"{dtype} {speed:g} TFLOP/s" for dtype, speed in speeds.items())}
            )
        reset_peak(pl_module.device)
        self._step_seen = trainer.global_step
        self._first_step = trainer.global_step + 1
        self._reports = []
        self._count_from(trainer)  # and drop what the validation before the first step has counted

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: throughput excludes validation."""
        self._stopwatch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if trainer.sanity_checking:  # before the first step; Lightning then drops them
            self._evaluated = set(trainer.callback_metrics)
        self._stopwatch.resume()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Have the gradient measured before it is clipped."""
        if is_logging_step(trainer, trainer.global_step + 1):
            assert isinstance(pl_module, VisionLanguageModule)
            pl_module.gradient_norms.ask()
            self._has_asked = True
            self._learning_rate = float(optimizer.param_groups[0]["lr"])  # the one that this step is made with
            if self._measures_update:
                self._before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: StepOutput, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and on logging steps measure and log."""
        self._samples += outputs["num_samples"] * trainer.world_size
        self._tokens += outputs["num_tokens"] * trainer.world_size
        self._reports.append(outputs["report"])
        if trainer.global_step == self._step_seen:
            return  # the batch only added to the gradient
        self._step_seen = trainer.global_step
        reports, self._reports = self._reports, []
        if not is_logging_step(trainer, trainer.global_step):
            return
        speed = self._speed(trainer, pl_module.device)
        self._count_from(trainer)
        values = speed | loss_values(losses_of_step(reports, trainer.world_size)) | routing_values(outputs["plans"])
        values |= attention_values(outputs["attention"]) | log_partition_values(outputs["log_partitions"])
        values |= self._step_values(pl_module) | data_values(trainer) | peak_memory(pl_module.device)
        self._write(trainer, values)
        if trainer.global_step == self._first_step:
            refuse_unknown_monitors(trainer, self._evaluated)
        self._report_truncation(trainer, enough=_ENOUGH_CAPTIONS)
        self._log_dispatch(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report truncated captions of a short training."""
        self._report_truncation(trainer, enough=1)

    def _count_from(self, trainer: Trainer) -> None:
        self._samples, self._tokens, self._counted_from = 0, 0, trainer.global_step
        loader = _train_loader(trainer)
        self._waited_before = loader.waited_seconds if loader else 0.0
        self._stopwatch.restart()

    def _speed(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        """Return throughput, the share of waiting for data, and the CPU time of a step where the CPU computes it."""
        seconds = self._stopwatch.read()
        values = {
            metric_keys.SAMPLES_PER_SECOND.key(): self._samples / seconds.wall,
            metric_keys.TOKENS_PER_SECOND.key(): self._tokens / seconds.wall,
        }
        loader = _train_loader(trainer)
        if loader is not None:
            values[metric_keys.DATA_WAIT.key()] = (loader.waited_seconds - self._waited_before) / seconds.wall
        if device.type == "cpu":
            values[metric_keys.CPU_SECONDS.key()] = seconds.cpu / (trainer.global_step - self._counted_from)
        return values

    def _report_truncation(self, trainer: Trainer, enough: int) -> None:
        """Report once for each source the share of truncated captions, if any, when enough have been read."""
        loader = _train_loader(trainer)
        if loader is None:
            return
        for name, num_cut, num_texts in zip(loader.source_names, loader.num_cut, loader.num_texts, strict=True):
            if num_cut and num_texts >= enough and name not in self._reported_truncation:
                self._reported_truncation.add(name)
                data: Any = trainer.datamodule  # type: ignore[attr-defined]
                limit = f"data.max_text_len {data.max_text_len}"
                advice = "`moevlm data check` shows the share by length"
                if getattr(data, "chats", None) is not None:
                    limit, advice = f"data.chat.max_len {data.chats.options.max_len}", "raise it to keep them whole"
                rank_zero_info(
                    f"{name}: {num_cut / num_texts:.1%} of {num_texts:,} captions are longer than {limit} and lose "
                    f"their end; {advice}"
                )

    def _step_values(self, pl_module: LightningModule) -> dict[str, float]:
        """Return the size of the update and the effects of gradient stabilisers, by key."""
        assert isinstance(pl_module, VisionLanguageModule)
        values: dict[str, float] = {}
        norm = pl_module.gradient_norms.total
        if self._has_asked and norm is not None:
            self._has_asked = False
            values[metric_keys.GRAD_NORM.key()] = float(norm)
            values[metric_keys.LEARNING_RATE.key()] = self._learning_rate
        if self._before:
            optimizer = pl_module.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizer, Optimizer)
            after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
            values[metric_keys.UPDATE_NORM.key()] = float(get_total_norm(torch._foreach_sub(after, self._before)))
            self._before = []
        events = pl_module.gradient_events
        if events is not None:
            values[metric_keys.CLIP_COEFFICIENT.key()] = float(events.coefficient)
            values[metric_keys.SKIPPED_STEPS.key()] = float(events.num_skipped)
        return values

    def _log_dispatch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tag the run with the dispatch path of each layer and its reason; arms compare only on equal paths."""
        layers = {path: layer for path, layer in pl_module.named_modules() if isinstance(layer, Mixture)}
        now = {f"dispatch/{path}": layer.dispatcher.record() for path, layer in layers.items()}
        new = {tag: text for tag, text in now.items() if self._dispatch.get(tag) != text}
        self._dispatch |= new
        choices = {path: layer.dispatcher.choices() for path, layer in layers.items()}
        for line in changed_choices(self._choices, choices):
            rank_zero_info(line)
        self._choices = {path: self._choices.get(path, {}) | each for path, each in choices.items()}
        in_use = sorted({name for layer in layers.values() for name in layer.dispatcher.in_use()})
        if in_use != self._in_use:
            self._in_use = in_use
            is_tagged = any(isinstance(logger, TakesTags) for logger in trainer.loggers)
            rank_zero_info(f"dispatch: {', '.join(in_use)}{' (reasons: MLflow tags dispatch/*)' if is_tagged else ''}")
        if new:
            self._tag(trainer, new)

    @staticmethod
    def _tag(trainer: Trainer, tags: dict[str, str]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TakesTags):
                logger.log_tags(tags)

    @staticmethod
    def _write(trainer: Trainer, values: dict[str, float]) -> None:
        # EarlyStopping and ModelCheckpoint read their monitor there
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def changed_choices(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each case, of any layer, that another dispatcher runs than before the run was resumed.

    Args:
        before: what ran, by layer and case.
        now: what runs.
    """
    changes = {
        (case, before[path][case], choice): None
        for path, choices in now.items()
        for case, choice in choices.items()
        if before.get(path, {}).get(case, choice) != choice
    }
    return [
        f"dispatch: {case}: was {old}, is now {new}, because this machine's timings differ from those before the "
        "resume; results may differ by rounding"
        for case, old, new in changes
    ]


def _router_dtype(backbone: Backbone) -> str:
    """Return the dtype of the routers' weights; empty without weights."""
    routers = [module for module in backbone.modules() if isinstance(module, Router)]
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for router in routers for p in router.parameters()}))


def loss_values(report: LossReport) -> dict[str, float]:
    """Return task loss, total loss and every term raw and weighted, with its weight, by key."""
    terms: Iterable[tuple[str, Term]] = (*report.task.items(), *report.auxiliary.items())
    values = {
        metric_keys.TASK_LOSS.key(stage="train"): float(report.task_loss),
        metric_keys.TOTAL_LOSS.key(stage="train"): float(report.total_loss),
    }
    for name, term in terms:
        values[metric_keys.TERM_RAW.key(term=name)] = float(term.raw)
        values[metric_keys.TERM_WEIGHTED.key(term=name)] = float(term.weighted)
        values[metric_keys.TERM_WEIGHT.key(term=name)] = float(term.weight)
    return values


def data_values(trainer: Trainer) -> dict[str, float]:
    """Return samples read and lost by source, over all ranks, by key; all ranks must call it together."""
    loader = _train_loader(trainer)
    if loader is None:
        return {}
    values: dict[str, float] = {}
    for name, samples, epochs in zip(loader.source_names, loader.samples, loader.source_epochs, strict=True):
        values[metric_keys.SOURCE_SAMPLES.key(source=name)] = float(samples * trainer.world_size)  # alike on every rank
        values[metric_keys.SOURCE_EPOCHS.key(source=name)] = epochs
    totals = _over_ranks(trainer, [*loader.num_cut, *loader.num_texts])
    half = len(loader.source_names)
    for name, num_cut, num_texts in zip(loader.source_names, totals[:half], totals[half:], strict=True):
        if num_texts:
            values[metric_keys.CUT_CAPTIONS.key(source=name)] = num_cut / num_texts
    if loader.tolerates_losses:
        total = _over_ranks(trainer, [loader.lost[cause] for cause in CAUSES])
        values |= {
            metric_keys.SKIPPED_SAMPLES.key(cause=cause): count
            for cause, count in zip(CAUSES, total, strict=True)
            if count
        }
    return values


def _over_ranks(trainer: Trainer, own: list[int]) -> list[int]:
    total = trainer.strategy.reduce(torch.tensor(own, device=trainer.strategy.root_device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total.tolist()


def _train_loader(trainer: Trainer) -> ShardLoader | None:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return data.train_loader if isinstance(data, ShardDataModule) else None


def routing_values(plans: Iterable[NamedPlan]) -> dict[str, float]:
    """Return the routing metrics of every layer and modality, by key; forward passes of one step are joined."""
    by_layer: dict[tuple[int, Modality], list[RoutingPlan]] = defaultdict(list)
    for named in plans:
        for modality in named.modalities:
            by_layer[named.block, modality].append(named.plan)
    values: dict[str, float] = {}
    for (block, modality), layer_plans in by_layer.items():
        metrics: RoutingMetrics = routing_metrics(layer_plans, modality)
        for field, metric_key in _SCALARS.items():
            values[metric_key.key(block=block, modality=modality.label)] = float(getattr(metrics, field))
        capacity = capacity_factor(layer_plans, modality)
        if capacity is not None:
            values[metric_keys.CAPACITY.key(block=block, modality=modality.label)] = capacity
        for expert, load in enumerate(metrics.load_E.tolist()):
            values[metric_keys.EXPERT_LOAD.key(block=block, modality=modality.label, expert=expert)] = load
    return values


def log_partition_values(log_partitions: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest |logsumexp| of the output logits of every term with a masked position, by key.

    It bounds the largest logit from above, and also grows if all logits drift below 0.
    """
    return {
        metric_keys.LOG_PARTITION_MAX.key(term=name): float(value_M.abs().max())
        for name, value_M in log_partitions.items()
        if value_M.numel()
    }


def attention_values(attention: Iterable[AttentionLogits]) -> dict[str, float]:
    """Return the largest attention logit of every block, by key; over the heads and forward passes of the step."""
    by_block: dict[int, list[Tensor]] = defaultdict(list)
    for logits in attention:
        by_block[logits.block].append(logits.max_H)
    return {
        metric_keys.ATTENTION_LOGIT_MAX.key(block=block): float(torch.stack(values).max())
        for block, values in by_block.items()
    }
