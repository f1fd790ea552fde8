"""Runs the stages of one rank as plain torch modules; a `runtime.executor.StageCompute`.

    stage without inputs    module(**inputs) or module(*inputs) or module(inputs), whichever the user's inputs are
    another stage           module(*contents): what each feeding stage handed over, in the order of the layout
    tail                    its output goes to loss(output, target), microbatch by microbatch

A stage hands over a tensor, a tuple of tensors, or None: "nothing for this microbatch". A root whose inputs are None is not
called, nor is a stage all of whose inputs are None; their output is None, and so is the gradient that comes back.

A stage without a backward (frozen, and so is all that feeds it) is called without autograd, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ldt_schedules.comm.message_header import Specs, specs_of
from ldt_schedules.errors import LdtError
from ldt_schedules.planning.dependencies import Dataflow
from ldt_schedules.planning.layout import Layout
from ldt_schedules.runtime.packing import Packing, Rows

Loss = Callable[[Any, Any], torch.Tensor]
"""(output of the tail, target) of one microbatch -> its loss, a scalar."""


@dataclass(frozen=True)
class PipelineStage:
    """A stage of this rank: its module, and how it takes several microbatches in one pass."""

    module: torch.nn.Module
    packing: Packing = field(default_factory=Rows)


@dataclass
class _Pass:
    """One call of a module: the microbatches of it whose backward is still to come."""

    due: set[int]


@dataclass
class _Saved:
    """Of one microbatch: what went in, as leaves of this stage's graph, as far as gradients of it go back, and what came
    out, still in the graph."""

    inputs: list[Any]
    output: Any
    of: _Pass


@dataclass
class ModuleStages:
    """The stages of this rank for one step.

    Attributes:
        inputs: root stage -> the inputs of each microbatch.
        targets: of each microbatch, for the loss.
        weights: of each microbatch's loss in the sum whose gradient is taken.
        losses: microbatch -> its loss, unweighted, as far as the tail has run.
        handed_over: (stage, microbatch) -> shapes of the output, so that a gradient of another shape is refused.
    """

    layout: Layout
    stages: Mapping[int, PipelineStage]
    inputs: Mapping[int, Sequence[Any]]
    targets: Sequence[Any] | None
    loss: Loss | None
    weights: Sequence[float]
    train: bool
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    handed_over: dict[tuple[int, int], Specs | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._flow = Dataflow(self.layout, forward_only=not self.train)

    def forward(
        self, stage: int, microbatches: tuple[int, ...], inputs: list[list[Any]]
    ) -> list[tuple[Any, _Saved | None]]:
        with torch.set_grad_enabled(self._flow.has_backward(stage)):
            return self._forward(stage, microbatches, inputs)

    def _forward(
        self, stage: int, microbatches: tuple[int, ...], inputs: list[list[Any]]
    ) -> list[tuple[Any, _Saved | None]]:
        sources, gradients_to = self.layout.inputs(stage), self._flow.gradients_to(stage)
        keeps = self._flow.has_backward(stage)
        wanted = [keeps and source in gradients_to for source in sources]
        leaves = [[_leaf(content, want) for content, want in zip(one, wanted, strict=True)] for one in inputs]
        called_with = [
            self.inputs[stage][m] if self.layout.is_head(stage) else _present(one)
            for m, one in zip(microbatches, leaves, strict=True)
        ]
        outputs = self._call(self.stages[stage], called_with, self.layout.is_head(stage))
        of = _Pass(set(microbatches))
        results: list[tuple[Any, _Saved | None]] = []
        for m, one, output in zip(microbatches, leaves, outputs, strict=True):
            if self.layout.is_tail(stage):
                output = self._loss_of(m, output)
            else:
                self.handed_over[stage, m] = None if output is None else specs_of(output)
            back = [leaf for leaf, want in zip(one, wanted, strict=True) if want]
            results.append((_detached(output), _Saved(back, output, of) if keeps else None))
        return results

    def backward(
        self, stage: int, microbatches: tuple[int, ...], saved: list[_Saved], output_grads: list[list[Any]]
    ) -> list[list[Any]]:
        tensors: list[torch.Tensor] = []
        gradients: list[torch.Tensor | None] = []
        for m, one, received in zip(microbatches, saved, output_grads, strict=True):
            one.of.due.discard(m)
            for tensor, gradient in self._roots_of(stage, m, one, received):
                tensors.append(tensor)
                gradients.append(gradient)
        if tensors:
            torch.autograd.backward(tensors, gradients, retain_graph=any(one.of.due for one in saved))
        return [[_taken_gradient(leaf) for leaf in one.inputs] for one in saved]

    def _call(self, stage: PipelineStage, called_with: list[Any], is_root: bool) -> list[Any]:
        """The output of each microbatch; of those that are absent None."""
        present = [one for one in called_with if one is not None]
        if not present:
            return [None] * len(called_with)
        if len(present) == 1:
            outputs = iter([_called(stage.module, present[0], is_root)])
        else:
            output = _called(stage.module, stage.packing.pack(present), is_root)
            outputs = iter(stage.packing.split(output, present))
        return [None if one is None else next(outputs) for one in called_with]

    def _loss_of(self, microbatch: int, output: Any) -> torch.Tensor:
        assert self.loss is not None, "a rank with a tail has a loss function"
        target = None if self.targets is None else self.targets[microbatch]
        loss = self.loss(output, target)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            what = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise LdtError(f"the loss of a microbatch is a scalar tensor, got {what}")
        self.losses[microbatch] = loss.detach()
        return loss * self.weights[microbatch]

    def _roots_of(
        self, stage: int, microbatch: int, saved: _Saved, received: list[Any]
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Where the backward of one microbatch begins: tensors of its output with their gradients, of all who read it."""
        if self.layout.is_tail(stage):
            return [(saved.output, None)] if saved.output.requires_grad else []
        parts = _parts(saved.output)
        return [
            (part, gradient)
            for number, part in enumerate(parts)
            if part is not None and part.requires_grad
            for gradient in [_sum([_parts(content)[number] for content in received if content is not None])]
            if gradient is not None
        ]


