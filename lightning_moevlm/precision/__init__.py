"""Which component computes in which dtype."""

from lightning_moevlm.precision.regions import PrecisionPolicy, RegionDtype, region

__all__ = ["PrecisionPolicy", "RegionDtype", "region"]
