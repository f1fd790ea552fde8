"""One F or B of a model chunk, through Megatron's own `forward_step` and `backward_step`.

So everything these honour is honoured: autocast, grad_scale_func, MoE and MTP loss scales, timers, per-token loss,
non-loss data, deallocation of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_type

from ldt_schedules.megatron.compatibility import call_with_known
from ldt_schedules.megatron.grad_sync import GradSync
from ldt_schedules.megatron.session import Session
from ldt_schedules.planning.layout import EDGE_RANK
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.runtime.batches import SharedBatches
from ldt_schedules.runtime.step_header import StepHeader
from ldt_schedules.topology import Site

Saved = tuple[list[torch.Tensor], torch.Tensor]
"""Inputs and output of a stage, kept from its forward to its backward."""


@dataclass
class MegatronStages:
    """The stages of this process for one step; a `runtime.executor.StageCompute`.

    Attributes:
        modules: stage -> module to call.
        forward_data_store: what the loss function returned, one entry a microbatch; Megatron's return value.
        num_tokens: loss tokens of this process so far, an int tensor; 0 in the cloud.
        header: what the edge said of this step.
        recompute_window: stage -> in-flight microbatches, for partial activation checkpointing; None when it is off.
    """

    run: Session
    config: Any
    modules: dict[int, torch.nn.Module]
    table: ScheduleTable
    batches: SharedBatches
    grad_sync: GradSync
    forward_step_func: Callable[..., Any]
    num_tokens: torch.Tensor
    header: StepHeader
    forward_data_store: list[Any] = field(default_factory=list)
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    recompute_window: dict[int, int] | None = None

    def forward(
        self, stage: int, microbatches: tuple[int, ...], inputs: list[list[torch.Tensor]]
    ) -> list[tuple[torch.Tensor, Saved]]:
        (microbatch,), (inputs_of_it,) = microbatches, inputs
        layout = self.table.layout
        # An alias: what several stages of one rank read must not collect their gradients in one place.
        inputs_of_it = [
            tensor.detach().requires_grad_(not self.table.forward_only and layout.has_backward(source))
            for tensor, source in zip(inputs_of_it, layout.inputs(stage), strict=True)
        ]
        with torch.set_grad_enabled(torch.is_grad_enabled() and layout.has_backward(stage)):
            return [self._forward(stage, microbatch, inputs_of_it)]

    def _forward(self, stage: int, microbatch: int, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, Saved]:
        layout = self.table.layout
        local = self.run.local_microbatch(microbatch)
        with self._on_chunk(stage):
            output, num_tokens = call_with_known(
                schedules.forward_step,
                self.forward_step_func,
                self._batches(stage, microbatch),
                self.modules[stage],
                self.table.num_microbatches,
                _for_megatron(inputs),
                self.forward_data_store,
                self.config,
                cp_group_size=parallel_state.get_context_parallel_world_size(),
                collect_non_loss_data=self.collect_non_loss_data,
                checkpoint_activations_microbatch=self._checkpoint_all_layers(stage, local),
                is_first_microbatch=schedules.check_first_val_step(
                    self.first_val_step, self.table.forward_only, local == 0
                ),
                current_microbatch=local,
                is_last_stage=layout.is_tail(stage),
            )
        if len(inputs) > 1:
            (output,) = output  # a list in, a list out
        if any(output is tensor for tensor in inputs):
            # A stage without layers; up to megatron-core 0.12 it hands its input on. Freed as output it would be no input.
            output = output.clone()
        self.num_tokens += num_tokens.to(self.num_tokens.device)
        if layout.is_tail(stage):
            return output, (inputs, output)
        # The alias is what is sent; the original keeps only its place in the autograd graph.
        to_send = output.detach()
        if not self.table.forward_only:
            schedules.deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)
        return to_send, (inputs, output)

    def backward(
        self, stage: int, microbatches: tuple[int, ...], saved: list[Saved], output_grads: list[list[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        (microbatch,), (saved_of_it,), (grads_of_it,) = microbatches, saved, output_grads
        return [self._backward(stage, microbatch, saved_of_it, grads_of_it)]

    def _backward(
        self, stage: int, microbatch: int, saved: Saved, output_grads: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        inputs, output = saved
        output_grad = torch.stack(output_grads).sum(0) if len(output_grads) > 1 else next(iter(output_grads), None)
        model_type = get_model_type(self.modules[stage])
        # Megatron keeps the gradient of every input that it is given; a frozen stage's output has none.
        wanted = [tensor if tensor.requires_grad else None for tensor in inputs]
        with self._on_chunk(stage), self.grad_sync.around_backward(stage, microbatch):
            given = schedules.backward_step(_for_megatron(wanted), output, output_grad, model_type, self.config)
        grads = given if len(inputs) > 1 else [given] if inputs else []
        return [
            torch.zeros_like(tensor) if grad is None else grad
            for tensor, grad in zip(inputs, grads, strict=True)
            if tensor.requires_grad
        ]

    @contextmanager
    def _on_chunk(self, stage: int) -> Iterator[None]:
        """While inside, Megatron's predicates answer for `stage`, and its virtual rank is that of the stage's chunk."""
        with self.run.stage(stage):
            if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
                yield
                return
            before = parallel_state.get_virtual_pipeline_model_parallel_rank()
            parallel_state.set_virtual_pipeline_model_parallel_rank(list(self.modules).index(stage))
            try:
                yield
            finally:
                parallel_state.set_virtual_pipeline_model_parallel_rank(before)

    def _batches(self, stage: int, microbatch: int) -> Iterator[Any] | None:
        """What the forward step reads: at the edge the batch, in the cloud what the header tells of it."""
        layout, told = self.table.layout, self.header.told
        if told is not None and self.run.place.site is Site.CLOUD:
            assert self.run.microbatch_format is not None
            return iter([self.run.microbatch_format.in_the_cloud(told[microbatch])])
        if layout.is_tail(stage):
            return self.batches.for_tail(microbatch)
        return self.batches.for_chunk(microbatch) if layout.stages[stage].ranks == (EDGE_RANK,) else None

    def _checkpoint_all_layers(self, stage: int, microbatch: int) -> bool | None:
        """Megatron's window rule (appendix C of arXiv:2205.05198), with the stage's own number in flight."""
        if self.recompute_window is None:
            return None
        limit = self.config.num_microbatches_with_partial_activation_checkpoints
        return bool(microbatch % self.recompute_window[stage] >= limit)


def _for_megatron(inputs: Sequence[torch.Tensor | None]) -> Any:
    """A stage's inputs as Megatron's steps take them: a list only where there are several."""
    return list(inputs) if len(inputs) > 1 else inputs[0] if inputs else None
