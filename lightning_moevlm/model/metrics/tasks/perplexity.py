"""Perplexity of texts: the number of tokens among which a model is as unsure as if all of them were equally likely.

    perplexity = exp(mean over all predicted tokens of -ln p(token | those before it)), [EOS] included

It is per token, so values of two tokenizers are not comparable. Terms of masked modelling have none: a word is
predicted there from both sides, and many words are hidden at once.
"""

import math
from collections.abc import Iterable

import torch

from lightning_moevlm.contracts import metric_keys
from lightning_moevlm.contracts.step_records import ObjectiveOutput
from lightning_moevlm.model.metrics.measure import Measure, Measured
from lightning_moevlm.model.metrics.running_sums import RunningSums


class Perplexity(Measure):
    """Adds up the log-likelihoods of terms that predict next tokens.

    Args:
        terms: whose raw value is a mean over tokens, in nats.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        self._terms = frozenset(terms)
        self._sums = RunningSums[str]()  # nats, tokens

    def update(self, output: ObjectiveOutput) -> None:
        """Add one batch."""
        for name in self._terms & output.terms.keys():
            term = output.terms[name]
            assert term.num_predictions is not None
            raw = term.raw.double()
            self._sums.add(name, torch.stack([raw, torch.ones_like(raw)]) * term.num_predictions)

    def compute(self, stage: str) -> Measured:
        """Return the perplexity of every term that had a token."""
        totals = {name: sums.tolist() for name, sums in self._sums.totals().items()}
        return Measured(
            {
                metric_keys.PERPLEXITY.key(stage=stage, term=name): exp(nats / number)
                for name, (nats, number) in totals.items()
                if number
            }
        )

    def reset(self) -> None:
        """Forget all batches."""
        self._sums.reset()


def exp(nats: float) -> float:
    """Return e^nats; infinity where it is too large for a float."""
    return math.exp(nats) if nats < math.log(1e308) else math.inf
