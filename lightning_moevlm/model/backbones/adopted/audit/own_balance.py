"""Measures what the balance loss that transformers has for a model does to its routers.

    unit     loss with coefficient 1 - loss with coefficient 0, for one setting of the switches
    share    |c (g_1 - g_0)| / |g_0 + c (g_1 - g_0)|, gradients on the routers, c the coefficient of the configuration
    scale    unit / the balance of the same plans by its definition
    parts    sum of the units of two halves, with the number of items of both / unit of both at once

The last is what the Trainer of transformers does over micro-batches; over ranks it multiplies the loss by their number
and averages gradients, which comes to the same. Nothing is trained: the model is as before afterwards.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.model.backbones.adopted.audit.records import OwnBalance, Setting
from lightning_moevlm.model.backbones.adopted.build import takes

_COEFFICIENT = re.compile(r"(router_|moe_)?aux_loss_(coef|coeff|alpha)")
_SWITCH = "output_router_logits"
_FUNCTION = "load_balancing_loss_func"
_IGNORED = -100
"""Label of positions that the loss leaves out."""


def measure_own_balance(
    model: Any,
    parameters: Sequence[nn.Parameter],
    inputs: Mapping[str, Tensor],
    counted_BS: Tensor,
    balance: float | None,
) -> tuple[OwnBalance, list[Tensor]]:
    """Ask the model for its loss and gradients under each setting of its switches.

    Args:
        model: of transformers, as it is.
        parameters: of its routers, whose gradients are asked for.
        inputs: of a forward pass, for an even number of sequences of equal size.
        counted_BS: positions that are predicted; others are labelled to be left out.
        balance: of the plans of that pass, as `CrossLayerBalance` defines it; None if it is not defined for them.

    Returns:
        What was measured, and the gradient of the loss without balance on each parameter.
    """
    labels = torch.where(counted_BS, inputs["input_ids"], _IGNORED)
    question = _Question(model, parameters, {**inputs, "labels": labels}, balance)
    with _alone(model, parameters), torch.random.fork_rng(devices=[]):
        off = question.ask({}, coefficient=0.0)
        answers = [question.compare(off, each) for each in question.settings()]
        acting = next((each for each, answer in answers if answer.verdict not in ("dead", "fails")), None)
        over_parts = None if acting is None else question.compare_parts(acting)
    measured = OwnBalance(
        function=_function_of(model),
        coefficients=tuple((name, float(getattr(owner, key))) for name, owner, key in question.configured),
        settings=tuple(answer for _, answer in answers),
        over_parts=over_parts,
    )
    return measured, off.gradients


class _Way(NamedTuple):
    """A setting of the switches: turned on within `within`, and `options` of the call."""

    name: str
    within: Callable[[], AbstractContextManager[None]]
    options: Mapping[str, Any]


class _Answer(NamedTuple):
    loss: Tensor
    gradients: list[Tensor]


class _Question:
    """Asks a model for its loss."""

    def __init__(
        self, model: Any, parameters: Sequence[nn.Parameter], inputs: Mapping[str, Tensor], balance: float | None
    ) -> None:
        self.model, self.parameters, self.inputs, self.balance = model, parameters, inputs, balance
        self.configs = dict(_configs("config", model.config))
        self.configured = [
            (f"{path}.{name}", config, name) for path, config in self.configs.items() for name in _coefficients(config)
        ]
        kept = [(module, name) for module in model.modules() for name in _coefficients(module)]
        self.holders = [*((owner, name) for _, owner, name in self.configured), *kept]

    @property
    def coefficient(self) -> float:
        """That of the configuration; 1 where it has none."""
        owner, name = self.holders[0] if self.holders else (None, "")
        return float(getattr(owner, name)) if name else 1.0

    def settings(self) -> list[_Way]:
        """Return the configured setting, and those in which one switch is on."""
        ways = [_Way("as configured", nullcontext, {})]
        text = self.model.config.get_text_config()
        for path, config in self.configs.items():
            if config is self.model.config or config is text:
                ways.append(_Way(f"{path}.{_SWITCH}: true", _turn_on(config), {}))
        if takes(self.model.forward, _SWITCH) or self._takes_more:
            ways.append(_Way(f"{_SWITCH}=True in the call", nullcontext, {_SWITCH: True}))
        return ways

    def ask(self, options: Mapping[str, Any], coefficient: float) -> _Answer:
        """Return the loss and its gradients on the routers."""
        loss = self._loss(self.inputs, options, coefficient)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(found, self.parameters, strict=True)
        return _Answer(loss.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs])

    def compare(self, off: _Answer, way: _Way) -> tuple[_Way, Setting]:
        """Return what a setting adds to a loss without balance."""
        try:
            with way.within():
                on = self.ask(way.options, coefficient=1.0)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            return way, Setting(way.name, None, failure=f"{type(error).__name__}: {str(error).split(chr(10))[0]}")
        coefficient, unit = self.coefficient, float(on.loss - off.loss)
        balance = [coefficient * (one - other) for one, other in zip(on.gradients, off.gradients, strict=True)]
        whole = [own + other for own, other in zip(balance, off.gradients, strict=True)]
        norm = _norm(whole)
        scale = unit / self.balance if self.balance and self.holders and unit else None
        return way, Setting(way.name, coefficient * unit, _norm(balance) / norm if norm else 0.0, scale)

    def compare_parts(self, way: _Way) -> float:
        """Return what two micro-batches add to a step, as the Trainer sums them, over what both at once add."""
        halves = [
            dict(zip(self.inputs, part, strict=True)) for part in zip(*map(_halve, self.inputs.values()), strict=True)
        ]
        counts_items = getattr(self.model, "accepts_loss_kwargs", self._takes_more)
        num_items = (self.inputs["labels"][:, 1:] != _IGNORED).sum()
        options = {**way.options, **({"num_items_in_batch": num_items} if counts_items else {})}

        def unit(inputs: Mapping[str, Tensor]) -> float:
            with torch.no_grad(), way.within():
                on, off = (self._loss(inputs, options, coefficient) for coefficient in (1.0, 0.0))
            return float(on - off)

        parts = sum(unit(half) for half in halves)
        return (parts if counts_items else parts / 2) / unit(self.inputs)

    def _loss(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any], coefficient: float) -> Tensor:
        before = [getattr(owner, name) for owner, name in self.holders]
        try:
            for owner, name in self.holders:
                setattr(owner, name, coefficient)
            torch.manual_seed(0)  # the same dropout and noise in every pass
            loss: Tensor = self.model(**inputs, use_cache=False, **options).loss
            return loss
        finally:
            for (owner, name), value in zip(self.holders, before, strict=True):
                setattr(owner, name, value)

    @property
    def _takes_more(self) -> bool:
        kinds = [each.kind for each in inspect.signature(self.model.forward).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds


def _configs(path: str, config: Any) -> Iterator[tuple[str, Any]]:
    """Yield a configuration and those within it, by their paths."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and not isinstance(value, type):
            yield from _configs(f"{path}.{name}", value)


def _coefficients(owner: object) -> list[str]:
    values = vars(owner).items()
    return [name for name, value in values if _COEFFICIENT.fullmatch(name) and isinstance(value, int | float)]


def _turn_on(config: Any) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def within() -> Iterator[None]:
        missing = object()
        before = vars(config).get(_SWITCH, missing)
        setattr(config, _SWITCH, True)
        try:
            yield
        finally:
            if before is missing:
                delattr(config, _SWITCH)
            else:
                setattr(config, _SWITCH, before)

    return within


@contextmanager
def _alone(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the model compute gradients of these parameters alone, which needs less memory."""
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _function_of(model: nn.Module) -> str | None:
    module = importlib.import_module(type(model).__module__)
    return f"{_FUNCTION} of {module.__name__}" if hasattr(module, _FUNCTION) else None


def _halve(values: Tensor) -> tuple[Tensor, Tensor]:
    first, second = values.chunk(2)
    return first, second


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([each.float().square().sum() for each in gradients]).sum().sqrt()) if gradients else 0.0
