"""Runs linear layers in fp8 on a GPU, by torchao; routers and regions pinned to fp32 are left out.

torchao swaps `nn.Linear` for one that casts inputs, weights and gradients to fp8 with a scale per tensor or row (the
recipe of arXiv 2209.05433, section 3). Weights keep their values and names, so checkpoints fit with and without it.
Stacked experts are not linear layers and are not converted; to study fp8 in them, or on a CPU, simulate it
(`precision.experts: float8_e4m3fn`, `precision.simulate: {}`).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.model.precision import PrecisionPolicy, Region, region_of_parameters
from lightning_moevlm.training import VisionLanguageModule

_MULTIPLE = 16  # fp8 kernels ask it of both widths
_CAPABILITY = (8, 9)  # the first NVIDIA GPUs with fp8 products


class Float8Training(Callback):
    """Converts linear layers before training and evaluation, and reports them.

    Args:
        recipe: torchao's; "tensorwise" is fastest, "rowwise" more exact, "rowwise_with_gw_hp" keeps weight gradients
            wide.
        heads: also convert the objective's layers.
        emulate: torchao's emulation, which computes in wide dtypes; for tests on a CPU.

    Raises:
        UserError: torchao or a GPU with fp8 is missing, or no layer could be converted.
    """

    def __init__(
        self,
        recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise",
        heads: bool = False,
        emulate: bool = False,
    ) -> None:
        self.recipe = recipe
        self.heads = heads
        self.emulate = emulate
        self.converted: tuple[str, ...] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert, before Lightning casts and moves the module and before the optimiser is built."""
        assert isinstance(pl_module, VisionLanguageModule)
        if self.converted:
            return  # by an earlier stage
        if not self.emulate:
            check_device(trainer.strategy.root_device)
        self.converted = self._convert(pl_module)
        if not self.converted:
            raise UserError(
                f"Float8Training found no linear layer to convert: widths must be multiples of {_MULTIPLE} in a "
                "region that is not pinned to float32; change dim or hidden_dim, or remove the callback"
            )
        rank_zero_info(f"fp8 ({self.recipe}): {len(self.converted)} linear layers: {', '.join(self.converted)}")

    def _convert(self, module: VisionLanguageModule) -> tuple[str, ...]:
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError as error:
            raise UserError("Float8Training needs torchao: pip install 'lightning-moevlm[fp8]'") from error
        regions = region_of_parameters(module)
        converted: list[str] = []

        def wanted(layer: nn.Module, path: str) -> bool:
            if not is_convertible(layer, path, regions, module.precision, self.heads):
                return False
            converted.append(path)
            return True

        config = Float8LinearConfig.from_recipe_name(self.recipe)
        object.__setattr__(config, "emulate", self.emulate)  # a frozen record whose recipes lack it
        convert_to_float8_training(module, module_filter_fn=wanted, config=config)
        return tuple(converted)


def is_convertible(
    layer: nn.Module, path: str, regions: Mapping[str, Region], policy: PrecisionPolicy, heads: bool
) -> bool:
    """Return whether a layer can compute in fp8: a plain linear layer with suitable widths and region."""
    if type(layer) is not nn.Linear:  # and not converted already
        return False
    if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
        return False
    name = regions[f"{path}.weight"]
    allowed: tuple[Region, ...] = ("trunk", "heads") if heads else ("trunk",)
    return name in allowed and policy.dtype_of(name) != "float32"


def check_device(device: torch.device) -> None:
    """Refuse a device without fp8 products.

    Raises:
        UserError: no CUDA device, or one that is too old.
    """
    advice = "simulate fp8 instead (precision.trunk: float8_e4m3fn, precision.simulate: {})"
    if device.type != "cuda":
        raise UserError(f"Float8Training needs a CUDA GPU, but the Trainer runs on {device.type}: {advice}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise UserError(
            f"Float8Training needs a GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or higher, but this "
            f"one has {capability[0]}.{capability[1]}: {advice}"
        )
