"""Declares every metric key once, with its unit and its better direction.

A key is a pattern: braces stand for a name or a number (`loss/{term}`, `load/block{block}/{modality}/expert{expert}`).
Writers call `.key(...)`; readers (report, comparison) call `find_metric`.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal


@dataclass(frozen=True)
class MetricKey:
    """A family of metric keys.

    pattern: the key, with braces.
    title: name in reports.
    unit: for axis labels; "" is a pure number.
    better: the direction of progress.
    """

    pattern: str
    title: str
    unit: str
    better: Literal["lower", "higher", "neither"]

    def key(self, **parts: str | int) -> str:
        """Return the key with its braces filled."""
        return self.pattern.format(**parts)

    def match(self, key: str) -> dict[str, str] | None:
        """Return what the braces stand for in `key`; None if it belongs to another family."""
        found = self._regex.fullmatch(key)
        return found.groupdict() if found else None

    @property
    def _regex(self) -> re.Pattern[str]:
        return _compiled(self.pattern)


@cache  # called for each of thousands of series
def _compiled(pattern: str) -> re.Pattern[str]:
    literal = re.split(r"\{(\w+)\}", pattern)
    parts = [re.escape(p) if i % 2 == 0 else f"(?P<{p}>[^/]+)" for i, p in enumerate(literal)]
    return re.compile("".join(parts))


TASK_LOSS = MetricKey("{stage}/task_loss", "task loss", "sum of term losses", "lower")
TOTAL_LOSS = MetricKey("{stage}/total_loss", "total loss", "sum of term losses", "lower")
TERM_RAW = MetricKey("loss/{term}", "loss term, raw", "unit of the term", "lower")
TERM_WEIGHTED = MetricKey("loss_weighted/{term}", "loss term, weighted", "unit of the term", "lower")
TERM_WEIGHT = MetricKey("loss_weight/{term}", "weight of a loss term", "", "neither")
EVAL_TERM = MetricKey("{stage}_loss/{term}", "loss term on held-out data, raw", "unit of the term", "lower")
ACCURACY = MetricKey("{stage}/accuracy_{term}", "accuracy of predicted classes", "fraction", "higher")
MAJORITY_ACCURACY = MetricKey("{stage}/majority_{term}", "accuracy of the majority class", "fraction", "neither")
RECALL = MetricKey("{stage}/recall_at_{k}/{direction}", "retrieval recall", "fraction", "higher")
CHANCE_RECALL = MetricKey(
    "{stage}/chance_recall_at_{k}/{direction}", "recall of a random ranking", "fraction", "neither"
)
VQA_ACCURACY = MetricKey("{stage}/vqa_accuracy/{kind}", "VQA accuracy", "fraction", "higher")
VQA_MAJORITY = MetricKey(
    "{stage}/vqa_majority/{kind}", "VQA accuracy of the best constant answer", "fraction", "neither"
)
MATCHING_ACCURACY = MetricKey("{stage}/matching_accuracy", "accuracy of image-text matching", "fraction", "higher")
MATCHING_MAJORITY = MetricKey(
    "{stage}/matching_majority", "accuracy of saying that nothing matches", "fraction", "neither"
)
MATCHING_AUC = MetricKey("{stage}/matching_auc", "AUC of image-text matching, 0.5 by chance", "fraction", "higher")
STATEMENT_ACCURACY = MetricKey(
    "{stage}/statement_accuracy/{kind}", "accuracy of true-or-false statements", "fraction", "higher"
)
STATEMENT_MAJORITY = MetricKey(
    "{stage}/statement_majority/{kind}", "accuracy of the more frequent truth", "fraction", "neither"
)
CONSISTENCY = MetricKey(
    "{stage}/statement_consistency", "texts all of whose statements are judged rightly", "fraction", "higher"
)
CHANCE_CONSISTENCY = MetricKey("{stage}/chance_statement_consistency", "consistency of a coin", "fraction", "neither")
ZERO_SHOT = MetricKey("{stage}/zero_shot/{score}", "zero-shot classification", "fraction", "higher")
ZERO_SHOT_BASELINE = MetricKey(
    "{stage}/zero_shot_baseline/{score}", "accuracy without looking at the image", "fraction", "neither"
)
LINEAR_PROBE = MetricKey("{stage}/linear_probe/{score}", "linear probe on image features", "fraction", "higher")
KNN = MetricKey("{stage}/knn/{score}", "nearest neighbours of image features", "fraction", "higher")
PROBE_BASELINE = MetricKey(
    "{stage}/probe_baseline/{score}", "accuracy without looking at the image", "fraction", "neither"
)
PERPLEXITY = MetricKey("{stage}/perplexity/{term}", "perplexity per token", "", "lower")
UNIGRAM_PERPLEXITY = MetricKey(
    "{stage}/unigram_perplexity/{term}", "perplexity of training frequencies alone", "", "neither"
)
CAPTION_SCORE = MetricKey("{stage}/caption/{score}", "score of generated captions", "", "higher")
CAPTION_CHANCE = MetricKey("{stage}/caption_chance/{score}", "score of another image's caption", "", "neither")

EXPERT_LOAD = MetricKey(
    "load/block{block}/{modality}/expert{expert}", "expert load", "fraction of kept pairs", "neither"
)
LOAD_ENTROPY = MetricKey("load_entropy/block{block}/{modality}", "load entropy / ln E", "fraction", "higher")
TOKEN_ENTROPY = MetricKey("token_entropy/block{block}/{modality}", "mean token entropy / ln E", "fraction", "neither")
MAX_VIOLATION = MetricKey("max_violation/block{block}/{modality}", "max load / mean load - 1 (MaxVio)", "", "lower")
DROP_RATE = MetricKey("drop_rate/block{block}/{modality}", "dropped pairs", "fraction", "lower")
EVAL_DROP_RATE = MetricKey(
    "{stage}/drop_rate/block{block}/{modality}", "dropped pairs on held-out data", "fraction", "lower"
)
DEAD_EXPERTS = MetricKey("dead_experts/block{block}/{modality}", "experts without a token", "experts", "lower")
CAPACITY = MetricKey("capacity/block{block}/{modality}", "capacity factor after rounding", "", "neither")
LOGIT_MAX = MetricKey("router_logit_max/block{block}/{modality}", "largest |router logit|", "", "neither")

ROUTER_SATURATION = MetricKey(
    "router_saturation_at_{percent}/block{block}/{modality}",
    "final choices of experts that are made at a percentage of training",
    "fraction",
    "neither",
)
EXPERT_NMI = MetricKey(
    "expert_nmi/block{block}/{tokens}/{label}", "information of experts and a label (NMI)", "fraction", "neither"
)
EXPERT_NMI_BY_CHANCE = MetricKey(
    "expert_nmi_by_chance/block{block}/{tokens}/{label}",
    "NMI of experts and a label if samples exchange labels",
    "fraction",
    "neither",
)
TOP_CATEGORY = MetricKey(
    "expert_top_category/block{block}/{tokens}/expert{expert}",
    "an expert's tokens of objects that are of its most frequent category",
    "fraction",
    "neither",
)
TOP_CATEGORY_BASE = MetricKey(
    "expert_top_category_base/block{block}/{tokens}",
    "tokens of objects that are of the most frequent category",
    "fraction",
    "neither",
)
SHADOW_FLIP_RATE = MetricKey(
    "shadow_flip_rate/block{block}/{modality}", "tokens that fp32 routes elsewhere", "fraction", "lower"
)
SHADOW_LOGIT_ERROR_MAX = MetricKey(
    "shadow_logit_error_max/block{block}/{modality}", "largest |router logit - fp32|", "", "lower"
)
SHADOW_LOGIT_ERROR_RMS = MetricKey(
    "shadow_logit_error_rms/block{block}/{modality}", "RMS of router logit - fp32", "", "lower"
)
SHADOW_LOSS_ERROR = MetricKey("shadow_loss_error", "|task loss - fp32|", "sum of term losses", "lower")
REGION_LOGIT_ERROR = MetricKey(
    "shadow_region_logit_error_rms/{region}", "RMS of router logit - fp32, one region narrow", "", "lower"
)
REGION_FLIP_RATE = MetricKey(
    "shadow_region_flip_rate/{region}", "tokens that fp32 routes elsewhere, one region narrow", "fraction", "lower"
)
REGION_LOSS_ERROR = MetricKey(
    "shadow_region_loss_error/{region}", "|task loss - fp32|, one region narrow", "sum of term losses", "lower"
)
ATTENTION_LOGIT_MAX = MetricKey("attention_logit_max/block{block}", "largest attention logit", "", "neither")
LOG_PARTITION_MAX = MetricKey(
    "output_log_partition_max/{term}", "largest |logsumexp of the output logits|", "", "neither"
)

QK_CLIPPED_HEADS = MetricKey(
    "action/qk_clipped_heads", "heads clipped since the last logging step", "heads x steps", "neither"
)
REVIVED_EXPERTS = MetricKey("action/revived_experts/{layer}", "experts revived", "experts", "neither")
ROUTER_FROZEN = MetricKey("action/router_frozen", "routers frozen from here on", "", "neither")
ANTICIPATED_ROUTING = MetricKey(
    "action/anticipated_routing", "experts chosen by older routers from here on (1), or no longer (0)", "", "neither"
)
ROLLBACK = MetricKey("action/rollback_to_step", "rolled back to the state after step", "optimiser steps", "neither")

LIVENESS = MetricKey("liveness/{switch}", "by how much a switch acts", "unit of the switch", "neither")
BALANCE_GRADIENT_SHARE = MetricKey(
    "balance_gradient_share/{weights}", "gradient of balance losses / whole gradient (R_g)", "", "lower"
)

GRAD_NORM = MetricKey("optim/grad_norm", "gradient norm before clipping", "", "neither")
CLIP_COEFFICIENT = MetricKey("optim/clip_coefficient", "gradient norm after / before clipping", "fraction", "neither")
UPDATE_NORM = MetricKey("optim/update_norm", "norm of the parameters' update", "", "neither")
SKIPPED_STEPS = MetricKey("optim/skipped_steps", "steps left out so far", "optimiser steps", "lower")
LEARNING_RATE = MetricKey("optim/learning_rate", "learning rate", "", "neither")
FIRST_NONFINITE_STEP = MetricKey(
    "stability/first_nonfinite_step", "first step with a non-finite loss", "optimiser steps", "neither"
)
SAMPLES_PER_SECOND = MetricKey("throughput/samples_per_second", "throughput", "samples/s", "higher")
TOKENS_PER_SECOND = MetricKey("throughput/tokens_per_second", "throughput", "tokens/s", "higher")
DATA_WAIT = MetricKey(
    "throughput/data_wait", "time that training waited for batches / time of training", "fraction", "lower"
)
CPU_SECONDS = MetricKey(
    "throughput/cpu_seconds_per_step", "CPU time of a step, all threads of the process", "s/step", "lower"
)
PEAK_DEVICE_MEMORY = MetricKey(
    "memory/peak_device", "peak memory of tensors on the device since training began", "MiB", "lower"
)
PEAK_PROCESS_MEMORY = MetricKey("memory/peak_process", "peak resident memory of the process", "MiB", "lower")
SOURCE_SAMPLES = MetricKey("data/samples/{source}", "samples read so far", "samples", "neither")
SOURCE_EPOCHS = MetricKey("data/epochs/{source}", "how often the source has been read", "epochs", "neither")
SKIPPED_SAMPLES = MetricKey("data/skipped/{cause}", "samples that could not be used so far", "samples", "lower")
CUT_CAPTIONS = MetricKey("data/cut_captions/{source}", "captions that lost their end so far", "fraction", "lower")
TOTAL_PARAMETERS = MetricKey("model/total_parameters", "parameters", "parameters", "neither")
ACTIVE_PARAMETERS = MetricKey("model/active_parameters", "active parameters", "parameters", "neither")
ACTIVE_FLOPS = MetricKey("model/active_flops_per_sample", "active forward FLOPs", "FLOP/sample", "neither")

_OF_VALIDATION = ("val", "val_loss")  # what keys with a stage begin with


def is_untrained(key: str, first_step: int) -> bool:
    """Say whether a metric's first value is the untrained model's; on held-out data only a value at step 0 is."""
    return first_step == 0 or not is_of_validation(key)


def is_of_validation(key: str) -> bool:
    """Say whether a metric is measured in validation."""
    return key.partition("/")[0] in _OF_VALIDATION


ALL: tuple[MetricKey, ...] = tuple(value for value in list(globals().values()) if isinstance(value, MetricKey))

# By family: the one, with braces of the same names, of values that need no model. They are logged beside the metric.
_TRIVIAL: dict[MetricKey, MetricKey] = {
    ACCURACY: MAJORITY_ACCURACY,
    RECALL: CHANCE_RECALL,
    VQA_ACCURACY: VQA_MAJORITY,
    MATCHING_ACCURACY: MATCHING_MAJORITY,
    STATEMENT_ACCURACY: STATEMENT_MAJORITY,
    CONSISTENCY: CHANCE_CONSISTENCY,
    PERPLEXITY: UNIGRAM_PERPLEXITY,
    CAPTION_SCORE: CAPTION_CHANCE,
}


def find_metric(key: str) -> MetricKey | None:
    """Return the declaration of `key`; None if it is not declared."""
    return next((metric for metric in ALL if metric.match(key) is not None), None)


def find_trivial(key: str) -> str | None:
    """Return the key of the value without a model that is logged beside a metric; None if its family has none."""
    metric = find_metric(key)
    trivial = _TRIVIAL.get(metric) if metric is not None else None
    return trivial.key(**(metric.match(key) or {})) if metric is not None and trivial is not None else None


def name_and_unit(key: str) -> tuple[str, str]:
    """Return a metric's declared title, with what its braces stand for, and its unit; else the key and no unit."""
    metric = find_metric(key)
    if metric is None:
        return key, ""
    parts = metric.match(key) or {}
    stage = {"val": "validation ", "train": "training ", "test": "test "}.get(parts.pop("stage", ""), "")
    which = ", ".join(f"{part} {value}" if value.isdigit() else value for part, value in parts.items())
    return stage + metric.title + (f" ({which})" if which else ""), metric.unit
