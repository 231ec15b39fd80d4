"""Rehearses the current step: runs its first samples once, with its weights, masks and noise, and records the layers.

Proofs read the record, and run single layers again on their recorded inputs. Nothing is left behind: no gradient, no
random state, no count, no choice of a dispatcher. `autograd.grad` touches neither the `.grad` of parameters nor the
hooks by which data-parallel training exchanges gradients.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_moevlm.contracts.batch import Batch
from lightning_moevlm.contracts.sequence_layout import Layout
from lightning_moevlm.contracts.step_records import LossReport, ObjectiveOutput
from lightning_moevlm.model.layers import Attention, Block, DenseFFN, Mixture, PatchEmbedding
from lightning_moevlm.model.losses import LayerCounts, LossInput
from lightning_moevlm.model.precision import Region, region
from lightning_moevlm.model.routers import Router
from lightning_moevlm.training import VisionLanguageModule
from lightning_moevlm.training.step.routing_counts import RoutingCounter, loss_inputs

_WATCHED = (Attention, Block, DenseFFN, Mixture, Router, PatchEmbedding)


class Call(NamedTuple):
    """The first call of a layer with more than padding."""

    args: tuple[Any, ...]
    output: Any


class Rehearsal:
    """The first samples of a batch, run as the step would run them.

    Args:
        trainer: gives the precision.
        module: in training mode.
        batch: on the module's device.
        num_samples: samples of the batch that run.
        step: number of the micro-batch; seeds masks and noise.

    Attributes:
        output: the objective's, with gradient.
        inputs: of the losses on routing.
        report: every term, with gradient.
        counts: of these samples, by MoE layer.
        calls: recorded layers, by path in the module.
    """

    def __init__(
        self, trainer: Trainer, module: VisionLanguageModule, batch: Batch, num_samples: int, step: int
    ) -> None:
        self.module = module
        self.batch = batch.first(num_samples)
        self.calls: dict[str, Call] = {}
        self._trainer = trainer
        self._step = step
        self._outputs: dict[str, Tensor] = {}  # of layers run again as they are
        # copies dispatch: dispatchers remember which cases they met, which goes into the record of the run
        moes = [layer for layer in module.modules() if isinstance(layer, Mixture)]
        self._spare_dispatchers = [(layer, copy.deepcopy(layer.dispatcher)) for layer in moes]
        backbone = module.backbone
        with self.conditions(), torch.enable_grad(), self._watching(), self._measuring():
            self.output: ObjectiveOutput = module.objective(
                backbone, self.batch, module.draws("train", module.global_step)
            )
        counter = RoutingCounter(backbone)
        counter.add(0, self.output.plans)
        self.counts: dict[str, LayerCounts] = counter.totals(lambda own: own, module.device)
        asks = self.counts if module.losses.reads_counts else {}
        self.inputs: list[LossInput] = loss_inputs(backbone, self.output.plans, asks, training=True)
        with self.in_losses():
            auxiliary = module.losses.terms(self.inputs, self.output.log_partitions, module.current_weights)
        self.report = LossReport(self.output.terms, auxiliary)

    @property
    def is_sound(self) -> Tensor:
        """Whether every term of the loss is finite: a bool scalar on the device."""
        return torch.stack([term.raw.detach().isfinite() for terms in self.report for term in terms.values()]).all()

    @cached_property
    def total_gradient(self) -> dict[Tensor, Tensor | None]:
        """The gradient of the total loss on each parameter; None where the loss does not depend on it."""
        parameters = list(self.module.parameters())
        return dict(zip(parameters, gradients_of(self.report.total_loss, parameters), strict=True))

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Compute in the Trainer's precision with the step's noise; restore random states and dispatchers."""
        module = self.module
        device = module.device
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            for layer, dispatcher in self._spare_dispatchers:
                stack.enter_context(replace_attribute(layer, "dispatcher", dispatcher))
            stack.enter_context(self._trainer.precision_plugin.train_step_context())
            module.seed_noise(self._step)
            yield

    @contextmanager
    def in_losses(self) -> Iterator[None]:
        """Compute as auxiliary losses are computed."""
        device_type = self.module.device.type
        with self.conditions(), torch.enable_grad(), region(self.module.precision, "losses", device_type):
            yield

    def run_again(self) -> ObjectiveOutput:
        """Run the samples again without gradient, as the model now is."""
        with self.conditions(), torch.no_grad():
            output: ObjectiveOutput = self.module.objective(
                self.module.backbone, self.batch, self.module.draws("train", self.module.global_step)
            )
            return output

    def layer(self, path: str, instead: nn.Module | None = None, *more: object) -> Any:
        """Run one layer again, or `instead` in its place, on its recorded inputs (and more); without gradient."""
        layer = self.module.get_submodule(path) if instead is None else instead
        name: Region = "router" if isinstance(layer, Router) else "trunk"
        with self.conditions(), torch.no_grad(), region(self.module.precision, name, self.module.device.type):
            return layer(*self.calls[path].args, *more)

    def compare(
        self, path: str, attribute: str, one: object, other: object, read: Callable[[Any], Tensor] | None = None
    ) -> float:
        """Run a layer with two values of an attribute and return the difference of its outputs, relative to the first.

        Args:
            path: of a recorded layer.
            attribute: that a switch sets.
            one: value with the switch.
            other: value without it.
            read: output -> the tensor to compare; None takes the tokens.
        """
        layer = self.module.get_submodule(path)
        found: list[Tensor] = []
        for value in (one, other):
            is_own = value is getattr(layer, attribute) and read is None
            if is_own and path in self._outputs:
                found.append(self._outputs[path])
                continue
            with replace_attribute(layer, attribute, value):
                output = self.layer(path)
            if read is None:
                found.append(output if isinstance(output, Tensor) else output.tokens_BSD)
            else:
                found.append(read(output))
            if is_own:
                self._outputs[path] = found[-1]
        return difference(*found)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        def hook(path: str) -> Any:
            def keep(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if path not in self.calls and not any(_is_padding(argument) for argument in args):
                    self.calls[path] = Call(args, output)

            return keep

        handles = [
            layer.register_forward_hook(hook(path))
            for path, layer in self.module.named_modules()
            if isinstance(layer, _WATCHED)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        backbone = self.module.backbone
        before, backbone.measure_attention = backbone.measure_attention, True
        try:
            yield
        finally:
            backbone.measure_attention = before


@contextmanager
def replace_attribute(owner: Any, attribute: str, value: object) -> Iterator[None]:
    """Give an attribute of a layer another value inside the context."""
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def _is_padding(argument: object) -> bool:
    """Return whether an argument is the layout of padding alone, which shows nothing of a layer."""
    return isinstance(argument, Layout) and not bool(argument.valid_BS.any())


def gradients_of(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient on each parameter, None where the value does not depend on it; `.grad` stays as it is."""
    wanted = [p for p in parameters if p.requires_grad]
    if not value.requires_grad or not wanted:
        return [None] * len(parameters)
    found = iter(torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in parameters]


def difference(one: Tensor, other: Tensor) -> float:
    """Return the root mean square of the difference over that of the first."""
    size = torch.linalg.vector_norm(one.float())
    return float(torch.linalg.vector_norm(one.float() - other.float()) / size.clamp(min=1e-30))
