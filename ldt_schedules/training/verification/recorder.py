"""What a process of a verified run does: it trains a few steps as `ldt train` does, and writes down what each left.

Gradients are those that the optimizer sees: reduced over the site's replicas, before clipping, without the loss scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ldt_schedules.megatron import world
from ldt_schedules.megatron.chunks import global_parameters
from ldt_schedules.megatron.initialization import blocks_of
from ldt_schedules.megatron.stopping_together import stopping_together
from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig
from ldt_schedules.training.forward_step import LossReport
from ldt_schedules.training.process import Process, open_process
from ldt_schedules.training.verification import records
from ldt_schedules.training.verification.joining import Partition
from ldt_schedules.training.verification.planted import PLANTED
from ldt_schedules.training.verification.records import ProcessRecord


@stopping_together()
def record(
    config: TrainConfig, site: Site, directory: Path, steps: int, vocab_slices: int, plant: str | None = None
) -> None:
    """Be one process of a verified run from start to end. RANK, MASTER_ADDR and MASTER_PORT are the site's own.

    Args:
        config: from `configs.split_config` or `configs.whole_config`.
        directory: of the run's records, the same for all its processes.
        vocab_slices: the edge's tensor-parallel size of the split run.
        plant: name of the error to make.

    Raises:
        ConfigError, LdtError: see `open_process`.
    """
    # Where an operation has no deterministic form a warning says so, and the comparison shows what it does.
    torch.use_deterministic_algorithms(True, warn_only=True)
    process = open_process(config, site, vocab_slices)
    if plant is not None:
        PLANTED[plant].plant(process)
    recorder = _Recorder(process, directory)
    recorder.write(0, {}, [], None, True)
    source = process.microbatches("train")
    for step in _shown(range(1, steps + 1), process):
        process.zero_gradients()
        reports = process.forward_backward(source, forward_only=False)
        gradients = recorder.gradients()
        stepped, grad_norm = process.update()
        recorder.write(step, gradients, _losses(reports) if process.place.tensor_rank == 0 else [], grad_norm, stepped)
    world.close_site()


def _shown(steps: Sequence[int], process: Process) -> Iterator[int]:
    """Show on the terminal, if there is one, how far it is; one process does."""
    if process.place.global_rank:
        yield from steps
        return
    with Console(stderr=True).status("") as status:
        for step in steps:
            status.update(f"step {step} of {len(steps)}…")
            yield step


class _Recorder:
    def __init__(self, process: Process, directory: Path) -> None:
        self._place, self._trained, self._directory = process.place, process.trained, directory
        self._named: list[tuple[str, Any]] = list(global_parameters(process.trained.model))
        self._partition = {
            name: Partition(parameter.partition_dim, blocks_of(name, parameter, process.trained.config))
            for name, parameter in self._named
            if getattr(parameter, "tensor_model_parallel", False)
        }

    def gradients(self) -> dict[str, np.ndarray]:
        """This process's slices; empty on the replicas that write none."""
        scale = float(self._trained.optimizer.get_loss_scale())
        names = {parameter: name for name, parameter in self._named}
        # Also where nothing is written: the replicas may have to put the gradients together.
        found = reduced_gradients(self._trained.model, [parameter for _, parameter in self._named])
        return {
            name: _numpy(gradient / scale) for parameter, gradient in found if self._writes(name := names[parameter])
        }

    def write(
        self,
        step: int,
        gradients: dict[str, np.ndarray],
        losses: list[float],
        grad_norm: float | None,
        stepped: bool,
    ) -> None:
        """The state after step `step`."""
        weights = {name: _numpy(parameter) for name, parameter in self._named}
        place = self._place
        record = ProcessRecord(
            site=str(place.site),
            site_rank=place.site_rank,
            tensor_rank=place.tensor_rank,
            data_rank=place.data_rank,
            losses=losses,
            grad_norm=None if grad_norm is None else float(grad_norm),
            stepped=stepped,
            fingerprints={name: records.fingerprint(weight) for name, weight in weights.items()},
            partition=self._partition,
        )
        mine = {name: weight for name, weight in weights.items() if self._writes(name)}
        records.write(self._directory, step, record, {"gradient": gradients, "weight": mine})

    def _writes(self, name: str) -> bool:
        """The first replica writes; what is not cut, its first tensor-parallel process."""
        if self._place.data_rank or self._place.context_rank:
            return False
        return self._place.tensor_rank == 0 or name in self._partition


def reduced_gradients(model: Any, parameters: list[Any]) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each trained parameter with its gradient as the optimizer sees it, before clipping. A collective of the replicas
    where they share the optimizer's states."""
    if not model.ddp_config.use_distributed_optimizer:
        yield from ((parameter, parameter.main_grad) for parameter in parameters if parameter.requires_grad)
        return
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        for bucket in buffer.buckets:
            yield from _of_bucket(buffer, bucket)


def _of_bucket(buffer: Any, bucket: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """With the distributed optimizer replica r has the reduced r-th part of a bucket only: they are put together.

    In a copy, because the rest of the buffer is the optimizer's to leave as it is.
    """
    group = buffer.data_parallel_group
    shard = bucket.grad_data.chunk(group.size())[group.rank()].contiguous()
    whole = torch.empty_like(bucket.grad_data)
    torch.distributed.all_gather(list(whole.chunk(group.size())), shard, group=group)
    for parameter in bucket.params_list:
        start, end = (position - bucket.offset for position in buffer.param_index_map[parameter][:2])
        yield parameter, whole[start:end].view(parameter.shape)


def _losses(reports: list[LossReport]) -> list[float]:
    """Nats a token, of each microbatch."""
    sums = [report["lm loss"].tolist() for report in reports]
    return [total / tokens if tokens else 0.0 for total, tokens in sums]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the CPU; half precisions, which numpy has not all, as float32."""
    detached = tensor.detach()
    wide = detached.to("cpu", torch.promote_types(detached.dtype, torch.float32), copy=True)
    return wide.contiguous().numpy()
