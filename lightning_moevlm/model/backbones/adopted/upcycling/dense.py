"""Finds the dense feed-forwards of a language model of transformers by what they compute.

    gated    a(x W_gate) * (x W_up) W_down, gate and up in two matrices, or one beside the other in one
    plain    a(x W_up) W_down

each with biases or without. No name of a family is read. A module with two or three linear layers is asked: a copy of
it with small random matrices runs, and one of these formulas must give the same. A module that computes something else
is no feed-forward, and the reason is kept.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Joined: TypeAlias = Literal["gate_up", "up_gate"]
"""Order of gate and up where they are one matrix."""

_DIM, _HIDDEN = 6, 10  # of the small copies
_NUM_TRIALS = 7
_CLOSE = 1e-4
_COMMON = ("F.silu", "F.gelu", "F.relu")
"""Activation functions that a module may call without keeping them."""


class Form(NamedTuple):
    """Which children of a module make which part of its formula.

    gate, up, down: names of linear layers; gate is empty where there is none, or where up holds both.
    joined: order of gate and up in `up`; None: it holds one of them.
    activation: name of the function a: an attribute of the module, or F.silu and the like.
    """

    gate: str
    up: str
    down: str
    joined: Joined | None
    activation: str


class Dense(NamedTuple):
    """A dense feed-forward of a model.

    path: of the module. block: index of its transformer block.
    dim: D. hidden_dim: F. form: see `Form`.
    """

    path: str
    block: int
    dim: int
    hidden_dim: int
    form: Form


def find_feed_forwards(model: Any) -> tuple[list[Dense], list[str]]:
    """Return the dense feed-forwards in the blocks of a language model, in its order, and why others are none."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    found: list[Dense] = []
    reasons: list[str] = []
    known: dict[tuple[object, ...], Form | str] = {}  # modules of one kind are asked once
    for path, module in model.named_modules():
        block = block_of(path)
        if id(module) not in inside or block is None:
            continue
        linears = _linears(module)
        if len(linears) not in (2, 3) or not _takes_tokens_alone(module):
            continue
        kind = (type(module), *((name, *_in_out(each)) for name, each in linears.items()))
        if kind not in known:
            known[kind] = _read(module, linears)
        form = known[kind]
        if isinstance(form, Form):
            hidden_dim, dim = _in_out(linears[form.down])
            found.append(Dense(path, block, dim, hidden_dim, form))
        elif form:
            reasons.append(f"{path} {form}")
    return found, reasons


def read_weights(module: nn.Module, form: Form) -> dict[str, Tensor]:
    """Return the matrices (in, out) and biases (out) of a feed-forward by the name of their part: up, up_bias."""
    found: dict[str, Tensor] = {}
    for part, name in (("gate", form.gate), ("up", form.up), ("down", form.down)):
        if name:
            weight, bias = _matrix(module.get_submodule(name))
            found[part] = weight
            if bias is not None:
                found[f"{part}_bias"] = bias
    if form.joined is not None:
        first, second = form.joined.split("_")
        for key in ("up", "up_bias"):
            if key in found:
                halves = found.pop(key).chunk(2, dim=-1)
                found |= {key.replace("up", name): half for name, half in zip((first, second), halves, strict=True)}
    return found


def activation_of(module: nn.Module, form: Form) -> Callable[[Tensor], Tensor]:
    """Return a."""
    place, _, name = form.activation.rpartition(".")
    function: Callable[[Tensor], Tensor] = getattr(F if place else module, name)
    return function


def run_dense(tokens: Tensor, weights: dict[str, Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the formula; weights as `read_weights` names them."""

    def linear(rows: Tensor, part: str) -> Tensor:
        return F.linear(rows, weights[part].t(), weights.get(f"{part}_bias"))

    if "gate" in weights:
        return linear(activation(linear(tokens, "gate")) * linear(tokens, "up"), "down")
    return linear(activation(linear(tokens, "up")), "down")


def block_of(path: str) -> int | None:
    """Return the first number in a path: the index of the transformer block."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer; GPT-2 has one with its matrix the other way round."""
    is_turned = hasattr(module, "nf") and hasattr(module, "nx")
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.Linear) or is_turned) and isinstance(weight, Tensor) and weight.ndim == 2


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if _is_linear(child)}


