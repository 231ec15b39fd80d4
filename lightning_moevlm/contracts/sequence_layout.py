"""The layout of a token sequence: its modalities and their spans."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moevlm.contracts.routing_plan import Modality


class Span(NamedTuple):
    """Sequence positions start..stop-1 hold tokens of one modality."""

    modality: Modality
    start: int
    stop: int


class Layout(NamedTuple):
    """Spans of the modalities in a sequence, and its real positions.

    spans: in order and without gaps; empty if images stand inside texts.
    valid_BS: bool, False on padding.
    identity_BS: int64, token ids and patch codes; None if no router reads them.
    causal: text sees no later text, and patches see no text.
    separate: no attention between modalities; image and text of a pair share only the feed-forwards.
    inside_BS: int64, modality of each position where images stand inside texts, at other places in each sequence.
    """

    spans: tuple[Span, ...]
    valid_BS: Tensor
    identity_BS: Tensor | None = None
    causal: bool = False
    separate: bool = False
    inside_BS: Tensor | None = None

    @property
    def modality_BS(self) -> Tensor:
        """Modality of each position of each sequence, int64."""
        return self._modality(len(self.valid_BS)) if self.inside_BS is None else self.inside_BS

    @property
    def modality_S(self) -> Tensor:
        """Modality of each position, int64; of spans, which are the same in every sequence."""
        return self._modality(1)[0]

    def _modality(self, num_sequences: int) -> Tensor:
        """Return the modality of each position, filled in on the device: a copy from the host could wait for it."""
        device = self.valid_BS.device
        pieces = [torch.full((num_sequences, s.stop - s.start), int(s.modality), device=device) for s in self.spans]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def last(self, num_positions: int) -> "Layout":
        """Return the last positions alone; spans that have none of them are kept, empty."""
        first = self.valid_BS.shape[1] - num_positions
        spans = tuple(Span(s.modality, max(0, s.start - first), max(0, s.stop - first)) for s in self.spans)
        identity_BS = None if self.identity_BS is None else self.identity_BS[:, first:]
        return self._replace(spans=spans, valid_BS=self.valid_BS[:, first:], identity_BS=identity_BS)

    def select(self, span: Span) -> "Layout":
        """Return the layout of one span alone."""
        inner = Span(span.modality, 0, span.stop - span.start)
        identity_BS = None if self.identity_BS is None else self.identity_BS[:, span.start : span.stop]
        return Layout((inner,), self.valid_BS[:, span.start : span.stop], identity_BS, self.causal, self.separate)
