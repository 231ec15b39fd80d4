"""Information, p values, null models and lifts, by hand or against a slower way."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lightning_moevlm.atlas.labels.label_tokens import TokenLabels
from lightning_moevlm.atlas.routing.confidence import ConfidenceMeter
from lightning_moevlm.atlas.routing.route import LayerChoices, RoutedBatch
from lightning_moevlm.atlas.routing.trace import TracedLayer
from lightning_moevlm.atlas.statistics.information import entropy, mutual_information, normalise
from lightning_moevlm.atlas.statistics.null_models import BlockPairs, Shape, draw_samples, draw_shifts, draw_units
from lightning_moevlm.atlas.statistics.p_values import permutation_p
from lightning_moevlm.atlas.statistics.together import count_together
from lightning_moevlm.contracts.routing_plan import Modality


def test_information_by_hand() -> None:
    # two experts, two values: one decides the other, so that I = H = ln 2
    certain = mutual_information(np.array([[5.0, 0.0], [0.0, 5.0]]))
    assert certain.whole == pytest.approx(np.log(2)) and certain.of_expert_E == pytest.approx([np.log(2)] * 2)
    # independent: 0
    nothing = mutual_information(np.array([[2.0, 4.0], [1.0, 2.0]]))
    assert nothing.whole == pytest.approx(0, abs=1e-12) and nothing.of_expert_E == pytest.approx([0, 0], abs=1e-12)
    # I(1_e; V) of the first of three experts: H(V) - H(V | expert 0) p - H(V | others) (1 - p)
    counts_EV = np.array([[4.0, 0.0], [1.0, 2.0], [0.0, 3.0]])
    by_hand = entropy(np.array([5.0, 5.0])) - 0.4 * 0 - 0.6 * entropy(np.array([1.0, 5.0]))
    assert mutual_information(counts_EV).of_expert_E[0] == pytest.approx(by_hand)
    assert normalise(np.array([0.3]), np.array([0.6]), np.array([2.0])) == pytest.approx([0.5])
    assert normalise(np.array([0.0]), np.array([0.0]), np.array([2.0])) == pytest.approx([0.0])


def test_p_of_draws() -> None:
    draws = np.arange(99.0)[:, None]  # 0 to 98
    assert permutation_p(np.array([49.5]), draws) == pytest.approx([(1 + 49) / 100])
    assert permutation_p(np.array([1.0]), np.ones((99, 1))) == pytest.approx([1.0])  # a rule that always gives this
    chi_squared = np.random.default_rng(0).chisquare(5, (999, 1))
    assert permutation_p(np.array([30.0]), chi_squared)[0] == pytest.approx(1.5e-5, rel=0.9)  # sf(30) of 5 degrees
    assert permutation_p(np.array([200.0]), chi_squared)[0] < 1e-20


def block(code_BS: list[list[int]], expert_BS: list[list[int]]) -> BlockPairs:
    """A block in which -1 is a position without a token."""
    code_BS, expert_BS = np.array(code_BS), np.array(expert_BS)
    known_BS = code_BS >= 0
    row_N, position_N = np.nonzero(known_BS)
    expert_N = expert_BS[row_N, position_N]
    return BlockPairs(known_BS, np.maximum(code_BS, 0), row_N, position_N, expert_N, np.ones(len(row_N)))


def test_a_rule_by_position_is_the_same_in_every_draw_of_samples() -> None:
    # experts 0, 1, 0 by position; texts of 3, 2 and 3 words
    rule = block([[0, 1, 2], [2, 1, -1], [1, 0, 0]], [[0, 1, 0]] * 3)
    observed = np.array([[3, 1, 1], [1, 1, 1]])  # values 0, 1, 2 at positions 0 and 2; at position 1
    observed = np.zeros((2, 3))
    np.add.at(observed, (rule.expert_N, rule.code_BS[rule.row_N, rule.position_N]), 1)
    drawn = draw_samples([rule], Shape(2, 3), 50, np.random.default_rng(0))
    assert (drawn == observed).all()
    # experts by sample: the table changes, its margins do not
    by_sample = block([[0, 0], [1, 1], [2, 2]], [[0, 0], [1, 1], [0, 0]])
    drawn = draw_samples([by_sample], Shape(2, 3), 50, np.random.default_rng(0))
    assert len({table.tobytes() for table in drawn}) == 3  # the sample that expert 1 has
    assert (drawn.sum(1) == 2).all() and (drawn.sum(2) == [4, 2]).all()


def test_shifts_keep_each_sample_and_units_keep_each_profile() -> None:
    sample = block([[0, 1, 2, -1]], [[0, 0, 1, 0]])
    drawn = draw_shifts([sample], Shape(2, 3), 60, np.random.default_rng(0))
    # experts 0 0 1 against labels 0 1 2, 1 2 0 and 2 0 1
    expected = {((1, 1, 0), (0, 0, 1)), ((0, 1, 1), (1, 0, 0)), ((1, 0, 1), (0, 1, 0))}
    assert {tuple(map(tuple, table.astype(int).tolist())) for table in drawn} == expected
    # three units of one value each; the first two go to expert 0
    drawn = draw_units(np.array([[4.0, 0], [2, 0], [0, 2]]), np.diag([4.0, 2, 2]), 60, np.random.default_rng(0))
    assert {tuple(table[1].tolist()) for table in drawn} == {(4, 0, 0), (0, 2, 0), (0, 0, 2)}
    assert (drawn.sum(1) == [4, 2, 2]).all()


# two samples of two patches and a word; two layers of two experts, the second of which sees patches alone
FIRST, SECOND = np.array([[0, 0, 1], [0, 1, 1]]), np.array([[1, 1, 0], [1, 0, 0]])
SEEN = {"first": np.ones((2, 3), np.bool_), "second": np.array([[True, True, False]] * 2)}


class HandTrace:
    layers = (TracedLayer("first", 0, 2, False), TracedLayer("second", 1, 2, False))

    def blocks(self, size: int) -> Iterator[slice]:
        yield from (slice(0, 1), slice(1, 2))

    def seen(self, layer: TracedLayer, rows: slice) -> NDArray[np.bool_]:
        return SEEN[layer.layer][rows]

    def chosen(self, layer: TracedLayer, rows: slice) -> NDArray[np.float64]:
        return np.eye(2)[(FIRST if layer.block == 0 else SECOND)[rows]] * self.seen(layer, rows)[..., None]


def test_experts_that_share_tokens_by_hand() -> None:
    together = count_together(HandTrace())  # type: ignore[arg-type]
    assert together.keys() == {(0, 0), (0, 1), (1, 1)}
    assert together[0, 0].tolist() == [[3, 0], [0, 3]] and together[1, 1].tolist() == [[1, 0], [0, 3]]
    # the patches of expert 0 of the first layer go to expert 1 of the second, that of expert 1 to expert 0
    assert together[0, 1].tolist() == [[0, 3], [1, 0]]


def test_confidence_by_hand() -> None:
    top_BS = torch.tensor([[0.95, 0.95, 0.75], [0.65, 0.55, 0.75]])
    is_first_BS = torch.tensor(FIRST) == 0
    first_BS = torch.where(is_first_BS, top_BS, 1 - top_BS)
    probs_BSE = torch.stack([first_BS, 1 - first_BS], dim=-1)
    chosen_BSE = torch.stack([is_first_BS, ~is_first_BS], dim=-1).float()
    layer = LayerChoices("first", 0, torch.ones(2, 3).bool(), chosen_BSE, chosen_BSE * probs_BSE, probs_BSE)
    labels = TokenLabels(SEEN["first"], np.array([Modality.IMAGE, Modality.IMAGE, Modality.TEXT]), {}, {}, (None, None))
    meter = ConfidenceMeter()
    meter.add(RoutedBatch(None, labels, (layer,)))  # type: ignore[arg-type]
    found = meter.of_layer("first")
    image, text = found.of_modality["image"], found.of_modality["text"]
    assert (image.num_tokens, text.num_tokens) == (4, 2)
    assert image.top == pytest.approx((0.95 + 0.95 + 0.65 + 0.55) / 4) and text.top == pytest.approx(0.75)
    assert text.entropy == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), rel=1e-5)
    assert image.histogram == (0, 0, 0, 0, 0, 0.25, 0.25, 0, 0, 0.5) and sum(text.histogram) == text.histogram[7] == 1
    assert found.pairs_E == (3, 3)
    assert found.weight_E == pytest.approx([(0.95 + 0.95 + 0.65) / 3, (0.75 + 0.55 + 0.75) / 3])
