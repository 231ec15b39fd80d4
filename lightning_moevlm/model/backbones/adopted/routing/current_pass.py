"""What a forward pass is about while it runs, and the plans that it makes.

An adopted router sees a list of tokens and no more. The current pass says of which modality each of them is and which
are padding. Gradient checkpointing runs layers again during the backward pass, perhaps after another forward pass has
begun. The pass of a layer is therefore taken along (`checkpoint_contexts`), and nothing is recorded twice.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from torch import Tensor

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality, PairPlan, RoutingInput
from lightning_moevlm.model.layers.feed_forward.feed_forward import RoutedPlan


class Tokens(NamedTuple):
    """The sequences of a pass.

    modality_BS: int64, `Modality` values, at any positions.
    valid_BS: bool, False on padding.
    modalities: those that occur.
    """

    modality_BS: Tensor
    valid_BS: Tensor
    modalities: tuple[Modality, ...] = tuple(Modality)


class Places(NamedTuple):
    """The tokens that a router sees.

    inputs: them, with modality and padding.
    index_T: int64, their places among all tokens of the pass; None: these are all of them.
    """

    inputs: RoutingInput
    index_T: Tensor | None


class CurrentPass:
    """The pass that runs now; one for all layers of a model."""

    def __init__(self) -> None:
        self._tokens: Tokens | None = None  # those of the last pass stay, for layers that are run again alone
        self._records = False
        self._plans: list[RoutedPlan] = []

    @property
    def tokens(self) -> Tokens:
        """The sequences of the pass."""
        assert self._tokens is not None, "an adopted layer runs inside a pass"
        return self._tokens

    @contextmanager
    def open(self, tokens: Tokens) -> Iterator[list[RoutedPlan]]:
        """Record the plans of a pass over such sequences, in the order in which they are made."""
        self._tokens, self._records, self._plans = tokens, True, []
        try:
            yield self._plans
        finally:
            self._records, self._plans = False, []

    def record(self, plan: RoutedPlan) -> None:
        """Keep a plan; while a layer is run again, nothing."""
        if self._records:
            self._plans.append(plan)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed layer, as torch's `context_fn`: of its pass, and of its second run."""
        return nullcontext(), _Again(self, self._tokens)

    def swap(self, tokens: Tokens | None, records: bool) -> tuple[Tokens | None, bool]:
        """Let another pass run, and return the one before with whether it records."""
        before = self._tokens, self._records
        self._tokens, self._records = tokens, records
        return before

    def place(self, tokens_TD: Tensor, modality: Modality | None) -> Places:
        """Return what a router's tokens are.

        Args:
            tokens_TD: tokens of the whole sequence, or those of one modality.
            modality: of the only tokens that the layer may get without the others; None: it gets all of them.

        Raises:
            UserError: as many tokens as neither has.
        """
        modality_T, valid_T = (values_BS.reshape(-1) for values_BS in self.tokens[:2])
        num_sequences = len(self.tokens.valid_BS)
        if len(tokens_TD) == len(modality_T):
            return Places(RoutingInput(tokens_TD, modality_T, valid_T, num_sequences), None)
        index_T = (modality_T == modality).nonzero().squeeze(1) if modality is not None else modality_T[:0]
        if len(tokens_TD) != len(index_T):
            raise UserError(
                f"a router of the adopted model got {len(tokens_TD)} tokens in a pass of {len(modality_T)}: it sees "
                "another sequence than the language model's, and its plans would be of unknown tokens; choose a model "
                "whose experts are in its language model"
            )
        return Places(RoutingInput(tokens_TD, modality_T[index_T], valid_T[index_T]), index_T)


class _Again:
    """Runs a layer again in the pass that it belongs to, recording nothing; may be entered many times."""

    def __init__(self, current: CurrentPass, tokens: Tokens | None) -> None:
        self._current, self._tokens = current, tokens
        self._before: list[tuple[Tokens | None, bool]] = []

    def __enter__(self) -> None:
        self._before.append(self._current.swap(self._tokens, False))

    def __exit__(self, *_: object) -> None:
        self._current.swap(*self._before.pop())


def spread(plan: PairPlan, index_T: Tensor, tokens: Tokens) -> PairPlan:
    """Return a plan of some tokens as one of the whole sequences, in which the others are padding."""
    modality_T = tokens.modality_BS.reshape(-1)

    def whole(values: Tensor) -> Tensor:
        return values.new_zeros(len(modality_T), *values.shape[1:]).index_copy(0, index_T, values)

    return plan._replace(
        token_N=index_T[plan.token_N],
        logits_TE=whole(plan.logits_TE),
        probs_TE=whole(plan.probs_TE),
        modality_T=modality_T,
        valid_T=whole(plan.valid_T),
        num_sequences=len(tokens.valid_BS),
        noise_std_TE=None if plan.noise_std_TE is None else whole(plan.noise_std_TE),
        noisy_logits_TE=None if plan.noisy_logits_TE is None else whole(plan.noisy_logits_TE),
        num_choices=None,
    )
