"""`moevlm bench layer`: times whole layers, forward and backward: ours, the dense twin, the ceiling and peers."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch

from lightning_moevlm.bench.candidates import DENSE, GEMM, Candidate, own_candidates
from lightning_moevlm.bench.cases import Case, Tokens, make_tokens
from lightning_moevlm.bench.peers import Peers, peer_candidates
from lightning_moevlm.bench.timing import Seconds, interleave, peak_mib


class LayerResult(NamedTuple):
    """Times and peak memory (MiB, of candidates that allocate) of a case on a device."""

    case: Case
    seconds: Seconds
    peaks: dict[str, float]
    device: str = "cpu"

    def records(self) -> list[dict[str, object]]:
        """Return one record per candidate, as `--json` writes them."""
        medians = {name: statistics.median(times) for name, times in self.seconds.items()}
        shape = asdict(self.case.shape)
        return [
            {
                "bench": "layer",
                "shape": shape,
                "skew": self.case.skew,
                "dtype": "float32",
                "device": self.device,
                "impl": name,
                "median_ms": round(1e3 * median, 3),
                "ratio_dense": round(median / medians[DENSE], 4),
                "ratio_gemm": round(median / medians[GEMM], 4),
                "peak_mib": round(self.peaks[name], 2) if name in self.peaks else None,
            }
            for name, median in medians.items()
        ]


def make_candidates(case: Case, peers: Peers, device: str = "cpu") -> list[Candidate]:
    """Make every candidate that can run the case, on a device."""
    tokens = Tokens(*(each.to(device) for each in make_tokens(case)))
    with torch.device(device):
        return [*own_candidates(case, tokens), *peer_candidates(case, tokens, peers)]


def run_case(
    case: Case, rounds: int, candidates: Sequence[Candidate], tick: Callable[[], None], device: str = "cpu"
) -> LayerResult:
    """Time all candidates of a case together; tick after each step. device: device of the candidates."""
    peaks = {each.name: peak_mib(each.step, each.release, device) for each in candidates if each.release is not None}
    return LayerResult(case, interleave(candidates, rounds, tick), peaks, device)
