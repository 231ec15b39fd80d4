"""Counts what a model really computes and keeps, without the memory and the time of its matrix products."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lightning_moevlm.model.dispatch import LoopDispatcher
from lightning_moevlm.model.layers import MoEFFN

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default}
_OF_VALUES = {_ATEN.index.Tensor, _ATEN.nonzero.default, _ATEN.masked_select.default, _ATEN._local_scalar_dense.default}
_TO_WRITE_TO = ("empty", "zeros", "ones", "full", "new_", "rand")  # how the names of ops begin that make tensors
_LARGE = 2**20  # elements, of a tensor that is neither computed nor kept


def count_flops(run: Callable[[], object]) -> int:
    """Return torch's count; products and what is large give zeros of their shape, all else is computed."""
    # attention as plain matrix products: torch's counter knows no formula for the fused CPU kernel
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _SkipProducts(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def materialise(module: nn.Module) -> None:
    """Replace weights on "meta" by views of one number, which take no memory; experts run one by one."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(part, name, nn.Parameter(torch.full((), 0.01).expand(parameter.shape), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
        if isinstance(part, MoEFFN):
            part.dispatcher = LoopDispatcher()


class _SkipProducts(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _PRODUCTS and not _is_skipped(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        on_meta = tree_map_only(Tensor, lambda each: torch.empty_like(each, device="meta"), (args, kwargs or {}))
        shapes = func(*on_meta[0], **on_meta[1])
        return tree_map_only(Tensor, _zeros, shapes)


def _is_skipped(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an op reads a large tensor and its result is neither a view nor written to later."""
    is_large = any(isinstance(each, Tensor) and each.numel() > _LARGE for each in args)
    is_plain = all(argument.alias_info is None for argument in func._schema.arguments)
    is_new = func._schema.name.partition("::")[2].startswith(_TO_WRITE_TO)
    return is_large and is_plain and not is_new and func not in _OF_VALUES and kwargs.get("device") is None


def _zeros(like: Tensor) -> Tensor:
    """Return zeros; many of them take no memory, but cannot be written to."""
    if like.numel() <= _LARGE:
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Fill the list with the bytes that autograd keeps in the block, beside parameters; each storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(size for size, _ in found.values()))
