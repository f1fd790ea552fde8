"""One rank of the example: its part of the model, its optimizer, its inputs; and the check against one process.

What runs when is not here: that is the table's, and `PipelineRunner` runs it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.omni import packing, samples, thinker
from ldt_schedules.comm.cause import Cause
from ldt_schedules.comm.message_transport import MessageTransport
from ldt_schedules.errors import LdtError
from ldt_schedules.planning import ScheduleTable
from ldt_schedules.runtime import PipelineRunner, PipelineStage, StepResult

SEED = 7
WITHOUT = {1: ("audio",), 2: ("image",)}
"""What a microbatch of each step lacks."""
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6}
"""How far a gradient may be from that of one process: norm of the difference over norm."""

Gradients = dict[str, "Tensor | None"]
"""By the parameter's name in the whole model; None where it has none."""


@dataclass(frozen=True)
class Options:
    """What all ranks must agree on."""

    table: ScheduleTable
    steps: int = 20
    dtype: torch.dtype = torch.float32
    lr: float = 3e-3
    blocking: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Verified:
    """Every gradient of a step was held against one process running the whole model.

    Attributes:
        count: parameters that were compared.
        worst: the largest relative difference, `name` its parameter, `limit` what is allowed.
    """

    count: int
    worst: float
    name: str
    limit: float


@dataclass(frozen=True)
class Progress:
    """A step, as the rank with the loss sees it.

    Attributes:
        loss: mean over the microbatches.
        tokens: of all rows, padding not counted.
        seconds: of forward, backward and optimizer.
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    verified: Verified | None


def microbatches(step: int, count: int) -> list[samples.Microbatch]:
    """The microbatches of a step; every rank makes the same, and uses only what is its own."""
    config = thinker.tiny_config()
    return [samples.microbatch(config, step * count + m, without=WITHOUT.get(m, ())) for m in range(count)]


def own_stages(table: ScheduleTable, rank: int, dtype: torch.dtype) -> dict[int, PipelineStage]:
    """This rank's stages. The rest of the model is let go of when this returns."""
    whole = thinker.build(SEED, dtype)
    merge_size, cut = whole.config.vision_config.spatial_merge_size, thinker.stages(whole)
    return {number: packing.pipeline_stage(cut[number], number, merge_size) for number in table.layout.stages_on(rank)}


class OmniRank:
    """One process of the pipeline."""

    def __init__(self, options: Options, rank: int, transport: MessageTransport) -> None:
        self.options, self.rank, self.transport = options, rank, transport
        table = options.table
        self.stages = own_stages(table, rank, options.dtype)
        self.has_loss = any(table.layout.is_tail(stage) for stage in self.stages)
        self.runner = PipelineRunner(
            table, rank, self.stages, transport, loss=thinker.loss if self.has_loss else None, blocking=options.blocking
        )
        modules = [stage.module for stage in self.stages.values()]
        self.optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=options.lr)

    def train(self) -> Iterator[Progress]:
        """Run all steps; the rank with the loss tells of each.

        Raises:
            LdtError: an action failed on some rank, or a gradient differs from that of one process.
        """
        for step in range(self.options.steps):
            data = microbatches(step, self.options.table.num_microbatches)
            begin = time.perf_counter()
            result = self.forward_backward(data)
            seconds = time.perf_counter() - begin
            verified = self._verify(data) if step == 0 and self.options.verify else None
            begin = time.perf_counter()
            self.optimizer.step()
            seconds += time.perf_counter() - begin
            if self.has_loss:
                tokens = sum(int(batch["text"]["attention_mask"].sum()) for batch in data)
                yield Progress(step, float(sum(result.losses)) / len(result.losses), tokens, seconds, verified)

    def forward_backward(self, data: list[samples.Microbatch]) -> StepResult:
        """One step of the table; afterwards `.grad` of this rank's parameters is that of the mean loss."""
        self.optimizer.zero_grad()
        by_stage = {0: [b["audio"] for b in data], 1: [b["vision"] for b in data], 2: [b["text"] for b in data]}
        inputs = {stage: by_stage[stage] for stage in self.stages if stage in by_stage}
        return self.runner.step(inputs, [batch["labels"] for batch in data] if self.has_loss else None)

    def gradients(self) -> Gradients:
        """Of this rank's parameters."""
        return gradients(stage.module for stage in self.stages.values())

    def _verify(self, data: list[samples.Microbatch]) -> Verified | None:
        """All ranks write their gradients into a directory; the one with the loss compares. All on one machine."""
        if not self.has_loss:
            directory = self.transport.fetch("verify", "the directory for gradients")["directory"]
            torch.save(self.gradients(), Path(directory, f"rank{self.rank}.pt"))
            self.transport.wait_for_all()
            return None
        with tempfile.TemporaryDirectory(prefix="omni-gradients-") as directory:
            self.transport.link.publish("verify", {"directory": directory})
            torch.save(self.gradients(), Path(directory, f"rank{self.rank}.pt"))
            self.transport.wait_for_all()
            found: Gradients = {}
            for path in Path(directory).glob("*.pt"):
                found |= torch.load(path)
        try:
            return compared(found, whole_gradients(self.options.dtype, data), LIMITS[self.options.dtype])
        except LdtError as error:
            self.transport.link.watch.declare(Cause(str(error), self.rank))
            raise


def gradients(modules: Iterable[nn.Module]) -> Gradients:
    """Of all parameters of these modules, by name."""
    return {name: parameter.grad for module in modules for name, parameter in module.named_parameters()}


def whole_gradients(dtype: torch.dtype, data: list[samples.Microbatch]) -> Gradients:
    """Of the mean loss, by one process with the model uncut as the library has it, microbatch after microbatch."""
    whole = thinker.build(SEED, dtype)
    for batch in data:
        (whole(**samples.whole_kwargs(batch)).loss * (1 / len(data))).backward()
    return gradients([whole])


def compared(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], limit: float) -> Verified:
    """Hold every gradient against what is expected of it.

    Raises:
        LdtError: another set of parameters, a gradient on one side only, or one that is further off than `limit`.
    """
    if found.keys() != expected.keys():
        raise LdtError(f"gradients on one side only: {sorted(found.keys() ^ expected.keys())}")
    differences = {name: _difference(name, found[name], expected[name]) for name in expected}
    name = max(differences, key=differences.__getitem__)
    if not differences[name] <= limit:  # a NaN is not either
        raise LdtError(
            f"the gradient of {name} differs from that of one process by {differences[name]:.1e} of its norm; the limit is "
            f"{limit:.0e}"
        )
    return Verified(len(differences), differences[name], name, limit)


def _difference(name: str, found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference over norm; 0 where both are None or both zero."""
    if found is None or expected is None:
        if found is not expected:
            raise LdtError(f"{name} has a gradient {'in one process' if found is None else 'on its rank'} only")
        return 0.0
    difference = float((found - expected).norm())
    return difference and difference / float(expected.norm())
