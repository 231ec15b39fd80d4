"""Probes of frozen features, held against their definitions."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lightning_moevlm.model.metrics.tasks.probes import linear_probe, nearest_neighbours


def blobs(num: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three corners of six dimensions that differ in scale; class 2 of 4 has no sample."""
    generator = torch.Generator().manual_seed(seed)
    class_N = torch.tensor([0, 1, 3])[torch.randint(0, 3, (num,), generator=generator)]
    center = 3.0 * torch.eye(6)[class_N]
    noise = spread * torch.randn(num, 6, generator=generator)
    return (center + noise) * torch.tensor([1.0, 10.0, 0.1, 5.0, 1.0, 1.0]), class_N


def test_separable_classes_are_found_and_unseen_ones_never_chosen() -> None:
    (train, class_N), (held, class_M) = blobs(120, 0, 0.3), blobs(60, 1, 0.3)
    scores = linear_probe(train, class_N, held, 4)
    assert (scores.argmax(dim=1) == class_M).double().mean() > 0.95
    assert torch.isinf(scores[:, 2]).all() and torch.isfinite(scores[:, [0, 1, 3]]).all()


def test_the_strength_is_chosen_on_a_fifth_and_the_most_regularised_wins_a_tie() -> None:
    train, class_N = blobs(60, 2)
    held, _ = blobs(20, 3)
    scaled = (train.double() - train.double().mean(0)) / train.double().std(0)
    others = (held.double() - train.double().mean(0)) / train.double().std(0)
    chosen = np.arange(60) % 5 == 4
    rights = {
        strength: LogisticRegression(C=strength, max_iter=1000)
        .fit(scaled.numpy()[~chosen], class_N.numpy()[~chosen])
        .score(scaled.numpy()[chosen], class_N.numpy()[chosen])
        for strength in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
    }
    best = max(rights, key=lambda strength: (rights[strength], -strength))
    model = LogisticRegression(C=best, max_iter=1000).fit(scaled.numpy(), class_N.numpy())
    found = linear_probe(train, class_N, held, 4)[:, [0, 1, 3]]
    assert np.allclose(found.exp().numpy(), model.predict_proba(others.numpy()), atol=1e-6)


def test_votes_by_hand() -> None:
    # cosines of (1, 0) with the three: 1, 0.6, 0; the two nearest vote e^(1 / 0.5) and e^(0.6 / 0.5)
    train = torch.tensor([[2.0, 0.0], [0.3, 0.4], [0.0, 5.0]])
    votes = nearest_neighbours(train, torch.tensor([1, 0, 0]), torch.tensor([[7.0, 0.0]]), 3, k=2, temperature=0.5)
    assert votes[0].tolist() == pytest.approx([math.exp(1.2), math.exp(2.0), 0.0])


def test_more_neighbours_than_features_are_all_of_them() -> None:
    votes = nearest_neighbours(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), 2, k=20, temperature=0.07)
    assert votes.argmax(dim=1).tolist() == [0, 1]
