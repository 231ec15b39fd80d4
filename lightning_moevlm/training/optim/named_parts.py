"""Parts of a model by name, and training of some of them while the others stay as they are.

A part is the beginning of parameter names, such as `backbone.connector`; `*` stands for a number, as in
`backbone.blocks.*.ffn`. Frozen parameters take no gradient, so they have no optimiser state and no weight decay, and
data-parallel training exchanges nothing for them.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.common.nearest_name import suggest


def is_in(name: str, part: str) -> bool:
    """Return whether a name belongs to a part."""
    pieces, wanted = name.split("."), part.split(".")
    pairs = zip(pieces, wanted, strict=False)
    return len(pieces) >= len(wanted) and all(one == other or (other == "*" and one.isdigit()) for one, other in pairs)


def refuse_unknown_part(part: str, names: Sequence[str], option: str) -> None:
    """Refuse a part that none of the names is in; `option` is the key that holds it."""
    if any(is_in(name, part) for name in names):
        return
    known = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    largest = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
    raise UserError(
        f"{option}: this model has no {part}; {suggest(part, sorted(known))}name one of {', '.join(largest)}, or a "
        "part of them; * stands for a number"
    )


def train_only(module: nn.Module, parts: Sequence[str]) -> None:
    """Freeze every parameter outside of the parts; parameters that were frozen before stay so.

    Raises:
        UserError: a part that the module lacks, or nothing that is trained.
    """
    names = [name for name, _ in module.named_parameters()]
    for part in parts:
        refuse_unknown_part(part, names, "model.trainable")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and any(is_in(name, part) for part in parts))
    if is_frozen(module):
        raise UserError(
            f"model.trainable is {list(parts)}, which holds no parameter that is trained: name parts such as backbone, "
            "or null for the whole model"
        )


def is_frozen(*modules: nn.Module) -> bool:
    """Return whether no parameter of the modules is trained."""
    return not any(parameter.requires_grad for module in modules for parameter in module.parameters())


def count_trained(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many of the numbers are trained."""
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def refuse_unreached(loss: Tensor, parts: Sequence[str] | None) -> None:
    """Refuse a batch from which none of the trained parts learns."""
    if not loss.requires_grad:
        raise UserError(
            f"model.trainable is {list(parts or ())}, and this batch uses none of it, such as a connector when there "
            "is no image: train more parts, or choose data of which every batch uses them"
        )
