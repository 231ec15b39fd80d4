"""Initial weights drawn by parameter name, so the order of construction does not matter.

Every module of ours has them once it is constructed. Each parameter is drawn from a generator seeded with (seed, its
full name). Two models that share a parameter's name and shape share its initial value: arms of a study start from the
same point.

Rule: matrices, stacks and embeddings are normal with the given std, cut at two std (truncated normal, as in BEiT and
Switch, arXiv 2101.03961 section 2.4); biases are 0; norm scales and single numbers are 1. A module that `HasScales`
gives its matrices their own (layers/init_scheme.py); one with an `initial_std` or an `initial_value` has its own, and
the `ExpertInit` of an expert stack may set a scale per fan-in, or equal experts.
A module that `keeps_weights`, as one of another package does, is left as it is.
"""

import hashlib
import inspect
import math
from abc import ABCMeta
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_moevlm.common.number_checks import check_number

_NORMS = (nn.LayerNorm, nn.RMSNorm)
_M = TypeVar("_M")
_is_part: ContextVar[bool] = ContextVar("is_part", default=False)  # of what is being constructed around it


class InitialScale(NamedTuple):
    """The initial scale of a matrix.

    std: standard deviation before the cut.
    cut: bound of the values, in std.
    value_factor: factor on the value rows of an attention's fused matrix.
    """

    std: float
    cut: float = 2.0
    value_factor: float = 1.0


@dataclass(frozen=True)
class ExpertInit:
    """Initial weights of experts.

    Args:
        scale: s of std = sqrt(s / inputs of the matrix); Switch found 0.1 more stable than 1.0 (arXiv 2101.03961,
            section 2.4). null takes the model's own std.
        same: every expert starts as a copy of the first.

    Raises:
        UserError: a scale below 0.
    """

    scale: float | None = None
    same: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.scale is not None:
            check_number("the initial scale of experts", self.scale, least=0, advice=", 0.1 as in Switch, or null")


@runtime_checkable
class HasScales(Protocol):
    """A module with initial scales of its own."""

    def initial_scales(self, std: float) -> dict[str, InitialScale]:
        """Return the scale of each of its matrices that is not simply `std`, by its name in the module."""


@runtime_checkable
class DrawsItself(Protocol):
    """A module with a rule of its own for its initial weights."""

    def draw_weights(self, seed: int) -> None:
        """Draw them; equal seeds give equal weights."""


class _DrawnOnceBuilt(ABCMeta):
    """Draws the outermost module when its constructor is done, so that no weight is drawn once per level."""

    def __call__(cls: type[_M], *args: Any, **kwargs: Any) -> _M:
        if _is_part.get():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with defer_initialisation():
            module: Any = super().__call__(*args, **kwargs)  # type: ignore[misc]
        initialise(module, seed=0)
        return module

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of the constructor, for help and editors."""
        of_init = inspect.signature(cls.__init__)  # type: ignore[misc]
        return of_init.replace(parameters=list(of_init.parameters.values())[1:])


class Module(nn.Module, metaclass=_DrawnOnceBuilt):
    """A module that is ready when it is constructed: `initialise` has drawn it with seed 0 and std 0.02.

    path_in_model: where it stands in a VisionLanguageModule, so that by itself it starts as it does in training.
    """

    path_in_model: str = ""


@contextmanager
def defer_initialisation() -> Iterator[None]:
    """Do not draw modules that are built within; call `initialise` on the whole model instead.

    Large models take minutes to draw; a VisionLanguageModule draws all that it is given.
    """
    token = _is_part.set(True)
    try:
        yield
    finally:
        _is_part.reset(token)


def initialise(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Set every parameter of the model in place.

    Parameters without memory ("meta") and frozen ones are left alone; those of a module with `starts_frozen` are drawn.
    So are those below a module with `keeps_weights`, unless a module between them says otherwise.

    Args:
        model: parameters named as in `named_parameters`, below the model's `path_in_model`.
        seed: any integer.
        std: standard deviation of matrices before truncation.
    """
    modules = dict(model.named_modules())
    scales = initial_scales(model, std)
    kept = _find_kept(modules)
    above = getattr(model, "path_in_model", "")
    for path, module in modules.items():
        if isinstance(module, DrawsItself):
            module.draw_weights(derive_seed(seed, _join(above, path) if path else above))
    for name, parameter in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        owner = modules[path]
        if path in kept:
            continue
        if parameter.is_meta or not (parameter.requires_grad or getattr(owner, "starts_frozen", False)):
            continue  # no memory, or frozen weights that were loaded
        initial_value = getattr(owner, "initial_value", None)
        own_std = getattr(owner, "initial_std", None)
        if initial_value is not None:
            nn.init.constant_(parameter, initial_value)
        elif parameter.ndim == 0 or (isinstance(owner, _NORMS) and own_name == "weight"):
            nn.init.ones_(parameter)
        elif "bias" in own_name:
            nn.init.zeros_(parameter)
        else:
            scale = scales.get(name, InitialScale(std)) if own_std is None else InitialScale(own_std)
            init = getattr(owner, "init", None)
            if not isinstance(init, ExpertInit):
                init = ExpertInit()
            if init.scale is not None:
                scale = InitialScale(math.sqrt(init.scale / parameter.shape[-2]))
            values = _drawn(parameter.shape, scale, derive_seed(seed, _join(getattr(model, "path_in_model", ""), name)))
            if init.same:
                values = values[:1].expand_as(values)  # the first expert is the same in both kinds of arm
            with torch.no_grad():
                parameter.copy_(values)


def initial_scales(model: nn.Module, std: float) -> dict[str, InitialScale]:
    """Return the scale of every matrix that has its own, by its full name."""
    return {
        _join(path, name): scale
        for path, module in model.named_modules()
        if isinstance(module, HasScales)
        for name, scale in module.initial_scales(std).items()
    }


def _find_kept(modules: dict[str, nn.Module]) -> set[str]:
    """Return the paths of parameters that stay as they are: the nearest module above that says so decides."""
    kept: set[str] = set()
    for path, module in modules.items():  # each after the one above it
        keeps = getattr(module, "keeps_weights", path.rpartition(".")[0] in kept if path else False)
        if keeps:
            kept.add(path)
    return kept


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _drawn(shape: torch.Size, scale: InitialScale, seed: int) -> Tensor:
    values = torch.zeros(shape, dtype=torch.float32, device="cpu")
    if scale.std > 0:
        generator = torch.Generator("cpu").manual_seed(seed)
        bound = scale.cut * scale.std
        nn.init.trunc_normal_(values, std=scale.std, a=-bound, b=bound, generator=generator)
    if scale.value_factor != 1.0:
        values.view(3, -1)[2] *= scale.value_factor  # queries, keys, values
    return values


def derive_seed(seed: int, *parts: str | int) -> int:
    """Return a 63-bit seed that depends on every part, the same on every machine and Python."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
