"""Starts training from the weights of another run: whole, by parts, or a dense model's in a mixture of experts.

Upcycling (`model/experts/upcycle.py`): every expert starts as a copy of the dense feed-forward in its place, or of the
only expert there (MoMa, arXiv 2407.21770, section 2.5), and routers start anew. The optimiser's state may come along
(`init_optimizer.py`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.contracts.sequence_layout import Layout, Span
from lightning_moevlm.model.experts.upcycle import Upcycle, make_experts
from lightning_moevlm.model.layers import MoEFFN
from lightning_moevlm.tracking import RunLogger
from lightning_moevlm.training.checkpoints.checkpoint_file import read_checkpoint
from lightning_moevlm.training.optim.named_parts import is_in, refuse_unknown_part

_DENSE_OF = {"experts.gate_EDF": "gate.weight", "experts.up_EDF": "up.weight", "experts.down_EFD": "down.weight"}
_HIDDEN_AXIS = {"experts.gate_EDF": 1, "experts.up_EDF": 1, "experts.down_EFD": 0}  # of the dense matrix
_GROUP_DEPTH = 2  # parts of a name that the report groups by, such as backbone.blocks


@dataclass(frozen=True)
class InitFrom:
    """Weights that training starts from.

    Args:
        checkpoint: file of another run, or folder of an exported model.
        parts: beginnings of names that are taken, such as backbone.patches; * stands for a number, null takes all that
            both models have.
        upcycle: lets experts start from dense feed-forwards; null takes experts from experts alone.
        optimizer_state: true takes the state of the other run's optimiser for all that is taken, copied for each expert
            of an upcycled model; null starts it anew.

    Raises:
        UserError: the optimiser's state for units that start anew.
    """

    checkpoint: str
    parts: tuple[str, ...] | None = None
    upcycle: Upcycle | None = None
    optimizer_state: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.optimizer_state and self.upcycle is not None and self.upcycle.reinitialised:
            raise UserError(
                "model.init_from.optimizer_state is true, and upcycle.reinitialised lets units start anew, for which "
                "the other run's optimiser has no state: set one of the two to null or 0"
            )


class Loaded(NamedTuple):
    """Names of tensors by what became of them."""

    taken: tuple[str, ...]  # as they were
    upcycled: Mapping[str, str]  # experts that started from dense matrices, with the names of these
    new: tuple[str, ...]  # of this model, with its own initial weights
    left: tuple[str, ...]  # of the checkpoint, unused

    def describe(self) -> str:
        """Return a table as text: tensors by group of names."""
        columns = {name: Counter(_group(each) for each in names) for name, names in self._asdict().items()}
        groups = sorted({group for counts in columns.values() for group in counts})
        width = max(map(len, groups))
        lines = [f"{'part':<{width}}  " + "  ".join(f"{name:>8}" for name in columns)]
        lines += [
            f"{group:<{width}}  " + "  ".join(f"{counts[group] or '':>8}" for counts in columns.values())
            for group in groups
        ]
        return "\n".join(line.rstrip() for line in lines)


def start_from(module: LightningModule, options: InitFrom) -> Loaded:
    """Set the weights of a module from another run's checkpoint; print a table, and log every name as init_from.txt."""
    loaded = load_initial_weights(module, options)
    table = loaded.describe()
    rank_zero_info(f"initial weights from {options.checkpoint} (tensors):\n{table}")
    differences = measure_upcycling(module, loaded)
    names = [f"{kind} {name}" for kind, each in loaded._asdict().items() for name in each]
    receipt = [f"{path} differs from its dense start by {value:.3g}" for path, value in differences.items()]
    text = "\n".join([options.checkpoint, "", table, "", *receipt, "", *names]) + "\n"
    log_text(module, "init_from.txt", text)
    return loaded


def report_upcycling(module: LightningModule) -> None:
    """Print the largest difference of upcycled mixtures to their dense starts, if there are any."""
    layers = [layer for layer in module.modules() if isinstance(layer, MoEFFN)]
    differences = [layer.start_difference for layer in layers if layer.start_difference is not None]
    if differences:
        worst = max(differences)
        rank_zero_info(f"{len(differences)} upcycled mixtures differ from their dense start by at most {worst:.2g}")


def log_text(module: LightningModule, file: str, text: str) -> None:
    """Log a text file with the run."""
    for logger in module.loggers:
        if isinstance(logger, RunLogger):
            logger.log_artifact_text(file, text)


