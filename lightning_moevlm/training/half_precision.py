"""Keeps pinned regions in fp32 under bf16-true and 16-true.

Lightning casts the whole module. A router's weights would lose their low bits before the first step, and sums over an
evaluation epoch would stop growing (bf16 holds integers up to 256). These keep their dtype here: parameters of regions
pinned to float32, balancing state of routers, modules of image targets, and metrics.
"""

import re
from collections.abc import Iterable

from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.objectives import ImageTargets
from lightning_moevlm.model.precision import PrecisionPolicy, Region, RegionDtype, region_of_parameters
from lightning_moevlm.model.routers import Router

TRAINER_DTYPE: dict[str, RegionDtype] = {
    "bf16-mixed": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float16",
    "16-true": "float16",
}
"""Dtype of computation by the Trainer's precision; float32 for the others."""

_WEIGHTED: tuple[Region, ...] = ("router", "norms", "experts", "heads", "trunk")


class RegionHalfPrecision(HalfPrecision):
    """Lightning's half precision by region; the module replaces Lightning's own with it.

    Args:
        precision: "bf16-true" or "16-true".
        policy: names the regions that stay fp32.
    """

    def __init__(self, precision: str, policy: PrecisionPolicy) -> None:
        assert precision in ("bf16-true", "16-true")
        super().__init__(precision)  # type: ignore[arg-type]
        self.policy = policy

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast everything except the pinned tensors."""
        kept = {name: tensor.detach().clone() for name, tensor in self._pinned(module)}
        metrics = {name: metric.dtype for name, metric in module.named_modules() if isinstance(metric, Metric)}
        module = super().convert_module(module)
        for name, values in kept.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            tensor = getattr(owner, leaf)
            if isinstance(tensor, nn.Parameter):
                tensor.data = values
            else:
                setattr(owner, leaf, values)
        for name, dtype in metrics.items():
            metric = module.get_submodule(name)
            assert isinstance(metric, Metric)
            metric.set_dtype(dtype)
        return module

    def _pinned(self, module: nn.Module) -> Iterable[tuple[str, Tensor]]:
        regions = region_of_parameters(module)
        targets = [name for name, part in module.named_modules() if isinstance(part, ImageTargets)]
        routers = [name for name, part in module.named_modules() if isinstance(part, Router)]
        theirs = _kept_by_transformers(module)
        for name, parameter in module.named_parameters():
            if self.policy.dtype_of(regions[name]) == "float32" or _inside(name, targets) or name in theirs:
                yield name, parameter
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point() and (regions[name] == "router" or _inside(name, targets + routers)):
                yield name, buffer


def keep_pinned_regions(trainer: Trainer, policy: PrecisionPolicy) -> None:
    """Replace Lightning's half precision with `RegionHalfPrecision`; other precisions keep weights in fp32.

    Called before Lightning converts the module, so no plugin needs to be configured.

    Raises:
        UserError: a strategy or policy that cannot keep a region in fp32; heads or a trunk in the other half
            precision, whose weights are never cast.
    """
    plugin = trainer.precision_plugin
    if plugin.precision not in ("bf16-true", "16-true"):
        return
    if policy.optimizer_state == "float32":
        raise UserError(
            f"precision.optimizer_state is float32 with trainer.precision {plugin.precision}: optimiser state has the "
            "dtype of the parameters; set trainer.precision to bf16-mixed, or precision.optimizer_state to null"
        )
    own, other = ("bfloat16", "float16") if plugin.precision == "bf16-true" else ("float16", "bfloat16")
    mixed = [] if policy.simulate else [name for name in ("trunk", "heads") if policy.dtype_of(name) == other]
    if mixed:
        raise UserError(
            f"precision.{mixed[0]} is {other}, but weights under {plugin.precision} are {own}: set trainer.precision "
            f"to {'16-true' if other == 'float16' else 'bf16-true'}, or precision.{mixed[0]} to float32 or null"
        )
    pinned = [name for name in _WEIGHTED if policy.dtype_of(name) == "float32"]
    if isinstance(plugin, HalfPrecision):
        trainer.strategy.precision_plugin = RegionHalfPrecision(plugin.precision, policy)
    elif pinned:
        raise UserError(
            f"trainer.precision is {plugin.precision}: {type(plugin).__name__} casts every weight, also those of "
            f"regions pinned to float32 ({', '.join(pinned)}); set trainer.precision to bf16-mixed, or unpin the "
            "regions with null"
        )


def _kept_by_transformers(module: nn.Module) -> set[str]:
    """Return the parameters that models of transformers hold in fp32 whatever their dtype, such as ERNIE's gates."""
    kept: set[str] = set()
    for path, part in module.named_modules():
        words = getattr(part, "_keep_in_fp32_modules_strict", None)
        if not words:
            continue
        pattern = re.compile(rf"(^|\.)({'|'.join(words)})($|\.)")  # as transformers reads them
        for name, _ in part.named_parameters():
            if pattern.search(name.replace(".router.theirs.", ".")):  # an adopted router stands below our layer
                kept.add(f"{path}.{name}" if path else name)
    return kept


def _inside(name: str, paths: list[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)
