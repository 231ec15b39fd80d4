"""Precision policy: the dtype that each component computes in."""

from lightning_moevlm.model.precision.policy import (
    REGIONS,
    PrecisionPolicy,
    Region,
    RegionDtype,
    Simulation,
    float32_everywhere,
)
from lightning_moevlm.model.precision.regions import region, region_of_parameters, set_precision, use_precision
from lightning_moevlm.model.precision.rounding import rounded, straight_through
from lightning_moevlm.model.precision.simulated import SimulatedArithmetic

__all__ = [
    "REGIONS",
    "PrecisionPolicy",
    "Region",
    "RegionDtype",
    "SimulatedArithmetic",
    "Simulation",
    "float32_everywhere",
    "region",
    "region_of_parameters",
    "rounded",
    "set_precision",
    "straight_through",
    "use_precision",
]