def load_initial_weights(module: nn.Module, options: InitFrom) -> Loaded:
    """Set the weights of a module from another run's checkpoint.

    Raises:
        UserError: the file cannot be used, a shape differs, or a part is in one of the two models alone.
    """
    path = options.checkpoint
    there: Mapping[str, Tensor] = read_checkpoint(Path(path))["state_dict"]
    here = module.state_dict()
    wanted = _select(options, here, there)
    taken = {name: there[name] for name in wanted if name in there}
    upcycled: dict[str, Tensor] = {}
    dense_of: dict[str, str] = {}
    used = set(taken)
    for name in wanted if options.upcycle is not None else ():
        dense = _find_dense(name, there)
        if dense and options.upcycle is not None:
            upcycled[name] = _make_experts(name, there[dense], here[name].shape[0], options.upcycle)
            dense_of[name] = dense
            taken.pop(name, None)
            used.add(dense)
    layers = _layers_of(upcycled)
    for name in wanted:
        if name not in upcycled and any(is_in(name, f"{layer}.experts") for layer in layers):
            raise UserError(
                f"model.init_from.upcycle: {name} has no counterpart in {path}, whose feed-forward is of another kind; "
                "choose experts of its kind: MLPExperts for a dense feed-forward"
            )
    taken = {name: value for name, value in taken.items() if not any(is_in(name, f"{path}.router") for path in layers)}
    used = {name for name in used if name in taken or name not in here or name in upcycled}
    for name, value in (taken | upcycled).items():
        if value.shape != here[name].shape:
            widths = "experts of equal hidden_dim" if name in upcycled else "the models equal widths"
            raise UserError(
                f"model.init_from: {name} is {tuple(value.shape)} from {path} and {tuple(here[name].shape)} in this "
                f"model: give {widths}, or name the parts to take in init_from.parts"
            )
    if not used:
        raise UserError(
            f"model.init_from: {path} and this model have no tensor in common; give a checkpoint of a similar model"
        )
    with torch.no_grad():
        for name, value in (taken | upcycled).items():
            here[name].copy_(value)
    new = tuple(name for name in here if name not in taken and name not in upcycled)
    left = tuple(name for name in there if name not in used)
    return Loaded(tuple(taken), dense_of, new, left)


def _select(options: InitFrom, here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> list[str]:
    """Return the names of this model that are to be set."""
    if options.parts is None:
        return list(here)
    for part in options.parts:
        refuse_unknown_part(part, list(here), "model.init_from.parts")
        found = [name for name in here if is_in(name, part)]
        if not any(name in there or (options.upcycle is not None and _find_dense(name, there)) for name in found):
            raise UserError(f"model.init_from.parts: {options.checkpoint} has nothing for {part}; name another part")
    return [name for name in here if any(is_in(name, part) for part in options.parts)]


def _layers_of(upcycled: Iterable[str]) -> list[str]:
    """Return the paths of the mixtures that these stacks belong to."""
    return list(dict.fromkeys(name.rpartition(".experts.")[0] for name in upcycled))


def _find_dense(name: str, there: Mapping[str, Tensor]) -> str:
    """Return the checkpoint's matrix that an expert stack may start from: dense, or of an only expert; else ""."""
    stack = next((stack for stack in _DENSE_OF if name.endswith(f".{stack}")), None)
    if stack is None:
        return ""
    if name in there:
        return name if there[name].shape[0] == 1 else ""
    dense = name.removesuffix(stack) + _DENSE_OF[stack]
    return dense if dense in there else ""


def _make_experts(name: str, dense: Tensor, num_experts: int, options: Upcycle) -> Tensor:
    """Return the stack of experts that starts from a dense matrix, in fp32."""
    stack = next(stack for stack in _DENSE_OF if name.endswith(f".{stack}"))
    matrix = dense[0] if dense.ndim == 3 else dense.T  # (D, F) or (F, D), as experts hold theirs
    return make_experts(matrix, num_experts, _HIDDEN_AXIS[stack], options, name.removesuffix(f".{stack}"), stack)


def _group(name: str) -> str:
    return ".".join(name.split(".")[:_GROUP_DEPTH])


@torch.no_grad()
def measure_upcycling(module: nn.Module, loaded: Loaded, num_tokens: int = 64) -> dict[str, float]:
    """Return by layer the largest difference of an upcycled mixture to its first expert alone, over that one's output.

    It is 0 to rounding if all experts are copies and the weights of a token's choices add up to 1.
    """
    found: dict[str, float] = {}
    for path in _layers_of(loaded.upcycled):
        layer = module.get_submodule(path)
        assert isinstance(layer, MoEFFN)
        generator = torch.Generator().manual_seed(0)
        tokens_TD = torch.randn(num_tokens, layer.dim, generator=generator).to(layer.experts.stacks()[0])
        layout = Layout((Span(Modality.TEXT, 0, num_tokens),), torch.ones(1, num_tokens, dtype=torch.bool))
        was_training = layer.training
        mixed_TD = layer.eval()(tokens_TD.unsqueeze(0), layout).tokens_BSD[0]
        first = tuple(stack[0] for stack in layer.experts.stacks())
        alone_TD = layer.experts.run(tokens_TD, first, torch.matmul)
        layer.train(was_training)
        found[path] = layer.start_difference = float((mixed_TD - alone_TD).abs().max() / alone_TD.abs().max())
    return found