def _matrix(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = linear.weight, getattr(linear, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(linear, nn.Linear) else weight, bias if isinstance(bias, Tensor) else None


def _in_out(linear: nn.Module) -> tuple[int, int]:
    weight, _ = _matrix(linear)
    return weight.shape[0], weight.shape[1]


def _takes_tokens_alone(module: nn.Module) -> bool:
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return len([each for each in parameters if each.default is each.empty and each.kind not in given]) == 1


def _read(module: nn.Module, linears: dict[str, nn.Module]) -> Form | str:
    """Return the form of a module, why it has none, or nothing if it does not look like a feed-forward."""
    forms = list(_possible_forms(linears, _activations(module)))
    for form in forms:
        if _computes(module, form):
            return form
    return "computes something else than a(x W_gate) * (x W_up) W_down or a(x W_up) W_down" if forms else ""


def _possible_forms(linears: dict[str, nn.Module], activations: list[str]) -> Iterator[Form]:
    sizes = {name: _in_out(each) for name, each in linears.items()}
    for order in permutations(linears):
        (dim, width), (hidden_dim, last) = sizes[order[-2]], sizes[order[-1]]
        if dim != last or (len(order) == 3 and sizes[order[0]] != sizes[order[1]]):
            continue
        for name in activations:
            if width == hidden_dim:
                yield Form(order[0] if len(order) == 3 else "", order[-2], order[-1], None, name)
            elif width == 2 * hidden_dim and len(order) == 2:
                yield Form("", *order, "gate_up", name)
                yield Form("", *order, "up_gate", name)


def _activations(module: nn.Module) -> list[str]:
    children = [
        name
        for name, child in module.named_children()
        if not isinstance(child, nn.Dropout) and not any(True for _ in child.parameters())
    ]
    functions = [name for name, value in vars(module).items() if inspect.isfunction(value) or inspect.isbuiltin(value)]
    return [*children, *functions, *_COMMON]


def _computes(module: nn.Module, form: Form) -> bool:
    """Return whether a copy of the module with small random matrices computes the formula."""
    sample = torch.Generator("cpu").manual_seed(0)
    up = 2 * _HIDDEN if form.joined else _HIDDEN
    sizes = {form.gate: (_DIM, _HIDDEN), form.up: (_DIM, up), form.down: (_HIDDEN, _DIM)}
    instead: dict[int, Any] = {id(child): nn.Identity() for child in module.children() if isinstance(child, nn.Dropout)}
    for name, child in module.named_children():
        if name in sizes:
            instead[id(child)] = _shrink(child, *sizes[name], sample)
    trial = copy.deepcopy(module, instead).eval()
    tokens = torch.randn(1, _NUM_TRIALS, _DIM, generator=sample, device="cpu")
    with torch.no_grad():
        try:
            found = trial(tokens)
            expected = run_dense(tokens, read_weights(trial, form), activation_of(trial, form))
        except (RuntimeError, ValueError, TypeError, IndexError):  # it needs other shapes
            return False
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=_CLOSE, atol=_CLOSE)


def _shrink(linear: nn.Module, size_in: int, size_out: int, sample: torch.Generator) -> nn.Module:
    """Return a copy of a linear layer with a small random matrix, fp32 on the CPU."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    shape = (size_out, size_in) if isinstance(linear, nn.Linear) else (size_in, size_out)
    instead: dict[int, Any] = {
        id(weight): nn.Parameter(torch.randn(shape, generator=sample, device="cpu")),
        id(bias): None if bias is None else nn.Parameter(torch.randn(size_out, generator=sample, device="cpu")),
    }
    small: Any = copy.deepcopy(linear, instead)
    if not isinstance(linear, nn.Linear):
        small.nf, small.nx = size_out, size_in
    return small
