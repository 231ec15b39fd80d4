"""Score functions: from a token's logits to its scores of the experts.

sigmoid         1 / (1 + e^-l): each expert on its own, within 0 and 1 (DeepSeek-V3, arXiv 2412.19437)
softmax         e^l / sum of e^l: experts against each other
sqrt_softplus   sqrt(ln(1 + e^l)): each on its own, without an upper end, so that it does not saturate (DeepSeek-V4;
                its report could not be read, the function is as its ports have it)
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Score = Literal["sigmoid", "softmax", "sqrt_softplus"]

_LEAST = 1e-20  # the square root has no slope at 0


def score_logits(logits_TE: Tensor, score: Score) -> Tensor:
    """Return the scores, (T, E), at least 0."""
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    return logits_TE.sigmoid() if score == "sigmoid" else F.softplus(logits_TE).clamp(min=_LEAST).sqrt()
