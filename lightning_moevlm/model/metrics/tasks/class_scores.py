"""Scores of classification by class, beside what needs no image.

mean per class = mean over the classes that occur of the share of their samples that is right at once
chance         = 1 / classes
majority       = share of the most frequent class, found in hindsight
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_moevlm.contracts.metric_keys import MetricKey

AT = 5


def count_hits(scores_BC: Tensor, class_B: Tensor) -> dict[int, Tensor]:
    """Return by class: hits of top-1, hits of top-5, samples.

    Args:
        scores_BC: of every class, the largest is the answer.
        class_B: the true class; one outside of 0 to C - 1 is never hit.
    """
    top_BK = scores_BC.topk(min(AT, scores_BC.shape[1]), dim=1).indices.cpu()
    hit_BK = top_BK == class_B.unsqueeze(-1)
    counts_B3 = torch.stack([hit_BK[:, 0], hit_BK.any(dim=1), torch.ones(len(class_B), dtype=torch.bool)], dim=1)
    return {number: counts_B3[class_B == number].sum(dim=0) for number in class_B.unique().tolist()}


def score_classes(
    hits: Mapping[int, Tensor], num_classes: int, stage: str, scores: MetricKey, baselines: MetricKey
) -> dict[str, float]:
    """Return scores and baselines under their keys; {} without a sample.

    Args:
        hits: of `count_hits`, over all batches.
        num_classes: to choose from.
        stage: the prefix of the keys.
        scores: the family of the model's scores.
        baselines: the family of chance and majority.
    """
    if not hits:
        return {}
    sums_C3 = torch.stack(list(hits.values())).double()
    number = sums_C3[:, 2].sum()
    found = {
        "top1": sums_C3[:, 0].sum() / number,
        f"top{AT}": sums_C3[:, 1].sum() / number,
        "mean_per_class": (sums_C3[:, 0] / sums_C3[:, 2]).mean(),
    }
    without = {"chance": torch.tensor(1 / num_classes), "majority": sums_C3[:, 2].max() / number}
    values = {scores.key(stage=stage, score=name): float(value) for name, value in found.items()}
    return values | {baselines.key(stage=stage, score=name): float(value) for name, value in without.items()}
