"""Which parts of an adopted model are trained: all but frozen ones, or low-rank adapters (LoRA, arXiv 2106.09685).

Weights that are read from a directory and never trained are in no checkpoint, which would be as large as the model.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.number_checks import check_number
from lightning_moevlm.model.backbones.adopted.sizes import is_connector, vision_parameters
from lightning_moevlm.model.layers import Mixture

Part: TypeAlias = Literal["vision", "connector", "language", "routers", "all_but_routers"]
_SAMPLED = 64


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside frozen matrices, in fp32 as peft has them; needs peft, of the extra `hf`.

    Args:
        rank: of each adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: share of their inputs left out in training.
        targets: ends of names of linear layers that get one; experts are stacks and get none.
        train_routers: routers are trained as they are, beside the adapters.
        train_experts: so are experts; upcycled ones need it, or copies would stay alike.

    Raises:
        UserError: a number out of range, or no target.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    train_routers: bool = True
    train_experts: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("lora.rank", self.rank, least=1)
        check_number("lora.alpha", self.alpha, above=0)
        check_number("lora.dropout", self.dropout, least=0, below=1)
        if not self.targets:
            raise UserError("lora.targets is empty: name ends of linear layers, such as q_proj, or set lora to null")


def add_adapters(model: nn.Module, layers: Iterable[Mixture], options: LoRA) -> None:
    """Put adapters beside the targets, and freeze everything else, in place.

    Raises:
        UserError: peft is missing, or the model has no such layer.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("lora needs peft, which is not installed: pip install 'lightning-moevlm[hf]'") from error
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError(f"lora.targets {list(options.targets)}: {str(error).split(chr(10))[0]}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # bf16 rounds many steps of a small rate away
    for layer in layers:
        if options.train_routers:
            layer.router.requires_grad_()
        if options.train_experts:
            for parameter in layer.experts.parameters():
                parameter.requires_grad_()


def freeze(model: Any, layers: Sequence[Mixture], parts: Sequence[Part]) -> None:
    """Freeze parts of a model of transformers, in place.

    Raises:
        UserError: a part that the model does not have, or nothing that is left to train.
    """
    members = _members(model, layers)
    for part in parts:
        if not members[part]:
            having = [name for name, found in members.items() if found]
            raise UserError(f"{type(model).__name__} has no {part} to freeze: name some of {', '.join(having)}")
        for parameter in members[part]:
            parameter.requires_grad_(False)
    if parts and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.backbone.frozen {list(parts)} leaves nothing to train: leave one part out")


def leave_out_frozen(owner: nn.Module, layers: Sequence[Mixture], path: str) -> None:
    """Leave frozen weights out of the state of `owner`, which reads them from `path`, in place.

    The buffer `origin` is saved for them: a hash of some numbers of each. Loading compares it, so a state is never
    joined with other weights; it raises a `UserError` then. Mixtures keep all that is theirs, which may be drawn.
    """
    own = {id(p) for layer in layers for p in layer.parameters()}
    frozen = {
        name: p
        for name, p in owner.named_parameters(remove_duplicate=False)
        if not p.requires_grad and id(p) not in own
    }
    if not frozen:
        return
    owner.register_buffer("origin", _digest(frozen))
    owner.register_state_dict_post_hook(partial(_drop, tuple(frozen)))
    owner.register_load_state_dict_pre_hook(partial(_supply, tuple(frozen), path))


def _drop(names: Sequence[str], module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in names:
        state.pop(f"{prefix}{name}", None)


def _supply(names: Sequence[str], path: str, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add the module's own weights to a state that has none of them."""
    saved = state.get(f"{prefix}origin")
    if saved is not None and not torch.equal(saved.cpu(), module.get_buffer("origin").cpu()):
        raise UserError(
            f"the weights in {path} are not those that this checkpoint was trained from: give model.backbone.path the "
            "directory, and model.backbone.dtype the dtype, of its training"
        )
    here = dict(module.named_parameters(remove_duplicate=False))
    for name in names:
        state.setdefault(f"{prefix}{name}", here[name])


def _digest(weights: Mapping[str, Tensor]) -> Tensor:
    """Return a hash of 64 numbers of each tensor, as 32 bytes."""
    read = hashlib.sha256()
    for name, weight in weights.items():
        read.update(name.encode())
        if not weight.is_meta:
            numbers = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)][:_SAMPLED]
            read.update(numbers.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return torch.tensor(list(read.digest()), dtype=torch.uint8)


def _members(model: Any, layers: Sequence[Mixture]) -> Mapping[Part, list[nn.Parameter]]:
    seeing = vision_parameters(model)
    routers = {id(p) for layer in layers for p in layer.router.parameters()}
    members: dict[Part, list[nn.Parameter]] = {
        "vision": [], "connector": [], "language": [], "routers": [], "all_but_routers": []
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        part: Part = "connector" if is_connector(name) else "vision" if id(parameter) in seeing else "language"
        members[part].append(parameter)
        members["routers" if id(parameter) in routers else "all_but_routers"].append(parameter)
    return members
