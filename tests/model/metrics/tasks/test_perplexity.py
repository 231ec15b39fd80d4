"""Perplexity by hand."""

import math

import pytest
import torch

from lightning_moevlm.contracts.step_records import ObjectiveOutput, Term
from lightning_moevlm.model.metrics.tasks.perplexity import Perplexity


def output(**terms: tuple[float, int]) -> ObjectiveOutput:
    named = {name: Term(torch.tensor(raw), 0.5, count) for name, (raw, count) in terms.items()}
    return ObjectiveOutput(named, {}, (), 0)


def test_it_is_over_the_tokens_of_all_batches() -> None:
    # two tokens of 1/4 and six of 1/16: (2 ln 4 + 6 ln 16) / 8 = 14/8 ln 4, so 4^1.75
    measure = Perplexity(["text", "caption"])
    measure.update(output(text=(math.log(4), 2), image=(9.0, 9)))
    measure.update(output(text=(math.log(16), 6), caption=(0.0, 0)))
    assert measure.compute("val").values == {"val/perplexity/text": pytest.approx(4**1.75)}
    measure.reset()
    assert measure.compute("val").values == {}


def test_a_model_that_is_far_off_is_infinitely_unsure() -> None:
    measure = Perplexity(["text"])
    measure.update(output(text=(1000.0, 1)))
    assert measure.compute("test").values == {"test/perplexity/text": math.inf}
