"""In workers: what real stages compute and keep, which the cost model is held against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ldt_schedules.topology import Place, Site, Topology
from tests.helpers.workers import Workers, site_ports


@dataclass
class Counted:
    """Operations of one stage's forward and backward, and the bytes that it keeps between them."""

    forward: int
    backward: int
    kept: int


@contextlib.contextmanager
def site_world(topology: Topology, site: Site, rank: int, port: int) -> Iterator[Place]:
    """This process in the world of one site, with patches and no other site."""
    import warnings

    import patches
    from ldt_schedules.megatron import world

    warnings.simplefilter("ignore")
    patches.apply_all()
    place = topology.place(site, rank)
    world.open_site(topology, place, world.Address(host="127.0.0.1", port=port), timeout_s=60, seed=1)
    yield place
    world.close_site()


def of_both_sites(measure: Callable[..., Any], cases: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Of every case what `measure(site, rank, cases, port)` finds at the edge and in the cloud, by stage."""
    ports = site_ports()
    jobs = [(site, 0, cases, ports[str(site)]) for site in (Site.EDGE, Site.CLOUD)]
    edge, cloud = Workers().run(measure, jobs, timeout_s=timeout_s)
    return {name: {**edge[name], **cloud[name]} for name in cases}


def count(module: Any, given: Any, *arguments: Any, has_backward: bool = True, **keywords: Any) -> Counted:
    """Call a stage with `arguments` and `keywords`; if anybody needs that, go backward, too.

    Args:
        given: the stage's input; the executor holds it until B, whether autograd keeps it or not. None for a head.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {} if given is None else {given.untyped_storage().data_ptr(): given.untyped_storage()}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    if given is not None:
        _innermost(module).set_input_tensor(given)
    with (
        torch.set_grad_enabled(has_backward),
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = module(*arguments, **keywords)
    with FlopCounterMode(display=False) as backward:
        if has_backward:
            output.backward(torch.ones_like(output))
    held = sum(storage.nbytes() for storage in kept.values()) if has_backward else 0
    return Counted(forward.get_total_flops(), backward.get_total_flops(), held)


def _innermost(module: Any) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module
