"""Times routing and dispatch without expert work: router, sort, gather, combine, forward and backward."""

from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from torch import Tensor, nn

from lightning_moevlm.bench.candidates import DENSE, Candidate, DenseTwin, Layer, training
from lightning_moevlm.bench.cases import Case, Shape, make_tokens
from lightning_moevlm.bench.timing import Seconds, interleave, ratio
from lightning_moevlm.model.dispatch import Linear, SegmentDispatcher

_TOKENS = (512, 2048, 8192, 32768)
_EXPERTS = (4, 8, 32, 128)


class IdentityExperts(nn.Module):
    """Experts that return their rows."""

    def stacks(self) -> tuple[Tensor, ...]:
        """Return no stack."""
        return ()

    def run(self, rows_ND: Tensor, weights: tuple[Tensor, ...], linear: Linear) -> Tensor:
        """Return the rows."""
        return rows_ND

    def activation(self) -> None:
        """Return None: nothing is between matrix stages."""
        return


class Growth(NamedTuple):
    """Times of dispatch alone by shape, and of the dense FFN at T=2048."""

    seconds: Seconds
    shapes: dict[str, Shape]

    @property
    def over_dense(self) -> float:
        """Dispatch alone over the dense FFN at T=2048, E=8."""
        return ratio(self.seconds, self._name(2048, 8), DENSE).fairest

    @property
    def tokens_ratio(self) -> float:
        """Time per token at the largest T over that at 2048."""
        return ratio(self.seconds, self._name(_TOKENS[-1], 8), self._name(2048, 8)).fairest / (_TOKENS[-1] / 2048)

    @property
    def experts_ratio(self) -> float:
        """Time at the largest E over that at the smallest."""
        return ratio(self.seconds, self._name(2048, _EXPERTS[-1]), self._name(2048, _EXPERTS[0])).fairest

    def records(self) -> list[dict[str, object]]:
        """Return one record per shape, as `--json` writes them."""
        medians = {name: sorted(times)[len(times) // 2] for name, times in self.seconds.items()}
        return [
            {
                "bench": "dispatch",
                "shape": asdict(shape),
                "skew": "balanced",
                "dtype": "float32",
                "device": "cpu",
                "impl": "dispatch alone",
                "median_ms": round(1e3 * medians[name], 3),
                "ratio_dense": round(medians[name] / medians[DENSE], 4) if shape.T == 2048 else None,
                "ratio_gemm": None,
                "peak_mib": None,
            }
            for name, shape in self.shapes.items()
        ]

    def _name(self, T: int, E: int) -> str:
        return next(name for name, shape in self.shapes.items() if (shape.T, shape.E) == (T, E))


def growth_shapes() -> dict[str, Shape]:
    """Return the shapes over which T and E grow, by name."""
    pairs = dict.fromkeys([*((T, 8) for T in _TOKENS), *((2048, E) for E in _EXPERTS)])
    return {f"dispatch alone T={T} E={E}": Shape(T, 256, 1024, E, act="gelu") for T, E in pairs}


def measure_growth(rounds: int, tick: Callable[[], None]) -> Growth:
    """Time dispatch alone over growing T and E, and the dense FFN."""
    shapes = growth_shapes()
    dense_case = Case(Shape(2048, 256, 1024, 8, act="gelu"), "balanced")
    candidates = [training(DENSE, DenseTwin(dense_case.shape), make_tokens(dense_case))]
    candidates += [_alone(name, Case(shape, "balanced")) for name, shape in shapes.items()]
    return Growth(interleave(candidates, rounds, tick), shapes)


def _alone(name: str, case: Case) -> Candidate:
    tokens = make_tokens(case)
    layer = Layer(case, tokens, SegmentDispatcher())
    layer.experts = IdentityExperts()
    return training(name, layer, tokens)
