"""Finds the routers and experts of any transformers model by their structure.

    block.gate | block.router    (hidden, ...) -> logits (T, E), weights (T, K), indices (T, K), perhaps more
    block.experts                (hidden, indices, weights) -> tokens

No name of a family is read. A copy of the router with random weights is asked, on the CPU: which of its results are
integers, as many floats, and by which function of its logits it weighs. A family that gives something else is refused
with the reason.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_moevlm.contracts.routing_plan import Modality

TheirScore: TypeAlias = Literal["softmax", "sigmoid", "sqrt_softplus", "given"]
"""Function of the logits that weights are made of; `given`: the router returns probabilities, not logits."""

_GATES = ("gate", "router")
_ISOLATED: Mapping[str, Modality] = {"text_moe": Modality.TEXT, "vision_moe": Modality.IMAGE}
"""Blocks that get the tokens of one modality alone (ERNIE-4.5-VL), by their names."""
_NUM_TRIALS = 16
_CLOSE = 1e-3


class Gate(NamedTuple):
    """What a router of another code base returns.

    dim: D. num_experts: E. top_k: K.
    logits, weights, indices: their places among its results.
    score: see `TheirScore`; None: no known function of its logits gives its weights.
    sum: of a token's weights, if that of all tokens is equal: 1 where they are renormalised.
    """

    dim: int
    num_experts: int
    top_k: int
    logits: int
    weights: int
    indices: int
    score: TheirScore | None
    sum: float | None


class Seam(NamedTuple):
    """A place where a router meets its experts.

    path: of the block in the model. name: of the router in the block.
    modality: of the only tokens that the block may get without the others; None: it gets all of them.
    """

    path: str
    name: str
    gate: Gate
    modality: Modality | None


class Refusal(NamedTuple):
    """A place that looks like a seam and is none."""

    path: str
    reason: str


def find_seams(model: nn.Module) -> tuple[list[Seam], list[Refusal]]:
    """Return the seams of a model in its order, and the places that are none, with the reason."""
    seams: list[Seam] = []
    refusals: list[Refusal] = []
    known: dict[tuple[object, ...], Gate | str] = {}  # layers of one kind are asked once
    for path, block, name in _candidates(model):
        gate, experts = getattr(block, name), block.experts
        assert isinstance(experts, nn.Module)
        kind = (type(block), type(gate), type(experts), *(tuple(p.shape) for p in gate.parameters()))
        if kind not in known:
            known[kind] = _examine(block, gate, experts)
        found = known[kind]
        if isinstance(found, str):
            refusals.append(Refusal(path, found))
        else:
            seams.append(Seam(path, name, found, _ISOLATED.get(path.rpartition(".")[2])))
    return seams, refusals


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, block in model.named_modules():
        if isinstance(getattr(block, "experts", None), nn.Module):
            for name in _GATES:
                if isinstance(getattr(block, name, None), nn.Module):
                    yield path, block, name


def _examine(block: nn.Module, gate: nn.Module, experts: nn.Module) -> Gate | str:
    """Return what the router returns, or why it is none of ours to adopt."""
    takes = _positional(experts)
    if len(takes) < 3:
        return f"its experts take ({', '.join(takes)}), and not tokens, indices and weights"
    _, missing = _more_arguments(gate, block, _NUM_TRIALS)
    if missing:
        return f"its router also needs {missing}"
    trial = random_copy(gate)
    complaints: list[str] = []
    for dim in _widths(gate, experts):
        sample = torch.Generator("cpu").manual_seed(dim)
        tokens_TD = torch.randn((_NUM_TRIALS, dim), generator=sample, device="cpu")
        results = ask(trial, block, tokens_TD)
        if not isinstance(results, str):
            return _read(results, dim)
        complaints.append(results)
    return f"its router takes no tokens: {complaints[0] if complaints else 'no width fits'}"


def ask(trial: nn.Module, block: nn.Module, tokens_TD: Tensor) -> tuple[Tensor, ...] | str:
    """Return what a copy of a block's router answers, without gradient, or its complaint.

    Tokens are given as a list, and, should it not take that, as one sequence.
    """
    more, _ = _more_arguments(trial, block, len(tokens_TD))
    complaint = ""
    for hidden in (tokens_TD, tokens_TD.unsqueeze(0)):
        try:
            with torch.no_grad():
                results: tuple[Tensor, ...] = trial(hidden, **more)
        except (RuntimeError, ValueError, IndexError) as error:  # another width or number of axes
            complaint = complaint or str(error).split("\n")[0]
            continue
        return results
    return complaint


def _positional(module: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, each in inspect.signature(module.forward).parameters.items() if each.kind in kinds]


def _more_arguments(gate: nn.Module, block: nn.Module, num_tokens: int) -> tuple[dict[str, Tensor], str]:
    """Return arguments of a router beside the tokens, and the name of one that it requires and nobody knows."""
    parameters = list(inspect.signature(gate.forward).parameters.values())[1:]
    found: dict[str, Tensor] = {}
    biases = [tensor for name, tensor in _tensors(block) if name.endswith("bias") and tensor.ndim == 1]
    for each in parameters:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.name == "input_ids":
            found[each.name] = torch.zeros(1, num_tokens, dtype=torch.int64, device="cpu")
        elif each.name.endswith("bias") and biases:  # the block keeps it
            found[each.name] = torch.zeros(biases[0].shape, device="cpu")
        elif each.default is inspect.Parameter.empty:
            return {}, each.name
    return found, ""


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters(recurse=False)
    yield from block.named_buffers(recurse=False)


def random_copy(gate: nn.Module) -> nn.Module:
    """Return a copy with random matrices and everything else as it is: fp32, on the CPU, in evaluation."""
    if any(tensor.is_meta for tensor in (*gate.parameters(), *gate.buffers())):
        trial = copy.deepcopy(gate).to_empty(device="cpu")
        for tensor in (*trial.parameters(), *trial.buffers()):
            tensor.data.zero_()
    else:
        trial = copy.deepcopy(gate).cpu()
    trial = trial.float().eval()
    generator = torch.Generator("cpu").manual_seed(0)
    for buffer in trial.buffers():
        if buffer.ndim == 2 and not buffer.is_floating_point():  # experts of each token id
            buffer.copy_(torch.arange(buffer.shape[1], device="cpu"))
    for parameter in trial.parameters():
        if parameter.ndim >= 2:
            values = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.data.copy_(values / parameter.shape[-1] ** 0.5)
    return trial


def _widths(gate: nn.Module, experts: nn.Module) -> list[int]:
    """Return the widths that a token may have, the most likely ones first."""
    of_gate = [p.shape[-1] for p in gate.parameters() if p.ndim == 2]
    of_experts = [size for p in experts.parameters() if p.ndim >= 2 for size in p.shape[-2:]]
    return list(dict.fromkeys((*of_gate, *of_experts)))


def _read(results: object, dim: int) -> Gate | str:
    if not isinstance(results, tuple) or not all(isinstance(each, Tensor) for each in results):
        return "its router returns scores alone, and the block chooses by itself"
    integers = [place for place, each in enumerate(results) if each.dtype in (torch.int64, torch.int32)]
    floats = [place for place, each in enumerate(results) if each.is_floating_point()]
    if not integers:
        return "no result of its router holds the indices of experts"
    indices_TK = _flat(results[integers[0]])
    if any(len(row.unique()) < len(row) for row in indices_TK):
        return "its router returns masks, and not the indices of experts"
    like = [place for place in floats if _flat(results[place]).shape == indices_TK.shape]
    if not like or len(floats) < 2:
        return "no result of its router holds the weights of its choices"
    # logits come first; they look like weights where each token gets all experts
    weights = like[1] if len(like) > 1 and like[0] == 0 else like[0]
    logits = next(place for place in floats if place != weights)
    logits_TE, weights_TK = _flat(results[logits]).float(), _flat(results[weights]).float()
    if len(logits_TE) != len(indices_TK) or logits_TE.shape[1] < indices_TK.shape[1]:
        return "no result of its router holds a score of every expert"
    total_T = weights_TK.sum(dim=-1)
    is_constant = bool((total_T - total_T[0]).abs().max() <= _CLOSE * total_T[0].abs())
    return Gate(
        dim,
        logits_TE.shape[1],
        indices_TK.shape[1],
        logits,
        weights,
        integers[0],
        _find_score(logits_TE, weights_TK, indices_TK.long()),
        float(total_T[0]) if is_constant else None,
    )


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _find_score(logits_TE: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> TheirScore | None:
    """Return the function whose values at the chosen experts are proportional to the weights."""
    for name, score in SCORES.items():
        if name == "given" and bool((logits_TE < 0).any()):
            continue
        ratio_TK = weights_TK / score(logits_TE).gather(-1, indices_TK)
        if ratio_TK.shape[1] == 1 and bool((weights_TK == weights_TK[0]).all()):
            return "softmax"  # a single weight of 1 tells nothing
        ratio_TK = ratio_TK if ratio_TK.shape[1] > 1 else ratio_TK.t()
        if bool(((ratio_TK / ratio_TK[:, :1] - 1).abs() <= _CLOSE).all()):
            return name
    return None


SCORES: Mapping[TheirScore, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
    "given": lambda probs_TE: probs_TE,
}
