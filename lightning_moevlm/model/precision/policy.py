"""Precision by component: one policy names every dtype that differs from the Trainer's.

The router is the region that matters most: Switch Transformers (arXiv 2101.03961, section 2.4) diverged with a
bf16 router and trained as well as fp32 with a fp32 router inside a bf16 trunk.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from lightning_moevlm.common.errors import UserError

RealDtype = Literal["float32", "bfloat16", "float16"]
"""A dtype that a region can really compute in."""

RegionDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
"""A dtype that a region may be pinned to; the names are torch's, and fp8 is for `simulate` alone."""

Region = Literal["trunk", "router", "attention_logits", "norms", "experts", "heads", "losses", "optimizer_state"]
"""The named parts of a model that may compute in a dtype of their own."""

REGIONS: tuple[Region, ...] = get_args(Region)


@dataclass(frozen=True)
class Simulation:
    """Round to a region's dtype and compute in fp32, so that a precision can be studied on hardware that lacks it.

    What each matrix product, attention, norm, activation, embedding and loss of the region reads and writes is rounded
    (inputs, weights, outputs; of attention the logits and probabilities too). The rounding is straight-through: its
    gradient is the identity, also where fp8 saturates.

    Args:
        gradients: round gradients as well, to the same format, those of float8_e4m3fn to float8_e5m2 as in the hybrid
            recipe (arXiv 2209.05433, section 3); off, the backward pass is that of fp32.
        scale: fp8 alone: scale each tensor so that its largest magnitude is the largest number of the format, and back
            (arXiv 2209.05433, section 3). Off, larger magnitudes saturate.
    """

    gradients: bool = False
    scale: bool = True


@dataclass(frozen=True)
class PrecisionPolicy:
    """The dtype of each region; null follows `trunk`, and where that is null too the Trainer's precision.

    Always fp32: a router's softmax and top-k, the logits, probabilities and weights of a plan, auxiliary losses (they
    read the plan), and a router's balancing state. Counts are integers.

    Args:
        router: the router's matrix product; its weights stay fp32 under bf16-true and 16-true.
        attention_logits: queries x keys, softmax, and the product with the values.
        norms: LayerNorm and RMSNorm of the trunk, those of queries and keys too.
        experts: stacked experts and the sum over a token's experts.
        heads: output heads of the objective, norms included.
        losses: task losses; their mean has the same dtype.
        optimizer_state: moments of the optimiser. torch keeps them in the dtype of the parameters, so a lower one needs
            `simulate`: they are rounded after each step.
        trunk: everything else: embeddings, projections of attention, dense feed-forwards.
        simulate: round to the pinned dtypes instead of computing in them; null computes in them.

    Raises:
        UserError: a dtype that needs `simulate`.
    """

    router: RegionDtype | None = "float32"
    attention_logits: RegionDtype | None = None
    norms: RegionDtype | None = None
    experts: RegionDtype | None = None
    heads: RegionDtype | None = None
    losses: RegionDtype | None = "float32"
    optimizer_state: RegionDtype | None = None
    trunk: RegionDtype | None = None
    simulate: Simulation | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.simulate is not None:
            return
        for name in REGIONS:
            dtype = getattr(self, name)
            if dtype is not None and dtype not in get_args(RealDtype):
                raise UserError(
                    f"precision.{name} is {dtype}, which needs simulation: choose from "
                    f"{', '.join(get_args(RealDtype))}, set precision.simulate to {{}}, or use the callback "
                    "Float8Training on a GPU"
                )
        if self.optimizer_state in ("bfloat16", "float16"):
            raise UserError(
                f"precision.optimizer_state is {self.optimizer_state}: torch's optimisers keep their state in the "
                "dtype of the parameters; set precision.simulate to {} to round it after each step, or leave it null"
            )

    def dtype_of(self, region: Region) -> RegionDtype | None:
        """Return what a region computes in; None is the Trainer's precision."""
        pinned: RegionDtype | None = getattr(self, region)
        return self.trunk if pinned is None and region != "optimizer_state" else pinned

    def simulates(self, region: Region) -> bool:
        """Return whether a region is rounded instead of computed in its dtype."""
        return self.simulate is not None and self.dtype_of(region) not in (None, "float32")

    def with_region(self, region: Region, dtype: RegionDtype | None) -> "PrecisionPolicy":
        """Return this policy with one region pinned."""
        return replace(self, **{region: dtype})  # type: ignore[arg-type]


def float32_everywhere() -> PrecisionPolicy:
    """Return the policy that computes every region in fp32, under any precision of the Trainer."""
    return PrecisionPolicy(**dict.fromkeys(REGIONS, "float32"))  # type: ignore[arg-type]


assert {entry.name for entry in fields(PrecisionPolicy)} == {*REGIONS, "simulate"}
