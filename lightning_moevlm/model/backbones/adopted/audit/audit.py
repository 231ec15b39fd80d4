"""Audits a model: which routers it has, what balances them, and how they spread a sample. Nothing is trained."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.routing_plan import Modality
from lightning_moevlm.model.backbones.adopted.audit.loads import measure_loads
from lightning_moevlm.model.backbones.adopted.audit.own_balance import measure_own_balance
from lightning_moevlm.model.backbones.adopted.audit.records import Audit, BalancingBias, RouterFacts, SharedExperts
from lightning_moevlm.model.backbones.adopted.hugging_face import HuggingFaceModel
from lightning_moevlm.model.backbones.adopted.routing._adopted_moe import AdoptedMoE
from lightning_moevlm.model.backbones.adopted.routing._their_router import TheirRouter
from lightning_moevlm.model.backbones.adopted.routing.adopt import as_before
from lightning_moevlm.model.backbones.backbone import BackboneOutput
from lightning_moevlm.model.layers import count_parameters
from lightning_moevlm.model.losses import AuxiliaryLosses, CrossLayerBalance, LossInput, Place


class _Place(NamedTuple):
    """A router in its block, and the bias that it adds to its scores; `before` are its values before any pass."""

    layer: AdoptedMoE
    router: TheirRouter
    block: nn.Module
    around: nn.Module
    bias: tuple[str, Tensor] | None
    before: Tensor | None


def audit(backbone: HuggingFaceModel, batches: Sequence[Batch]) -> Audit:
    """Audit a model that keeps its own routers.

    Args:
        backbone: the model.
        batches: of the sample. The loss is computed on the first one, of an even number of sequences.

    Raises:
        UserError: the model fails on the sample.
    """
    import transformers

    model: Any = backbone.model
    places = [_find_place(model, layer) for layer in backbone.layers if isinstance(layer, AdoptedMoE)]
    was_training = backbone.training
    backbone.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output, inputs = _watch(backbone, batches[0])
    parameters = list({id(p): p for place in places for p in _trained_by(place)}.values())
    counted_BS = output.layout.valid_BS & (output.layout.modality_BS == Modality.TEXT)
    with as_before(model):
        balance, gradients = measure_own_balance(model, parameters, inputs, counted_BS, _balance(places, output))
    backbone.eval()
    with torch.no_grad():
        passes = [backbone(*batch[:3]).plans for batch in batches]
    backbone.train(was_training)
    moved = {id(p) for p, gradient in zip(parameters, gradients, strict=True) if bool(gradient.any())}
    return Audit(
        model=type(model).__name__,
        family=model.config.model_type,
        transformers=transformers.__version__,
        num_parameters=count_parameters(model),
        num_layers=backbone.text_config.num_hidden_layers,
        routers=tuple(_describe(place, moved) for place in places),
        balance=balance,
        loads=measure_loads(passes),
    )


def _find_place(model: nn.Module, layer: AdoptedMoE) -> _Place:
    assert isinstance(layer.router, TheirRouter), "the model keeps its own routers"
    path = layer.path.removeprefix("model.").rpartition(".")[0]
    block, around = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    tensors = [*_tensors(layer.router.theirs, True), *_tensors(block, False)]
    found = [each for each in tensors if each[0].endswith("bias") and each[1].numel() == layer.num_experts]
    bias = found[0] if found else None
    return _Place(layer, layer.router, block, around, bias, None if bias is None else bias[1].detach().clone())


def _tensors(module: nn.Module, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def _trained_by(place: _Place) -> Iterator[nn.Parameter]:
    """Yield the parameters that decide where tokens go."""
    yield from place.router.theirs.parameters()
    if place.bias is not None and isinstance(place.bias[1], nn.Parameter):
        yield place.bias[1]


def _watch(backbone: HuggingFaceModel, batch: Batch) -> tuple[BackboneOutput, dict[str, Tensor]]:
    """Run a batch; return the output, and the tensors that the model was given."""
    given: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.update({name: value for name, value in named.items() if isinstance(value, Tensor)})

    body = getattr(backbone.model, backbone.model.base_model_prefix)
    hook = body.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            return backbone(*batch[:3]), given
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # sizes that do not fit each other
        said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(
            f"{type(backbone.model).__name__} fails on the sample: {said}. Check the sizes in its configuration"
        ) from error
    finally:
        hook.remove()


def _balance(places: Sequence[_Place], output: BackboneOutput) -> float | None:
    """Return the balance of a pass as transformers defines it; None for routers that it is not defined for."""
    if any(place.router.facts.score != "softmax" or place.layer.modality is not None for place in places):
        return None
    plans = output.plans
    inputs = [LossInput(each.plan, place=Place(each.source, each.block, each.layer, each.modalities)) for each in plans]
    losses = AuxiliaryLosses(None, None, cross_layer_balance=CrossLayerBalance())
    return float(losses.terms(inputs)["cross_layer_balance"].raw)


def _describe(place: _Place, moved: set[int]) -> RouterFacts:
    gate, layer = place.router.facts, place.layer
    return RouterFacts(
        path=layer.path,
        kind=type(place.router.theirs).__name__,
        num_experts=gate.num_experts,
        top_k=gate.top_k,
        score=gate.score,
        weight_sum=gate.sum,
        modality=None if layer.modality is None else layer.modality.label,
        shared=tuple(_find_shared(place)),
        bias=_describe_bias(place, moved),
    )


def _describe_bias(place: _Place, moved: set[int]) -> BalancingBias | None:
    if place.bias is None or place.before is None:
        return None
    name, values = place.bias
    mover = "gradient" if id(values) in moved else "nothing" if torch.equal(values, place.before) else "forward pass"
    return BalancingBias(name, mover, float(values.detach().min()), float(values.detach().max()))


def _find_shared(place: _Place) -> Iterator[SharedExperts]:
    """Yield modules whose names begin with `shared`, in the block or beside it; their gates are not experts."""
    routed = sum(p.numel() for p in place.layer.experts.parameters()) / place.layer.num_experts
    for module in (place.block, place.around):
        found = [(name, each) for name, each in module.named_children() if name.startswith("shared")]
        sizes = {name: count_parameters(each) for name, each in found if not name.endswith("gate")}
        if any(sizes.values()):
            yield from (SharedExperts(name, size / routed) for name, size in sizes.items() if size)
            return
