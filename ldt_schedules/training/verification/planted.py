"""Errors made on purpose. A gate that has never been seen to close proves nothing.

Each is a mistake that is easily made where a model is split over unequal sites, and that a falling loss does not show. It
is planted in the running processes, once the model is built, and the gate must catch it and say what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldt_schedules.topology import Site
from ldt_schedules.training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from ldt_schedules.training.process import Process


@dataclass(frozen=True)
class Expected:
    """What the gate must say: a finding of this kind about this site, whose cause begins so."""

    kind: str
    site: Site
    cause: str


@dataclass(frozen=True)
class Planted:
    """One error.

    Attributes:
        what: for people.
        not_for: why it cannot be made with a config; None where it can.
        expected: given a config that it is for.
        plant: make it in this process, as far as this process has part in it. All processes of the run are asked.
    """

    name: str
    what: str
    not_for: Callable[[TrainConfig], str | None]
    expected: Callable[[TrainConfig], Expected]
    plant: Callable[[Process], None]


def _no_domains(config: TrainConfig) -> str | None:
    domains = config.topology.domains
    if domains == 1:
        return "the cloud has as many replicas as the edge, so nothing is averaged over domains"
    return "with per-token loss Megatron sums, and averages nothing" if config.train.calculate_per_token_loss else None


def _forget_domains(process: Process) -> None:
    from ldt_schedules.megatron import session

    run = session.current()
    assert run is not None
    run.domain_scale = 1.0


def _double_gradients(process: Process) -> None:
    if process.place.site is not Site.EDGE:
        return
    config, model = process.trained.config, process.trained.model
    original = config.finalize_model_grads_func

    def finalize(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        model.scale_gradients(2.0)

    config.finalize_model_grads_func = finalize


def _site_with_shards(config: TrainConfig) -> Site | None:
    for site in (Site.CLOUD, Site.EDGE):
        if config.topology.size(site).tensor > 1 and (site is Site.EDGE or _cloud_stage(config) is not None):
            return site
    return None


def _no_shards(config: TrainConfig) -> str | None:
    return None if _site_with_shards(config) else "no site has tensor parallelism, so no weight has shards"


def _swap_shards(process: Process) -> None:
    """The first two tensor-parallel processes exchange their slices of one matrix, in the optimizer's copy too."""
    import torch
    from megatron.core import parallel_state

    site = _site_with_shards(process.config)
    assert site is not None
    if process.place.site is not site or process.place.stage not in (0, _cloud_stage(process.config)):
        return
    weight = _first_matrix(process, sharded=True)
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(weight) for _ in range(group.size())]
    torch.distributed.all_gather(shards, weight.detach().contiguous(), group=group)
    rank = process.place.tensor_rank
    with torch.no_grad():
        weight.copy_(shards[{0: 1, 1: 0}.get(rank, rank)])
    process.trained.optimizer.reload_model_params()


def _swapped(config: TrainConfig) -> Expected:
    site = _site_with_shards(config)
    assert site is not None
    order = [1, 0, *range(2, config.topology.size(site).tensor)]
    return Expected("weights", site, f"has its tensor-parallel shards in the order {' '.join(map(str, order))}")


def _cloud_stage(config: TrainConfig) -> int | None:
    """The first stage of the cloud that has layers."""
    stages = range(1, config.num_pipeline_ranks)
    return next((stage for stage in stages if config.layer_split[stage]), None)


def _no_layers(config: TrainConfig) -> str | None:
    return "the cloud has no layers" if _cloud_stage(config) is None else None


def _hold_weight(process: Process) -> None:
    """After each update a matrix of the cloud is as before, and so is the copy that the optimizer may have of it."""
    import torch

    if process.place.site is not Site.CLOUD or process.place.stage != _cloud_stage(process.config):
        return
    weight = _first_matrix(process)
    copy = getattr(weight, "main_param", None)
    held = [weight] if copy is None else [weight, copy]
    optimizer = process.trained.optimizer
    original = optimizer.step

    @torch.no_grad()
    def step() -> Any:
        before = [tensor.detach().clone() for tensor in held]
        result = original()
        for tensor, old in zip(held, before, strict=True):
            tensor.copy_(old)
        return result

    optimizer.step = step


def _first_matrix(process: Process, sharded: bool = False) -> torch.nn.Parameter:
    """A weight matrix of this process, the same on all replicas; `sharded`: of which each process has a slice."""
    from ldt_schedules.megatron.chunks import global_parameters

    return next(
        parameter
        for _, parameter in global_parameters(process.trained.model)
        if parameter.dim() > 1 and (getattr(parameter, "tensor_model_parallel", False) or not sharded)
    )


_ALL = (
    Planted(
        name="missing-domain-average",
        what="the cloud's gradients are not multiplied by the number of domains",
        not_for=_no_domains,
        expected=lambda config: Expected(
            "gradients", Site.CLOUD, f"is {1 / config.topology.domains:.3g} times the reference"
        ),
        plant=_forget_domains,
    ),
    Planted(
        name="wrong-scale",
        what="the edge's gradients are multiplied by 2",
        not_for=lambda config: None,
        expected=lambda config: Expected("gradients", Site.EDGE, "is 2 times the reference"),
        plant=_double_gradients,
    ),
    Planted(
        name="swapped-shard",
        what="two tensor-parallel processes hold each other's slice of a weight",
        not_for=_no_shards,
        expected=_swapped,
        plant=_swap_shards,
    ),
    Planted(
        name="stale-weight",
        what="a weight of the cloud is put back after each update",
        not_for=_no_layers,
        expected=lambda config: Expected("weights", Site.CLOUD, "was not updated in step"),
        plant=_hold_weight,
    ),
)

PLANTED = {planted.name: planted for planted in _ALL}
