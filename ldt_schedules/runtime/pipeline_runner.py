"""Runs a schedule table on plain torch modules, one process a rank: no Megatron, any graph of stages.

Who knows torch.distributed.pipelining will know this: a module for each stage of the rank, a schedule, a loss, `step`. What
differs is that the schedule is the table itself, with every peer in it, and that shapes are told and not inferred.

    transport = connect_ranks(rank, num_ranks)
    runner = PipelineRunner(table, rank, {3: join}, transport, loss=None)
    for batch in batches:
        losses = runner.step().losses

Three roots that feed one stage, and the gradients that come back:

    rank 0  audio  ─┐                                   ┌─►  rank 0
    rank 1  vision ─┼─►  rank 3 ─►  rank 4 ─►  rank 5 ──►    rank 1        one message for each named peer, none inferred
    rank 2  text   ─┘     join                  loss    └─►  rank 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ldt_schedules.comm.cause import Aborted, Cause
from ldt_schedules.comm.message_transport import Expected, MessageTransport
from ldt_schedules.errors import ConfigError, LdtError
from ldt_schedules.planning.dependencies import Value, What
from ldt_schedules.planning.errors import ScheduleError
from ldt_schedules.planning.formats import grid, table_hash
from ldt_schedules.planning.progress import Semantics
from ldt_schedules.planning.table import ScheduleTable
from ldt_schedules.planning.validator import check
from ldt_schedules.runtime.executor import ActionError, Executor, check_executable
from ldt_schedules.runtime.module_stages import Loss, ModuleStages, PipelineStage
from ldt_schedules.runtime.recorder import StepRecorder


@dataclass(frozen=True)
class StepResult:
    """What one step gave on this rank.

    Attributes:
        losses: of each microbatch, unweighted, detached; empty on a rank without a tail.
        recorder: when each action ran.
    """

    losses: tuple[torch.Tensor, ...]
    recorder: StepRecorder


class PipelineRunner:
    """One rank of a pipeline.

    Args:
        table: the schedule; every rank must have the same one.
        rank: this process's pipeline rank.
        stages: this rank's stages: a module for each, or a `PipelineStage` that also says how it packs.
        transport: from `connect_ranks`.
        loss: `(output, target) -> scalar` of one microbatch, on the rank with the tail.
        weights: of each microbatch's loss; the gradient is that of the weighted sum. Default: 1 / number of microbatches.
        blocking: wait for every message before going on. For debugging; a table must be made for it, and is checked.

    Raises:
        ScheduleError: the table is not valid, or would stand still under these semantics; with every violation.
        ConfigError: the stages are not those of this rank, the table calls one frozen whose module would be trained, or
            another rank has another table.
    """

    def __init__(
        self,
        table: ScheduleTable,
        rank: int,
        stages: Mapping[int, torch.nn.Module | PipelineStage],
        transport: MessageTransport,
        *,
        loss: Loss | None = None,
        weights: Sequence[float] | None = None,
        blocking: bool = False,
    ) -> None:
        self.table, self.rank, self.transport, self.blocking = table, rank, transport, blocking
        self.loss, self.weights = loss, weights or [1 / table.num_microbatches] * table.num_microbatches
        self.stages = {
            number: stage if isinstance(stage, PipelineStage) else PipelineStage(stage)
            for number, stage in stages.items()
        }
        try:
            check(table, semantics=Semantics.BLOCKING if blocking else transport.semantics)
            check_executable(table, packing=True)
            self._check_arguments()
            self._agree()
        except (ScheduleError, ConfigError) as error:
            transport.link.watch.declare(Cause(f"rank {rank}: {error}", rank))
            raise

    def step(
        self, inputs: Mapping[int, Sequence[Any]] | Sequence[Any] | None = None, targets: Sequence[Any] | None = None
    ) -> StepResult:
        """Run every microbatch forward and, if the table trains, backward; parameters' gradients are added to `.grad`.

        Args:
            inputs: of each microbatch, for the root of this rank (or root stage -> such a sequence, if there are several): a
                mapping for keywords, a tuple for positions, one tensor, or None for "nothing in this microbatch".
            targets: of each microbatch, on the rank with the tail.

        Raises:
            LdtError: an action failed on this rank or another; the message says where and why, with the cell marked.
            ConfigError: inputs or targets are missing, or not one for each microbatch.
        """
        try:
            compute = self._compute(self._inputs(inputs), targets)
            executor = Executor(
                table=self.table,
                rank=self.rank,
                compute=compute,
                transport=self.transport,
                spec=partial(_expected, compute),
                blocking=self.blocking,
            )
            with torch.set_grad_enabled(not self.table.forward_only):
                recorder = executor.run()
        except Exception as error:
            raise self._stopped(error) from error
        self.transport.iteration += 1
        return StepResult(tuple(compute.losses[m] for m in sorted(compute.losses)), recorder)

    def _compute(self, inputs: Mapping[int, Sequence[Any]], targets: Sequence[Any] | None) -> ModuleStages:
        count = self.table.num_microbatches
        if targets is not None and len(targets) != count:
            raise ConfigError(f"there are {len(targets)} targets for {count} microbatches; give one for each")
        layout, train = self.table.layout, not self.table.forward_only
        return ModuleStages(layout, self.stages, inputs, targets, self.loss, self.weights, train)

    def _inputs(self, given: Mapping[int, Sequence[Any]] | Sequence[Any] | None) -> dict[int, Sequence[Any]]:
        roots = [stage for stage in self.stages if self.table.layout.is_head(stage)]
        count = self.table.num_microbatches
        if isinstance(given, Mapping):
            by_stage = dict(given)
        elif given is None:
            by_stage = {}
        else:
            by_stage = dict.fromkeys(roots[:1] if len(roots) == 1 else [-1], given)
        if set(by_stage) != set(roots):
            raise ConfigError(
                f"rank {self.rank} has the root stages {roots or 'none'} and got inputs for {sorted(by_stage) or 'none'}; "
                "give a sequence for the only root, a mapping stage -> sequence for several, nothing where there is none"
            )
        for stage, sequence in by_stage.items():
            if len(sequence) != count:
                raise ConfigError(
                    f"stage {stage} got {len(sequence)} inputs for {count} microbatches; give one for each"
                )
        return by_stage

    def _check_arguments(self) -> None:
        table, layout = self.table, self.table.layout
        if not 0 <= self.rank < layout.num_ranks:
            raise ConfigError(f"there is no rank {self.rank}; the table has ranks 0..{layout.num_ranks - 1}")
        mine = layout.stages_on(self.rank)
        if set(self.stages) != set(mine):
            raise ConfigError(
                f"rank {self.rank} runs the stages {sorted(mine)} and got modules for {sorted(self.stages)}; give it a module "
                "for each of its own"
            )
        self._check_frozen()
        if any(layout.is_tail(stage) for stage in mine) and self.loss is None:
            raise ConfigError(f"rank {self.rank} has the last stage: give it `loss`, (output, target) -> scalar")
        if len(self.weights) != table.num_microbatches:
            raise ConfigError(f"there are {len(self.weights)} weights for {table.num_microbatches} microbatches")

    def _check_frozen(self) -> None:
        """Where the table has no backward, parameters that expect a gradient would never get one, and nobody would see it."""
        for number, stage in self.stages.items():
            trained = [name for name, parameter in stage.module.named_parameters() if parameter.requires_grad]
            if trained and self.table.layout.stages[number].frozen and not self.table.forward_only:
                more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
                raise ConfigError(
                    f"stage {number} ({self.table.layout.stages[number].name}) is frozen in the table, but its module trains "
                    f"{trained[0]}{more}; freeze it with module.requires_grad_(False), or make a table without "
                    f"freezing stage {number}"
                )

    def _agree(self) -> None:
        """Every rank compares its table with rank 0's."""
        mine = {"table": table_hash(self.table), "blocking": self.blocking}
        theirs = self.transport.told_by_first(mine, "table")
        differing = [name for name in mine if mine[name] != theirs.get(name)]
        if differing:
            raise ConfigError(
                f"rank {self.rank} has another {' and another '.join(differing)} than rank 0; give every rank the same"
            )
        self.transport.wait_for_all()

    def _stopped(self, error: Exception) -> LdtError:
        """What this rank says: its own failure, which it also tells the others, or the one that stopped it."""
        first = Aborted.behind(error)
        if first is not None:
            cause = first.cause
        else:
            index = error.index if isinstance(error, ActionError) else None
            cause = self.transport.link.watch.declare(Cause(self._told(index, error), self.rank, index))
        text = f"rank {self.rank} stopped because {cause.text}"
        if cause.rank is not None and cause.index is not None:
            text += "\n" + grid.excerpt(self.table, cause.rank, cause.index)
        mistake = isinstance(error, ConfigError) and cause.rank == self.rank
        return ConfigError(text) if mistake else LdtError(text)

    def _told(self, index: int | None, error: Exception) -> str:
        where = f"rank {self.rank}, iteration {self.transport.iteration}"
        if index is not None:
            where = f"rank {self.rank}, step {index}, action `{grid.cell(self.table, self.rank, index)}`"
        cause = error.__cause__ if isinstance(error, ActionError) and error.__cause__ is not None else error
        kind = "" if isinstance(cause, LdtError) else f"{type(cause).__name__}: "
        return f"{where}: {kind}{cause}"


def _expected(compute: ModuleStages, message: Value) -> Expected:
    """The shapes of a message that is to come, to be asked for when it does: of a gradient those of the output it belongs to,
    which went out before it could come back."""
    if message.what is not What.GRADIENT:
        return lambda: None
    return lambda: compute.handed_over.get((message.stage, message.microbatch))