def _leaf(content: Any, wanted: bool) -> Any:
    """A leaf of the stage's own graph for each tensor that can have a gradient; it collects one if that is wanted."""

    def one(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return tensor.detach().requires_grad_(wanted)

    return _each(content, one)


def _present(contents: list[Any]) -> tuple[Any, ...] | None:
    """What a stage is called with: None when nothing at all reached it."""
    return tuple(contents) if any(content is not None for content in contents) else None


def _called(module: torch.nn.Module, inputs: Any, is_root: bool) -> Any:
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, tuple) or (is_root and isinstance(inputs, list)):
        return module(*inputs)
    return module(inputs)


def _parts(content: Any) -> Sequence[Any]:
    if content is None:
        return ()
    return (content,) if isinstance(content, torch.Tensor) else tuple(content)


def _each(content: Any, function: Callable[[Any], Any]) -> Any:
    if content is None or isinstance(content, torch.Tensor):
        return function(content)
    return tuple(function(part) for part in content)


def _detached(content: Any) -> Any:
    return _each(content, lambda part: part.detach() if isinstance(part, torch.Tensor) else part)


def _sum(gradients: list[Any]) -> torch.Tensor | None:
    """Of those who have read one output; None when nobody needs it."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return None
    total = present[0]
    for gradient in present[1:]:
        total = total + gradient
    return total


def _taken_gradient(leaf: Any) -> Any:
    """The gradient of a leaf, part by part, forgotten here; None where there is none at all."""
    gradients = _each(leaf, lambda part: None if part is None else part.grad)
    for part in _parts(leaf):
        if part is not None:
            part.grad = None
    if isinstance(gradients, tuple) and all(gradient is None for gradient in gradients):
        return None
    return gradients
