"""Routing metrics by hand."""

import math

import pytest
import torch

from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.metrics import routing_metrics
from tests.routing import top_1_plan


def test_by_hand() -> None:
    # four tokens choose experts 0, 0, 0, 1 of four; the third was dropped
    logits_TE = torch.tensor([[5.0, 0, 0, 0], [5.0, 0, 0, 0], [5.0, 0, 0, 0], [0, 5.0, 0, 0]])
    plan = top_1_plan(logits_TE)._replace(kept_N=torch.tensor([True, True, False, True]))
    metrics = routing_metrics([plan], Modality.IMAGE)
    torch.testing.assert_close(metrics.load_E, torch.tensor([2 / 3, 1 / 3, 0.0, 0.0]))
    # H(2/3, 1/3) / ln 4
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(4)
    assert float(metrics.load_entropy) == pytest.approx(expected)
    assert float(metrics.max_violation) == pytest.approx(3 / 1 - 1)  # chosen (3, 1, 0, 0): max 3, mean 1
    assert float(metrics.drop_rate) == pytest.approx(1 / 4)
    assert int(metrics.dead_experts) == 2
    assert float(metrics.logit_max) == 5.0


def test_token_entropy_is_one_when_undecided() -> None:
    assert float(routing_metrics([top_1_plan(torch.zeros(3, 4))], Modality.IMAGE).token_entropy) == pytest.approx(1.0)


def test_modalities_and_padding_are_kept_apart() -> None:
    logits_TE = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 99.0]])
    plan = top_1_plan(logits_TE, valid_T=torch.tensor([True, True, False]))
    plan = plan._replace(modality_T=torch.tensor([int(Modality.IMAGE), int(Modality.TEXT), int(Modality.TEXT)]))
    assert routing_metrics([plan], Modality.IMAGE).load_E.tolist() == [1.0, 0.0]
    text = routing_metrics([plan], Modality.TEXT)
    assert text.load_E.tolist() == [0.0, 1.0]
    assert float(text.logit_max) == 9.0


def test_no_token_of_a_modality_gives_numbers_not_nan() -> None:
    metrics = routing_metrics([top_1_plan(torch.zeros(2, 3))], Modality.TEXT)
    assert all(bool(value.isfinite().all()) for value in metrics)


def test_passes_of_one_layer_count_together() -> None:
    first = top_1_plan(torch.tensor([[9.0, 0.0]]))
    second = top_1_plan(torch.tensor([[0.0, 9.0], [0.0, 9.0]]))
    metrics = routing_metrics([first, second], Modality.IMAGE)
    torch.testing.assert_close(metrics.load_E, torch.tensor([1 / 3, 2 / 3]))
    assert float(metrics.max_violation) == pytest.approx(2 / 1.5 - 1)  # chosen (1, 2): max 2, mean 1.5


def test_counts_are_exact_under_every_default_dtype() -> None:
    # 257 of 600 tokens at expert 0: bf16 has no 257
    logits_TE = torch.where(torch.arange(600).unsqueeze(-1) < 257, torch.tensor([1.0, 0]), torch.tensor([0.0, 1]))
    torch.set_default_dtype(torch.bfloat16)
    try:
        metrics = routing_metrics([top_1_plan(logits_TE)], Modality.IMAGE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert metrics.load_E.tolist() == pytest.approx([257 / 600, 343 / 600], rel=1e-6)
    assert float(metrics.max_violation) == pytest.approx(343 * 2 / 600 - 1, rel=1e-6)
