"""Quantile balancing: solves for the bias under which every expert would have got its share of the step's tokens.

    a_t = (k+1)-th largest of s_te + b_e over the experts            r_te = a_t - s_te
    b_e = (k / E)-quantile of r_te over the tokens of the step       then less the mean over experts

Expert e gets token t where b_e > r_te, so at this quantile it gets k / E of them. Kimi K3 (technical report, section
2.3.3, equations 13 and 14) takes the quantile from a histogram over the whole step: 1,000 equal bins from min b - 1 to
max b + 1 (its appendix D), interpolated within a bin. The rule is Su's (kexue.fm/archives/11619). The report itself
could not be read; equations and constants are as Megatron-LM (pull request 6637), TransformerEngine (3395) and
torchtitan (4577) cite them. The moving average is Megatron-LM's (pull request 5349), where it is off by default too.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_moevlm.common.number_checks import check_number


@final
@dataclass(frozen=True)
class QuantileUpdate:
    """Quantile balancing: the bias of the next step is solved for, not moved by a rate.

    Args:
        memory: share of the old bias in the new one; 0 forgets it, as Kimi K3 does.
        num_bins: bins per expert of the histogram; ranks exchange it after each step.

    Raises:
        UserError: a value outside its range.
    """

    memory: float = 0.0
    num_bins: int = 1000

    def __post_init__(self) -> None:
        check_number("router.update.memory", self.memory, least=0, below=1)
        check_number("router.update.num_bins", self.num_bins, least=2)


def count_required_bias(
    scores_TE: Tensor, bias_AE: Tensor, row_T: Tensor, valid_T: Tensor, top_k: int, num_bins: int
) -> Tensor:
    """Return the histogram of r_te over valid tokens, int64 (rows of the bias, E, bins).

    scores_TE: fp32, within 0 and 1. row_T: int64, the row of the bias that a token was chosen with.
    """
    cutoff_T1 = (scores_TE + bias_AE[row_T]).topk(top_k + 1, dim=-1).values[:, -1:]
    low, width = _bins(bias_AE, num_bins)
    bin_TE = ((cutoff_T1 - scores_TE - low) / width).floor().clamp(0, num_bins - 1).to(torch.int64)
    rows, num_experts = bias_AE.shape
    expert_E = torch.arange(num_experts, device=bias_AE.device)
    cell_TE = (row_T.unsqueeze(-1) * num_experts + expert_E) * num_bins + bin_TE
    counted_TE = valid_T.unsqueeze(-1).expand_as(cell_TE).to(torch.int64)
    zero = torch.zeros(rows * num_experts * num_bins, dtype=torch.int64, device=bias_AE.device)
    return zero.index_add(0, cell_TE.flatten(), counted_TE.flatten()).view(rows, num_experts, num_bins)


def solve_bias(histogram_AEN: Tensor, bias_AE: Tensor, share: float) -> Tensor:
    """Return the bias below which this share of r_te lies, per row and expert; a row without tokens keeps its own.

    histogram_AEN: int64, of `count_required_bias` with this bias, fp32.
    """
    num_bins = histogram_AEN.shape[-1]
    low, width = _bins(bias_AE, num_bins)
    up_to_AEN = histogram_AEN.cumsum(dim=-1)
    num_AE1 = up_to_AEN[..., -1:]
    wanted_AE1 = num_AE1.double() * share
    bin_AE1 = (up_to_AEN < wanted_AE1).sum(dim=-1, keepdim=True).clamp(max=num_bins - 1)
    inside_AE1 = histogram_AEN.gather(-1, bin_AE1)
    before_AE1 = up_to_AEN.gather(-1, bin_AE1) - inside_AE1
    part_AE1 = ((wanted_AE1 - before_AE1) / inside_AE1.clamp(min=1)).clamp(0, 1)
    solved_AE = (low + (bin_AE1 + part_AE1) * width).squeeze(-1).to(bias_AE.dtype)
    return torch.where(num_AE1.squeeze(-1) > 0, solved_AE, bias_AE)


def _bins(bias_AE: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return where the first bin starts, and the width of each."""
    low, high = bias_AE.amin() - 1, bias_AE.amax() + 1
    return low, (high - low) / num_bins
