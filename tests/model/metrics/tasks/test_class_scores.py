"""Scores by class, by hand."""

import pytest
import torch

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.model.metrics.tasks.class_scores import count_hits, score_classes


def test_scores_by_hand() -> None:
    # of 7 classes; class 0: right, third, last; class 1: right; a class that is not among them is never right
    order = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 0, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0], [1, 0, 2, 3, 4, 5, 6]])
    scores = torch.zeros(4, 7).scatter_(1, order, torch.arange(7, 0, -1.0).expand(4, 7))
    hits = count_hits(scores, torch.tensor([0, 0, 0, 1]))
    assert {number: counts.tolist() for number, counts in hits.items()} == {0: [1, 2, 3], 1: [1, 1, 1]}
    hits |= count_hits(scores[:1], torch.tensor([-1]))
    found = score_classes(hits, 7, "val", metric_keys.KNN, metric_keys.PROBE_BASELINE)
    assert found == pytest.approx(
        {
            "val/knn/top1": 2 / 5,
            "val/knn/top5": 3 / 5,
            "val/knn/mean_per_class": (1 / 3 + 1 + 0) / 3,
            "val/probe_baseline/chance": 1 / 7,
            "val/probe_baseline/majority": 3 / 5,
        }
    )
    assert score_classes({}, 7, "val", metric_keys.KNN, metric_keys.PROBE_BASELINE) == {}


def test_no_sample_has_no_hits() -> None:
    assert count_hits(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == {}
